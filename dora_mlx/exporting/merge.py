"""A model's weights in the names of its base checkpoint: merged, dequantized, one at a time.

An adapted layer is any module with a method ``merged_weight() -> mx.array`` (float32, shaped as
the weight of its base) and a child ``base``, the layer that it adapts. It stands for its base:
the merged weight takes the name of the base's weight, the base's bias is unchanged, and the
adapter's own parameters have no name here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_product import is_quantized, row_shape, weight_rows, weight_shape

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    compute: Callable[[], mx.array]
    packed: nn.Module | None = None


class MergedWeights:
    """The tensors a plain checkpoint of ``model`` would hold, as float32.

    Nothing is computed until a tensor is asked for, and nothing is kept afterwards: a loop over
    ``shapes()`` that uses ``weights[name]`` and drops it peaks at the largest tensor.

    Args:
        model: A loaded mlx-lm model, with adapted layers or without. Quantized layers give one
            ``weight``, dequantized.

    Raises:
        UserError: When a layer keeps its weight in a form that cannot be merged.
    """

    def __init__(self, model: nn.Module):
        self._tensors = dict(_collect(model, ""))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor, in the order of the model; computes nothing."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> mx.array:
        """The tensor ``name``, float32, evaluated."""
        tensor = self._tensors[name].compute().astype(mx.float32)
        mx.eval(tensor)
        # Buffers of one tensor's intermediate steps rarely fit the next one's.
        mx.clear_cache()
        return tensor

    def packed(self, name: str) -> nn.Module | None:
        """The quantized layer whose weight ``name`` is, unless an adapter changed that weight."""
        return self._tensors[name].packed

    def items(self) -> Iterator[tuple[str, mx.array]]:
        """``(name, tensor)``, each computed when it is reached."""
        for name in self._tensors:
            yield name, self[name]


def _collect(node: Any, name: str) -> Iterator[tuple[str, _Tensor]]:
    if isinstance(node, mx.array):
        yield name, _plain(node, name)
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from _collect(child, _join(name, str(index)))
    elif isinstance(node, nn.Module) and (hasattr(node, "merged_weight") or is_quantized(node)):
        yield from _layer(node, name)
    elif isinstance(node, dict):
        for key, child in node.items():
            # As in mlx.nn: what starts with an underscore is not a parameter.
            if not key.startswith("_"):
                yield from _collect(child, _join(name, key))


def _layer(layer: nn.Module, name: str) -> Iterator[tuple[str, _Tensor]]:
    base = layer
    compute = getattr(layer, "merged_weight", None)
    if compute is not None:
        base = layer.base
    shape = weight_shape(base)
    if compute is None:

        def compute() -> mx.array:
            return weight_rows(base, 0, row_shape(base)[0], mx.float32).reshape(shape)

    packed = base if base is layer else None
    yield _join(name, "weight"), _Tensor(shape, compute, packed)
    if "bias" in base:
        yield _join(name, "bias"), _plain(base["bias"], _join(name, "bias"))


def _plain(array: mx.array, name: str) -> _Tensor:
    if array.dtype not in _FLOATS:
        raise UserError(
            f"{name} is stored as {array.dtype}, a form that cannot be exported yet. "
            "Train on another quantization of this model."
        )
    return _Tensor(tuple(array.shape), lambda: array)


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
