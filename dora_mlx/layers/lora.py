"""LoRA (arXiv 2106.09685): a low-rank update beside a frozen weight.

    y = x W^T + s (x A) B + bias

W ``[out, in]`` frozen, maybe quantized; A ``[in, rank]``; B ``[rank, out]``; s = alpha / rank.

``LowRankLayer`` is what every adapter layer is. A kind of layer (``linear.py``, ``embedding.py``,
``conv.py``, ``switch.py``) adds how its base and its update act on an input; LoRA here and DoRA
in ``dora.py`` add how the two are combined. A layer such as ``DoRAConv2d`` is one of each.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.frozen_weight import (
    is_quantized,
    row_blocks,
    weight_dtype,
    weight_shape,
    with_weight,
)
from dora_mlx.kernels.recomputation import dear
from dora_mlx.kernels.row_norm import Update, updated_rows

if TYPE_CHECKING:
    from typing_extensions import Self

# From the differentiable inputs of a layer to what its base and its update make of them: both, or
# their sum, ``[..., out]`` in the dtype of the activations.
Terms = Callable[..., list[mx.array]]


class LowRankLayer(nn.Module):
    """A frozen ``base``, the factors A and B of its update, and the merge of both.

    A is drawn uniformly from +-1/sqrt(inputs) and B is zero, so the update starts at zero. Both
    are float32; products run in the dtype of the activations, for which A and s B are rounded to
    that dtype (in 16 bits their gradients then have an error of 0.3 %, against 0.2 % of theirs
    with float32 copies of every activation).

    Args:
        base: The layer to adapt; kept and frozen.
        rank: Rank of the update.
        alpha: Strength of the update; ``scale = alpha / rank``.
        dropout: Probability of dropping an input of the low-rank path in training. As in PEFT's
            LoRA, it is the input of A that is dropped. PEFT's DoRA drops it in (m / n - 1) x W^T
            as well, which would cost a second product with W and is not done here.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self._add_parameters(base, rank)
        base.freeze()

    @classmethod
    def from_base(
        cls, base: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0
    ) -> "Self":
        """Wrap ``base``, which keeps its weights and is frozen."""
        return cls(base, rank, alpha, dropout)

    def merged_weight(self) -> mx.array:
        """The weight with the adapter in it: float32, shaped as W, computed in blocks of rows."""
        return mx.concatenate(list(self.merged_blocks())).reshape(weight_shape(self.base))

    def merged_blocks(self) -> Iterator[mx.array]:
        """The rows of ``merged_weight`` in order, a block ``[rows, width]`` of them at a time."""
        gain = self._merged_gain()
        for start, stop in row_blocks(self.base):
            rows = updated_rows(self.base, self._update(), slice(start, stop))
            if gain is not None:
                rows = gain[start:stop] * rows if gain.shape[1] == 1 else gain * rows
            mx.eval(rows)
            yield rows

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The plain layer that computes the same: mirror of ``from_base``.

        A quantized base gives a layer quantized the same way, which rounds the update, unless
        ``dequantize`` is set. A dense weight keeps the dtype of the base.
        """
        merged = self.merged_weight().astype(weight_dtype(self.base))
        return with_weight(self.base, merged, dequantize and is_quantized(self.base))

    def _extra_repr(self) -> str:
        shape = "x".join(map(str, weight_shape(self.base)))
        return f"{shape}, rank={self._update().a.shape[-1]}, scale={self.scale:g}"

    def _add_parameters(self, base: nn.Module, rank: int) -> None:
        """Set ``lora_a`` and ``lora_b``."""
        raise NotImplementedError

    def _update(self) -> Update:
        """The update of W as it is stored, ``[out, in]``."""
        return Update(self.lora_a, self.lora_b, self.scale)

    def _merged_gain(self) -> mx.array | None:
        """What the rows of the sum are multiplied by: ``[rows, 1]``, ``[1, in]``, or nothing."""
        return None

    def _combine(
        self,
        terms: Terms,
        inputs: tuple[mx.array, ...],
        bias: mx.array | None = None,
        experts: mx.array | None = None,
    ) -> mx.array:
        """The output of the layer for ``terms(*inputs)``; the rest is for ``dora_product``."""
        raise NotImplementedError


class LoRA(LowRankLayer):
    """``base + update``."""

    def _combine(
        self,
        terms: Terms,
        inputs: tuple[mx.array, ...],
        bias: mx.array | None = None,
        experts: mx.array | None = None,
    ) -> mx.array:
        return dear(lambda *inputs: reduce(mx.add, terms(*inputs)))(*inputs)


def uniform(inputs: int, shape: tuple[int, ...]) -> mx.array:
    """Values between +-1/sqrt(inputs)."""
    bound = inputs**-0.5
    return mx.random.uniform(-bound, bound, shape)
