"""Several adapters on one base model as one set of weights (task arithmetic, arXiv 2212.04089).

An adapter changes a weight from W to W'; what is combined are these changes W' - W, exact and in
float32. For LoRA they are its low-rank products; DoRA's magnitudes make them anything but low-rank
and not additive in A, B and m, so there is no adapter that the result could be written as.

    linear   W + sum_i c_i (W'_i - W)
    ties     W + the mean, over the adapters that agree with the elected sign, of the c_i (W'_i - W)
             that are left after all but the largest of each were set to zero (arXiv 2306.01708)
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_product import (
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
        merged = [layer.merged_blocks() for layer, _ in self._changes]
        for (start, stop), *blocks in zip(row_blocks(self.base), *merged, strict=True):
            rows = weight_rows(self.base, start, stop, mx.float32)
            rows = rows + combine([block - rows for block in blocks], coefficients)
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

    def _thresholds(self) -> list[mx.array]:
        """Of each adapter, the smallest size of a change that is kept; one weight at a time."""
        thresholds = []
        for layer, _ in self._changes:
            sizes = []
            for (start, stop), block in zip(
                row_blocks(self.base), layer.merged_blocks(), strict=True
            ):
                change = block - weight_rows(self.base, start, stop, mx.float32)
                sizes.append(mx.abs(change).flatten())
                mx.eval(sizes[-1])
            every = mx.concatenate(sizes)
            dropped = every.size - max(1, round(self._recipe.density * every.size))
            thresholds.append(mx.partition(every, dropped)[dropped])
            mx.eval(thresholds[-1])
        return thresholds


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
