"""LoRA (arXiv 2106.09685): a low-rank update beside a frozen weight.

    y = x W^T + s (x A) B + bias

W ``[out, in]`` frozen, maybe quantized; A ``[in, rank]``; B ``[rank, out]``; s = alpha / rank.
"""

import math
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.frozen_product import (
    is_quantized,
    row_blocks,
    weight_dtype,
    weight_rows,
    weight_shape,
)

if TYPE_CHECKING:
    from typing_extensions import Self


class LowRankLinear(nn.Module):
    """What LoRA and DoRA share: a frozen ``base``, A, B, the scale and the merge.

    A is drawn uniformly from +-1/sqrt(in) and B is zero, so the update starts at zero. Both are
    float32; products run in the dtype of the activations.

    Args:
        base: ``nn.Linear`` or ``nn.QuantizedLinear``; kept and frozen.
        rank: Rank of the update.
        alpha: Strength of the update; ``scale = alpha / rank``.
        dropout: Probability of dropping an input of the low-rank path in training.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        out, width = weight_shape(base)
        self.base = base
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        bound = 1 / math.sqrt(width)
        self.lora_a = mx.random.uniform(-bound, bound, (width, rank))
        self.lora_b = mx.zeros((rank, out))
        base.freeze()

    @classmethod
    def from_base(
        cls, linear: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0
    ) -> "Self":
        """Wrap ``linear``, which keeps its weights and is frozen."""
        return cls(linear, rank, alpha, dropout)

    def _extra_repr(self) -> str:
        width, rank = self.lora_a.shape
        return f"input_dims={width}, output_dims={self.lora_b.shape[1]}, rank={rank}"

    def _low_rank_input(self, x: mx.array) -> mx.array:
        """``x A``: ``[..., in] -> [..., rank]``."""
        return self.dropout(x) @ self.lora_a.astype(x.dtype)

    def _updated_rows(self, start: int, stop: int) -> mx.array:
        """Rows of W + s (A B)^T in float32: ``[stop - start, in]``."""
        update = self.lora_b[:, start:stop].T @ self.lora_a.T
        return weight_rows(self.base, start, stop, mx.float32) + self.scale * update

    def _merged_rows(self, start: int, stop: int) -> mx.array:
        return self._updated_rows(start, stop)

    def merged_weight(self) -> mx.array:
        """The weight with the adapter in it: ``[out, in]`` float32, computed in blocks of rows."""
        blocks = []
        for start, stop in row_blocks(self.base):
            blocks.append(self._merged_rows(start, stop))
            mx.eval(blocks[-1])
        return mx.concatenate(blocks)

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The plain layer that computes the same: mirror of ``from_base``.

        A quantized base gives a layer quantized the same way, which rounds the update, unless
        ``dequantize`` is set. A dense weight keeps the dtype of the base.
        """
        base = self.base
        out, width = weight_shape(base)
        fused = nn.Linear(width, out, bias=False)
        quantized = is_quantized(base)
        fused.weight = self.merged_weight().astype(weight_dtype(base))
        if "bias" in base:
            fused.bias = base.bias
        if quantized and not dequantize:
            fused = nn.QuantizedLinear.from_linear(fused, base.group_size, base.bits, base.mode)
        return fused


class LoRALinear(LowRankLinear):
    """LoRA around a linear layer; parameters ``lora_a [in, rank]`` and ``lora_b [rank, out]``."""

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in] -> [..., out]`` in the dtype of ``x``."""
        update = self._low_rank_input(x) @ self.lora_b.astype(x.dtype)
        return self.base(x) + self.scale * update
