"""Safetensors files written and compared a block of rows at a time.

A file is eight bytes of header length, a JSON header with every tensor's type, shape and place,
then the tensors end to end.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dora_mlx.exporting.logits import VerificationError
from dora_mlx.exporting.precision import encode

MAX_SHARD_BYTES = 4 * 10**9

_FORMAT_NAMES = {
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class Stored:
    """Tensors of a file that are computed together, such as the parts of a quantized weight.

    ``chunks`` gives their values in blocks, each with the name it belongs to; those of one name
    in order.
    """

    specs: dict[str, Spec]
    chunks: Callable[[], Iterator[tuple[str, mx.array]]]

    @property
    def nbytes(self) -> int:
        """The size of all of them in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())


def write_shards(
    folder: Path,
    tensors: Sequence[Stored],
    source_format: str,
    report: Callable[[int], None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``model.safetensors``, or several files and their index.

    Args:
        folder: Where to.
        tensors: What to write, in this order.
        source_format: ``pt`` or ``mlx``: Transformers refuses a file that does not say which
            framework's layout it has.
        report: Called with bytes written.
        max_shard_bytes: Largest size of one file; what is larger alone gets a file of its own.
    """
    shards = _plan_shards(tensors, max_shard_bytes)
    weight_map = {}
    for file_name, group in shards.items():
        with open(folder / file_name, "wb") as file:
            _write_shard(file, group, source_format, report)
        weight_map.update(dict.fromkeys(_specs(group), file_name))
    if len(shards) > 1:
        total = sum(stored.nbytes for stored in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def check_shards(folder: Path, tensors: Sequence[Stored]) -> int:
    """Compare what lies in ``folder`` with ``tensors``, byte for byte.

    Returns:
        The number of tensors.

    Raises:
        VerificationError: When one is missing, left over, or holds something else.
    """
    found: dict[str, tuple[NDArray[np.uint8], Spec]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found.update(_map_shard(file))
    expected = _specs(tensors)
    if set(found) != set(expected):
        raise VerificationError(
            f"{folder} lacks or adds tensors: {sorted(set(found) ^ set(expected))}"
        )
    for stored in tensors:
        done = dict.fromkeys(stored.specs, 0)
        for name, chunk in stored.chunks():
            data = _bytes_of(chunk, stored.specs[name], name)
            there, spec = found[name]
            part = there[done[name] : done[name] + len(data)]
            if spec != stored.specs[name] or not np.array_equal(part, np.frombuffer(data, "u1")):
                raise VerificationError(f"{name} in {folder} does not hold the merged weights")
            done[name] += len(data)
    return len(expected)


def _plan_shards(tensors: Sequence[Stored], limit: int) -> dict[str, list[Stored]]:
    groups: list[list[Stored]] = [[]]
    filled = 0
    for stored in tensors:
        if groups[-1] and filled + stored.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(stored)
        filled += stored.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _write_shard(
    file: BinaryIO, group: list[Stored], source_format: str, report: Callable[[int], None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": source_format}}
    places = {}
    end = 0
    for name, spec in _specs(group).items():
        places[name], end = end, end + spec.nbytes
        header[name] = {
            "dtype": _FORMAT_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [places[name], end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    begin = file.tell()
    for stored in group:
        for name, chunk in stored.chunks():
            data = _bytes_of(chunk, stored.specs[name], name)
            file.seek(begin + places[name])
            places[name] += file.write(data)
            report(len(data))


def _map_shard(file: Path) -> Iterator[tuple[str, tuple[NDArray[np.uint8], Spec]]]:
    types = {text: dtype for dtype, text in _FORMAT_NAMES.items()}
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    data = np.memmap(file, np.uint8, "r", offset=8 + length)
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, (data[start:end], Spec(tuple(entry["shape"]), types[entry["dtype"]]))


def _specs(tensors: Sequence[Stored]) -> dict[str, Spec]:
    return {name: spec for stored in tensors for name, spec in stored.specs.items()}


def _bytes_of(chunk: mx.array, spec: Spec, name: str) -> memoryview:
    if mx.issubdtype(spec.dtype, mx.floating):
        data = encode(chunk, spec.dtype, name)
    else:
        data = np.array(chunk, copy=False)
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
