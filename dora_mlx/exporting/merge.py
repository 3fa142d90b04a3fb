"""A model's weights in the names of its base checkpoint: merged, dequantized, a block at a time.

An adapted layer is any module with a method ``merged_blocks() -> Iterator[mx.array]`` (the rows of
its weight in order, float32) and a child ``base``, the layer that it adapts. It stands for its
base: the merged weight takes the name of the base's weight, the base's bias is unchanged, and the
adapter's own parameters have no name here.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_weight import (
    BLOCK_VALUES,
    is_quantized,
    row_blocks,
    weight_rows,
    weight_shape,
)

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class Weights(Mapping[str, mx.array]):
    """Named float32 tensors that are computed when they are asked for, and not kept.

    The writers read nothing else, so whatever can be asked for its shapes and its tensors can be
    exported.
    """

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor, in the order of the model; computes nothing."""

    def blocks(self, name: str) -> Iterator[mx.array]:
        """The tensor ``name`` in blocks ``[rows, width]`` of the vectors over its last axis.

        In order, float32, evaluated; of at most about a million values each.
        """
        yield from split_rows(self[name])

    def packed(self, name: str) -> nn.Module | None:
        """The quantized layer whose weight is the tensor ``name`` as it stands, if there is one.

        ``None`` where an adapter changed the weight or nothing is quantized. A writer that can
        keep the packed values spares them another rounding.
        """
        return None

    def __len__(self) -> int:
        return len(self.shapes())

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes())

    def __contains__(self, name: object) -> bool:
        return name in self.shapes()


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[mx.array]]
    packed: nn.Module | None = None


class MergedWeights(Weights):
    """The tensors a plain checkpoint of ``model`` would hold, as float32.

    Nothing is computed until a tensor is asked for, and nothing is kept afterwards: a loop over
    ``blocks`` peaks at a few blocks, one over the tensors at twice the largest.

    Args:
        model: A loaded mlx-lm model, with adapted layers or without. Quantized layers give one
            ``weight``, dequantized.

    Raises:
        UserError: When a layer keeps its weight in a form that cannot be merged.
    """

    def __init__(self, model: nn.Module):
        self._tensors = dict(_collect(model, ""))
        self._shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor, in the order of the model; computes nothing."""
        return self._shapes

    def __getitem__(self, name: str) -> mx.array:
        """The tensor ``name``, float32, evaluated."""
        shape = self._shapes[name]
        blocks = list(self.blocks(name))
        tensor = (mx.concatenate(blocks) if len(blocks) > 1 else blocks[0]).reshape(shape)
        mx.eval(tensor)
        return tensor

    def blocks(self, name: str) -> Iterator[mx.array]:
        """The tensor ``name`` in blocks ``[rows, width]``, each computed when it is reached."""
        for block in self._tensors[name].blocks():
            block = block.astype(mx.float32)
            mx.eval(block)
            yield block
        # Buffers of one tensor's intermediate steps rarely fit the next one's.
        mx.clear_cache()

    def packed(self, name: str) -> nn.Module | None:
        """The quantized layer whose weight is the tensor ``name`` as it stands, if there is one."""
        return self._tensors[name].packed


def _collect(node: Any, name: str) -> Iterator[tuple[str, _Tensor]]:
    if isinstance(node, mx.array):
        yield name, _plain(node, name)
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from _collect(child, _join(name, str(index)))
    elif isinstance(node, nn.Module) and (hasattr(node, "merged_blocks") or is_quantized(node)):
        yield from _layer(node, name)
    elif isinstance(node, dict):
        for key, child in node.items():
            # As in mlx.nn: what starts with an underscore is not a parameter.
            if not key.startswith("_"):
                yield from _collect(child, _join(name, key))


def _layer(layer: nn.Module, name: str) -> Iterator[tuple[str, _Tensor]]:
    blocks = getattr(layer, "merged_blocks", None)
    base = layer if blocks is None else layer.base
    weight = _join(name, "weight")
    if blocks is None:
        yield weight, _Tensor(weight_shape(base), lambda: _rows(base), base)
    else:
        yield weight, _Tensor(weight_shape(base), blocks)
    if "bias" in base:
        yield _join(name, "bias"), _plain(base["bias"], _join(name, "bias"))


def _rows(base: nn.Module) -> Iterator[mx.array]:
    for start, stop in row_blocks(base):
        yield weight_rows(base, start, stop, mx.float32)


def _plain(array: mx.array, name: str) -> _Tensor:
    if array.dtype not in _FLOATS:
        raise UserError(
            f"{name} is stored as {array.dtype}, a form that cannot be exported yet. "
            "Train on another quantization of this model."
        )

    return _Tensor(tuple(array.shape), lambda: split_rows(array))


def split_rows(array: mx.array) -> Iterator[mx.array]:
    """``array`` in blocks ``[rows, width]`` of the vectors over its last axis."""
    rows = array.reshape(-1, array.shape[-1])
    size = max(1, BLOCK_VALUES // rows.shape[1])
    for start in range(0, rows.shape[0], size):
        yield rows[start : start + size]


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
