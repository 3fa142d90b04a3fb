"""DoRA (arXiv 2402.09353): learn magnitude and direction of a frozen weight separately.

    y = m / ||W + s (A B)^T||_row * (x W^T + s (x A) B) + bias

W ``[out, in]`` frozen, maybe quantized; A ``[in, rank]``; B ``[rank, out]``; m ``[out]`` starts
as ``||W||_row``; s = alpha / rank. The norm runs over the input axis of each output row (the
paper's column norm in MLX's weight layout) and gets no gradient (section 4.3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.frozen_product import frozen_product, frozen_product_transposed
from dora_mlx.kernels.row_norm import adapted_row_norm, row_square_sums
from dora_mlx.layers.lora import LowRankLinear


def dora_product(
    x: mx.array,
    low_rank: mx.array,
    lora_b: mx.array,
    magnitude: mx.array,
    norm: mx.array,
    scale: float,
    base: nn.Module,
) -> mx.array:
    """``m / norm * (x W^T + s low_rank B)``, without the bias: ``[..., out]`` of x's dtype.

    Args:
        x: ``[..., in]``.
        low_rank: ``x A``, ``[..., rank]``.
        lora_b: B ``[rank, out]``.
        magnitude: m ``[out]`` float32.
        norm: ``||W + s (A B)^T||_row`` ``[out]`` float32, a constant here.
        scale: s.
        base: The frozen layer that holds W.

    Differentiable in the first four. The low-rank product, its sum with the base product and the
    gain m / norm are float32 and only y is rounded, so a magnitude change of 0.1 % moves a
    bfloat16 output; rounded before the gain, it would round back to where it was. The backward keeps x, ``low_rank`` and the output and
    nothing of the size of W: the output is linear in m, hence dL/dm_j = sum_t d_tj y_tj / m_j.
    """

    @mx.custom_function
    def product(x: mx.array, low_rank: mx.array, lora_b: mx.array, magnitude: mx.array) -> mx.array:
        direction = frozen_product(x, base) + low_rank.astype(mx.float32) @ (scale * lora_b)
        return ((magnitude / norm) * direction).astype(x.dtype)

    @product.vjp
    def product_vjp(
        primals: tuple[mx.array, ...], cotangent: mx.array, y: mx.array
    ) -> tuple[mx.array, ...]:
        x, low_rank, lora_b, magnitude = primals
        rows = -1, y.shape[-1]
        # A row of zeros has m = 0 and y = 0: its magnitude gets no gradient instead of NaN.
        per_magnitude = mx.where(magnitude == 0, 0, 1 / magnitude)
        products = cotangent.astype(mx.float32) * y.astype(mx.float32)
        d_magnitude = products.reshape(rows).sum(axis=0) * per_magnitude
        d = ((magnitude / norm) * cotangent).astype(x.dtype)
        d_low_rank = d @ (scale * lora_b).astype(x.dtype).T
        d_lora_b = scale * (low_rank.reshape(-1, low_rank.shape[-1]).T @ d.reshape(rows))
        return (
            frozen_product_transposed(d, base),
            d_low_rank,
            d_lora_b.astype(lora_b.dtype),
            d_magnitude,
        )

    return cast(mx.array, product(x, low_rank, lora_b, magnitude))


class DoRALinear(LowRankLinear):
    """DoRA around a linear layer.

    Parameters: ``lora_a [in, rank]``, ``lora_b [rank, out]``, ``magnitude [out]``, all float32.
    Before the first update the gain is exactly 1 and the layer equals its base bit for bit.
    The bias is not scaled.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__(base, rank, alpha, dropout)
        self._square_sums = row_square_sums(base)
        self._hoisted_norm: mx.array | None = None
        self.magnitude = mx.sqrt(self._square_sums)

    def row_norm(self) -> mx.array:
        """``||W + s (A B)^T||_row`` for the parameters as they are now: ``[out]`` float32."""
        return adapted_row_norm(self._square_sums, self.base, self.lora_a, self.lora_b, self.scale)

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in] -> [..., out]`` in the dtype of ``x``."""
        norm = self.row_norm() if self._hoisted_norm is None else self._hoisted_norm
        y = dora_product(
            x,
            self._low_rank_input(x),
            self.lora_b,
            self.magnitude,
            norm,
            self.scale,
            self.base,
        )
        return y + self.base.bias if "bias" in self.base else y

    def _merged_rows(self, start: int, stop: int) -> mx.array:
        rows = self._updated_rows(start, stop)
        norm = mx.linalg.norm(rows, axis=1)
        # A row of zeros stays zero, whatever its magnitude.
        gain = self.magnitude[start:stop] / mx.where(norm == 0, 1, norm)
        return gain[:, None] * rows


@contextmanager
def hoisted_norms(model: nn.Module) -> Iterator[None]:
    """Within the block, every DoRA layer of ``model`` uses the norm it has at entry.

    The norm depends on A and B only, so an optimizer step needs it once however many
    micro-batches it accumulates, and generation needs it once per answer. Outside of a block it
    is computed in every forward: it cannot outlive the parameters that it belongs to, provided
    the block does not update them.
    """
    layers = [module for _, module in model.named_modules() if isinstance(module, DoRALinear)]
    for layer in layers:
        layer._hoisted_norm = layer.row_norm()
    try:
        yield
    finally:
        for layer in layers:
            layer._hoisted_norm = None
