"""Load what was exported in the program it is for, and compare it with the model it came from.

A failed comparison raises ``VerificationError``, not ``UserError``: the file was written from the
weights the model has, so a difference is a bug, of the exporter or of the program that loaded it,
and not something that a person can fix by choosing otherwise.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

import dora_mlx
from dora_mlx.exporting.gguf.encoding import encode_block
from dora_mlx.exporting.gguf.quants import QUANTS
from dora_mlx.exporting.gguf.write import plan_file
from dora_mlx.exporting.logits import VerificationError
from dora_mlx.exporting.merge import Weights

EXACT_TYPES = (Type.F32, Type.F16, Type.BF16)
# Root mean square of what a type may change a tensor by, over that of its values. About 1.5 times
# what normally distributed weights lose; a tensor that is wrong is off by 100 % and more.
TYPE_ERRORS = {
    Type.Q8_0: 0.01,
    Type.Q6_K: 0.03,
    Type.Q5_K: 0.06,
    Type.Q5_1: 0.06,
    Type.Q5_0: 0.08,
    Type.Q4_K: 0.12,
    Type.Q4_1: 0.12,
    Type.Q4_0: 0.15,
}
COARSEST_ERROR = 0.5
# Lines in which llama.cpp says why it stopped.
_REASON = re.compile(r"error loading|GGML_ASSERT|terminate called|what\(\)")


def gguf_precision(quant: str) -> mx.Dtype | None:
    """The type that all large tensors of a file have, or ``None`` where they are quantized."""
    return {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}.get(quant)


def llama_cpp_is_installed() -> bool:
    """Whether the ``gguf-verify`` extra is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def run_llama_cpp(
    files: Sequence[Path], token_ids: mx.array, texts: Sequence[str]
) -> list[tuple[NDArray[np.float32], dict[str, list[list[int]]]]]:
    """What llama.cpp makes of each file, in one child process.

    Returns:
        For each file its logits ``[B, L, vocab]``, and the token ids of ``texts`` without and
        with what encoding adds: ``plain`` and ``with_special``.

    Raises:
        VerificationError: When llama.cpp does not load a file, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.run(
            [sys.executable, "-m", "dora_mlx.exporting.llama_cpp_check", folder, *map(str, files)],
            input=json.dumps({"token_ids": token_ids.tolist(), "texts": list(texts)}),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": _python_path()},
        )
        done = len(list(Path(folder).glob("tokens*.json")))
        if child.returncode != 0 or done < len(files):
            reasons = [line for line in child.stderr.splitlines() if _REASON.search(line)]
            said = "; ".join(line.strip() for line in reasons[-3:]) or child.stderr[-500:]
            raise VerificationError(
                f"llama.cpp cannot use {files[done]} ({child.returncode}): {said}"
            )
        return [
            (
                np.load(Path(folder) / f"logits{index}.npy"),
                json.loads((Path(folder) / f"tokens{index}.json").read_text()),
            )
            for index in range(len(files))
        ]


def check_gguf_tensors(file: Path, weights: Weights, base_dir: Path, quant: str) -> int:
    """Compare every tensor with the weights; returns how many there are.

    Values of 16 and 32 bits have to be the weights, bit for bit; quantized ones may differ from
    them by the error of their type.

    Raises:
        VerificationError: When one is missing, left over, of another type or shape, or holds
            something else.
    """
    plan = plan_file(base_dir, weights, quant)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    expected = set(plan.types) | set(plan.extra)
    if set(found) != expected:
        raise VerificationError(f"{file} lacks or adds tensors: {sorted(set(found) ^ expected)}")
    for name, values in plan.extra.items():
        _check_shape(found[name], values.shape)
        _check_bytes(found[name], found[name].data, values)
    for tensor in plan.tensors:
        written = found[tensor.name]
        # What llama-quantize wrote has types of its own choice.
        if quant in QUANTS and written.tensor_type != plan.types[tensor.name]:
            raise VerificationError(f"{tensor.name} is {written.tensor_type.name} in {file}")
        _check_shape(written, tensor.shape)
        _check_rows(written, tensor.blocks(weights))
    return len(found)


def _check_rows(written: Any, blocks: Iterator[mx.array]) -> None:
    rows = written.data.reshape(-1, written.data.shape[-1])
    error = size = 0.0
    start = 0
    for block in blocks:
        part = rows[start : start + len(block)]
        start += len(block)
        if written.tensor_type in EXACT_TYPES:
            _check_bytes(written, part, encode_block(block, written.tensor_type, written.name))
            continue
        values = np.array(block)
        difference = gguf.dequantize(part, written.tensor_type) - values
        error += float(np.square(difference, dtype=np.float64).sum())
        size += float(np.square(values, dtype=np.float64).sum())
    limit = TYPE_ERRORS.get(written.tensor_type, COARSEST_ERROR)
    if not error <= limit**2 * size:
        raise VerificationError(
            f"{written.name} is {math.sqrt(error / size):.1%} off the merged weights in "
            f"{written.tensor_type.name}, which may be {limit:.1%}"
        )


def _check_shape(written: Any, shape: tuple[int, ...]) -> None:
    # GGUF lists dimensions from the fastest to the slowest.
    if tuple(reversed(written.shape.tolist())) != tuple(shape):
        raise VerificationError(f"{written.name} has shape {written.shape}, not {shape} reversed")


def _check_bytes(written: Any, data: NDArray[Any], wanted: NDArray[Any]) -> None:
    if not np.array_equal(data.reshape(-1).view(np.uint8), wanted.reshape(-1).view(np.uint8)):
        raise VerificationError(f"{written.name} does not hold the merged weights")


def _python_path() -> str:
    package = str(Path(dora_mlx.__file__).parents[1])
    return os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
