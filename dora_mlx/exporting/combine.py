"""Several adapters on one base model as one set of weights (task arithmetic, arXiv 2212.04089).

An adapter changes a weight from W to W'; what is combined are these changes W' - W, exact and in
float32. For LoRA they are its low-rank products; DoRA's magnitudes make them anything but low-rank
and not additive in A, B and m, so there is no adapter that the result could be written as.

    linear   W + sum_i c_i (W'_i - W)
    ties     W + the mean, over the adapters that agree with the elected sign, of the c_i (W'_i - W)
             that are left after all but the largest of each were set to zero (arXiv 2306.01708)
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_unflatten

from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_weight import (
    row_blocks,
    weight_dtype,
    weight_rows,
    weight_shape,
    with_weight,
)
from dora_mlx.layers.lora import LowRankLayer

Method = Literal["linear", "ties"]
# From the changes of one block of rows, and the coefficients, to the change of them all.
Combine = Callable[[list[mx.array], list[float]], mx.array]


@dataclass(frozen=True)
class Recipe:
    """How changes are combined.

    Attributes:
        method: ``linear`` or ``ties``.
        coefficients: c_i, one for every adapter.
        density: Share of each weight's changes that ``ties`` keeps, the largest ones.
    """

    method: Method
    coefficients: tuple[float, ...]
    density: float = 0.2


class CombinedLayer(nn.Module):
    """A frozen layer with the changes of several adapters in its weight.

    It keeps nothing but the adapters: the weight is computed in blocks of rows when it is asked
    for, and in every call.

    Args:
        base: The frozen layer.
        changes: Every adapter's layer around ``base``, with its coefficient.
        recipe: How to combine them.
    """

    def __init__(self, base: nn.Module, changes: list[tuple[LowRankLayer, float]], recipe: Recipe):
        super().__init__()
        self.base = base
        self._changes, self._recipe = changes, recipe

    def merged_blocks(self) -> Iterator[mx.array]:
        """The rows of the weight in order, a block ``[rows, width]`` of them, float32."""
        linear = self._recipe.method == "linear"
        combine: Combine = _linear if linear else _ties(self._thresholds())
        coefficients = [coefficient for _, coefficient in self._changes]
        changes = [self._changes_of(layer) for layer, _ in self._changes]
        for (start, stop), *blocks in zip(row_blocks(self.base), *changes, strict=True):
            rows = weight_rows(self.base, start, stop, mx.float32)
            rows = rows + combine(blocks, coefficients)
            mx.eval(rows)
            yield rows

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What the layer of the combined weight computes."""
        return self._plain()(*inputs, **options)

    def as_linear(self, x: mx.array) -> mx.array:
        """The same for an embedding as output layer."""
        return self._plain().as_linear(x)

    def _plain(self) -> nn.Module:
        weight = mx.concatenate(list(self.merged_blocks())).reshape(weight_shape(self.base))
        return with_weight(self.base, weight.astype(weight_dtype(self.base)), dequantize=True)

    def _changes_of(self, layer: LowRankLayer) -> Iterator[mx.array]:
        """What one adapter adds to the weight, a block of rows at a time, float32."""
        for (start, stop), block in zip(row_blocks(self.base), layer.merged_blocks(), strict=True):
            change = block - weight_rows(self.base, start, stop, mx.float32)
            mx.eval(change)
            yield change

    def _thresholds(self) -> list[mx.array]:
        """Of each adapter, the smallest size of a change that is kept."""
        size = math.prod(weight_shape(self.base))
        kept = max(1, round(self._recipe.density * size))
        return [
            mx.array(nth_largest(partial(self._changes_of, layer), kept), mx.float32)
            for layer, _ in self._changes
        ]


def put_combined(model: nn.Module, adapters: list[dict[str, nn.Module]], recipe: Recipe) -> None:
    """Put the combination of adapters into their base model.

    Args:
        model: The base model.
        adapters: For every adapter, its layers around those of ``model``, by path.
        recipe: How to combine them.

    Raises:
        UserError: If an adapter is a full fine-tuning.
    """
    changes: dict[str, list[tuple[LowRankLayer, float]]] = defaultdict(list)
    for layers, coefficient in zip(adapters, recipe.coefficients, strict=True):
        for path, layer in layers.items():
            if not isinstance(layer, LowRankLayer):
                raise UserError(
                    "Only LoRA and DoRA adapters can be merged, and one of these trained all "
                    "weights."
                )
            changes[path].append((layer, coefficient))
    places = dict(model.named_modules())
    combined = [(p, CombinedLayer(places[p], own, recipe)) for p, own in changes.items()]
    model.update_modules(tree_unflatten(combined))


def _linear(changes: list[mx.array], coefficients: list[float]) -> mx.array:
    return sum((c * change for c, change in zip(coefficients, changes, strict=True)), mx.array(0.0))


def _ties(thresholds: list[mx.array]) -> Combine:
    def combine(changes: list[mx.array], coefficients: list[float]) -> mx.array:
        kept = mx.stack(
            [
                c * mx.where(mx.abs(change) >= threshold, change, 0)
                for c, change, threshold in zip(coefficients, changes, thresholds, strict=True)
            ]
        )
        elected = mx.sign(kept.sum(axis=0))
        agreeing = (mx.sign(kept) == elected) & (kept != 0)
        count = mx.maximum(agreeing.sum(axis=0), 1)
        return mx.where(agreeing, kept, 0).sum(axis=0) / count

    return combine


def nth_largest(blocks: Callable[[], Iterator[mx.array]], nth: int) -> float:
    """The ``nth`` largest absolute value (1 is the first), exactly, of float32 ``blocks``.

    Bits of floats that are not negative are in the order of the floats, so two passes that count
    the upper and then the lower half of the bits find it, with one block at a time in memory.
    """
    upper = np.zeros(1 << 16, np.int64)
    for block in blocks():
        upper += np.bincount(_bits(block) >> 16, minlength=1 << 16)
    first, nth = _bin_of(upper, nth)
    lower = np.zeros(1 << 16, np.int64)
    for block in blocks():
        bits = _bits(block)
        lower += np.bincount(bits[bits >> 16 == first] & 0xFFFF, minlength=1 << 16)
    last, _ = _bin_of(lower, nth)
    return float(np.array([first << 16 | last], np.uint32).view(np.float32)[0])


def _bits(block: mx.array) -> npt.NDArray[np.uint32]:
    return np.array(mx.abs(block).flatten().view(mx.uint32))


def _bin_of(counts: npt.NDArray[np.int64], nth: int) -> tuple[int, int]:
    """Where the ``nth`` largest is, and the how many-th it is there."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, nth))
    before = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, nth - before
