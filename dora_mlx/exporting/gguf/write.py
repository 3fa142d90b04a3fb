"""Write a GGUF file, some rows of one tensor in memory at a time."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.architectures import Architecture
from dora_mlx.exporting.gguf.encoding import encode_block, encode_q4_1, fits_q4_1, largest_rounding
from dora_mlx.exporting.gguf.hyperparameters import (
    Hyperparameters,
    read_hyperparameters,
    read_model_config,
    rope_tensors,
    write_hyperparameters,
)
from dora_mlx.exporting.gguf.llama_quantize import check_llama_quantize, run_llama_quantize
from dora_mlx.exporting.gguf.quants import (
    LLAMA_QUANTIZE_QUANTS,
    QUANTS,
    choose_type,
    find_quant,
    size_in_bytes,
)
from dora_mlx.exporting.gguf.tensors import TensorPlan, plan_tensors
from dora_mlx.exporting.gguf.vocabulary import (
    Difference,
    Vocabulary,
    read_vocabulary,
    write_vocabulary,
)
from dora_mlx.exporting.merge import Weights
from dora_mlx.exporting.staging import Progress, byte_counter, staged_file

_PHI3 = re.compile("phi-?3", re.IGNORECASE)
# A float16 scale that is further from the original than this is said to be rounded.
_EXACT = 1e-6


@dataclass(frozen=True)
class FilePlan:
    """Everything about a file except its vocabulary and its data.

    ``types`` has the type of every tensor by its name in the file; ``taken_over`` those that are
    copied from the quantized base as they are; ``extra`` float32 tensors the model does not have.
    """

    architecture: Architecture
    numbers: Hyperparameters
    tensors: list[TensorPlan]
    types: dict[str, Type]
    taken_over: frozenset[str]
    extra: dict[str, NDArray[np.float32]]

    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        sizes = (size_in_bytes(plan.shape, self.types[plan.name]) for plan in self.tensors)
        return sum(sizes) + sum(tensor.nbytes for tensor in self.extra.values())

    def rows(self) -> int:
        """Rows of the embedding: the number of tokens that llama.cpp wants."""
        return {plan.name: plan.shape[0] for plan in self.tensors}["token_embd.weight"]


def check_gguf_base(base_dir: Path, quant: str = "f16", pre: str | None = None) -> None:
    """Refuse a base model or a type that cannot be exported, from the model's files alone.

    Raises:
        UserError: Naming the first of type, architecture, config and tokenizer that is not
            supported, and those that are.
    """
    find_quant(quant)
    if quant in LLAMA_QUANTIZE_QUANTS:
        check_llama_quantize(quant)
    architecture, config = read_model_config(base_dir)
    read_hyperparameters(architecture, config)
    if config.get("vocab_size") is None:
        raise UserError("vocab_size is missing from the base model's config.json.")
    read_vocabulary(base_dir, config["vocab_size"], pre)


def gguf_size(weights: Weights, base_dir: Path, quant: str, pre: str | None = None) -> int:
    """About the size in bytes of the file that ``write_gguf`` would write.

    Raises:
        UserError: When this model cannot be exported.
    """
    plan = plan_file(base_dir, weights, quant)
    return plan.data_bytes() + _metadata_bytes(read_vocabulary(base_dir, plan.rows(), pre), plan)


def write_gguf(
    weights: Weights,
    base_dir: Path,
    output_file: Path,
    quant: str = "f16",
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    pre: str | None = None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write ``weights`` with the hyper-parameters and the tokenizer of ``base_dir``.

    Args:
        weights: The merged model.
        base_dir: Folder of the base model: ``config.json`` and the tokenizer's files.
        output_file: File to write; complete when this returns, untouched when it raises. Its
            name without the suffix is the name that programs show for the model.
        quant: A name of ``QUANTS`` or ``LLAMA_QUANTIZE_QUANTS``; norms and biases are always
            float32.
        progress: Called with bytes done and bytes in total.
        overwrite: Replace a file that exists.
        pre: Name of the pre-tokenizer in llama.cpp, for a tokenizer that is not known here.
        check: Called with the complete output while it still has a temporary name; what it
            raises discards the output and keeps the one that was there before.

    Raises:
        UserError: When this model cannot be exported, or the file cannot be written.
    """
    check_gguf_base(base_dir, quant, pre)
    plan = plan_file(base_dir, weights, quant)
    vocabulary = read_vocabulary(base_dir, plan.rows(), pre)
    name = _model_name(output_file, vocabulary)
    needed = plan.data_bytes() + _metadata_bytes(vocabulary, plan)
    if quant in QUANTS:
        with staged_file(output_file, needed, overwrite) as partial:
            _write(weights, plan, vocabulary, partial, name, quant, progress)
            if check is not None:
                check(partial)
        return
    source = plan_file(base_dir, weights, "f16")
    between = source.data_bytes() + _metadata_bytes(vocabulary, source)
    with staged_file(output_file, needed + between, overwrite) as partial:
        with run_llama_quantize(partial, quant) as file:
            _write(weights, source, vocabulary, file, name, "f16", progress)
        if check is not None:
            check(partial)


def plan_file(base_dir: Path, weights: Weights, quant: str) -> FilePlan:
    """What a file of ``weights`` holds, from the base model's config and the shapes alone.

    Raises:
        UserError: When this model cannot be exported.
    """
    chosen = find_quant(quant)
    architecture, config = read_model_config(base_dir)
    numbers = read_hyperparameters(architecture, config)
    plans = plan_tensors(architecture, numbers, weights.shapes())
    tied = "output.weight" not in {plan.name for plan in plans}
    types = {plan.name: choose_type(chosen, plan.name, plan.shape, numbers, tied) for plan in plans}
    taken_over = set()
    for plan in plans if chosen.type == Type.Q4_1 else ():
        packed = weights.packed(plan.source)
        if packed is not None and fits_q4_1(packed) and types[plan.name] != Type.F32:
            taken_over.add(plan.name)
            types[plan.name] = Type.Q4_1
    return FilePlan(
        architecture, numbers, plans, types, frozenset(taken_over), rope_tensors(numbers)
    )


def _write(
    weights: Weights,
    plan: FilePlan,
    vocabulary: Vocabulary,
    file: Path,
    name: str,
    quant: str,
    progress: Progress | None,
) -> None:
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[plan.architecture.arch])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(QUANTS[quant].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(vocabulary.tokens))
    write_hyperparameters(writer, plan.architecture, plan.numbers)
    write_vocabulary(writer, vocabulary)
    _announce_tensors(writer, plan)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    report = byte_counter(plan.data_bytes(), progress)
    # GGUFWriter's own tensor output reports a full disk as an OSError without errno.
    with open(file, "ab") as stream:
        for extra in plan.extra.values():
            _write_aligned(stream, iter([extra]), report)
        for tensor in plan.tensors:
            if tensor.name in plan.taken_over:
                blocks: Iterator[NDArray[Any]] = iter([encode_q4_1(*packed_parts(weights, tensor))])
            else:
                blocks = _encoded(weights, tensor, plan.types[tensor.name])
            _write_aligned(stream, blocks, report)


def _encoded(weights: Weights, tensor: TensorPlan, kind: Type) -> Iterator[NDArray[np.generic]]:
    for block in tensor.blocks(weights):
        yield encode_block(block, kind, tensor.source)


def packed_parts(weights: Weights, tensor: TensorPlan) -> tuple[mx.array, mx.array, mx.array]:
    """Levels, scales and biases of a tensor that is taken over, as the file arranges its rows."""
    packed = weights.packed(tensor.source)
    assert packed is not None
    weight, scales, biases = (tensor.arrange(packed[n]) for n in ("weight", "scales", "biases"))
    return weight, scales, biases


def notes_on(weights: Weights, plan: FilePlan, vocabulary: Vocabulary) -> list[str]:
    """Sentences on what a person may want to know about a file; most often none."""
    notes = [each.value for each in Difference if each in vocabulary.differences]
    if not plan.taken_over:
        return notes
    count = f"{len(plan.taken_over)} of {len(plan.tensors)} tensors are the base's 4-bit weights"
    changes = [
        largest_rounding(part)
        for tensor in plan.tensors
        if tensor.name in plan.taken_over
        for part in packed_parts(weights, tensor)[1:]
    ]
    if max(changes) <= _EXACT:
        return [*notes, f"{count}, taken over without rounding them again."]
    return [
        *notes,
        f"{count}; their scales were rounded to float16, which changed them by up to "
        f"{max(changes):.1g} of their value.",
    ]


def _announce_tensors(writer: gguf.GGUFWriter, plan: FilePlan) -> None:
    """Tell ``writer`` every name, shape and type, in writing order."""
    tensors = [(name, tensor.shape, Type.F32) for name, tensor in plan.extra.items()]
    tensors += [(tensor.name, tensor.shape, plan.types[tensor.name]) for tensor in plan.tensors]
    for name, shape, kind in tensors:
        size = size_in_bytes(shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


def _metadata_bytes(vocabulary: Vocabulary, plan: FilePlan) -> int:
    """About what everything except the tensors' data takes; never less."""
    merges = map(" ".join, vocabulary.merges)
    texts = sum(len(text.encode()) + 32 for text in [*vocabulary.tokens, *merges])
    return texts + 200 * len(plan.tensors) + 10**6


def _write_aligned(
    file: BinaryIO, blocks: Iterator[NDArray[Any]], report: Callable[[int], None]
) -> None:
    """Write ``blocks`` one after the other, with zeros around them up to GGUF's alignment."""
    _align(file)
    for block in blocks:
        file.write(np.ascontiguousarray(block).data)
        report(block.nbytes)
    _align(file)


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _model_name(output_file: Path, vocabulary: Vocabulary) -> str:
    """The name that programs show, by which llama.cpp also knows one family's tokenizer."""
    name = output_file.stem
    if _PHI3.search(name) is not None:
        if not vocabulary.phi3:
            raise UserError(
                f"llama.cpp takes any model named {name!r} for a Phi-3 and fails on it. "
                "Choose a file name without 'phi-3'."
            )
        return name
    return f"{name} (Phi-3)" if vocabulary.phi3 else name
