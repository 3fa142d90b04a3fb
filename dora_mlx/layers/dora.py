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

from dora_mlx.kernels.frozen_product import on_cpu
from dora_mlx.kernels.row_norm import AdaptedNorm, RowNorm, evaluate, safe_norms
from dora_mlx.layers.lora import LowRankLayer, Terms


def dora_product(
    terms: Terms,
    inputs: tuple[mx.array, ...],
    magnitude: mx.array,
    norm: mx.array,
    bias: mx.array | None = None,
    experts: mx.array | None = None,
) -> mx.array:
    """``m / norm * (frozen + update)``: ``[..., out]`` in the dtype of ``frozen``.

    Args:
        terms: Gives ``frozen`` (x W^T) and ``update`` (s (x A) B), each linear in every input.
        inputs: What ``terms`` takes.
        magnitude: m ``[out]``, or ``[experts, out]``, float32.
        norm: ``||W + s (A B)^T||``, float32 and shaped as m; a constant here.
        bias: The bias ``[out]`` that ``frozen`` contains, which is not to be scaled.
        experts: Which row of m each ``[1, out]`` of the output takes, ``[...]``.

    Differentiable in the inputs and m. The sum and the gain are float32 and only y is rounded, so
    that a magnitude change of 0.1 % moves a bfloat16 output; rounded before the gain, it would
    round back to where it was. The backward keeps the inputs and y, and nothing of the size of W:
    y is linear in m, hence dL/dm_j = sum_t d_tj y_tj / m_j.
    """

    def gain_of(magnitude: mx.array) -> mx.array:
        gain = magnitude / norm
        return gain if experts is None else gain[experts][..., None, :]

    @mx.custom_function
    def product(magnitude: mx.array, *inputs: mx.array) -> mx.array:
        # Elementwise and in one pass where that needs no C++ compiler at run time.
        apply = _apply_gain if on_cpu() else _fused_apply_gain
        return apply(*terms(*inputs), gain_of(magnitude), bias)

    @product.vjp
    def product_vjp(
        primals: tuple[mx.array, ...], cotangent: mx.array, y: mx.array
    ) -> tuple[mx.array, ...]:
        magnitude, *own_inputs = primals
        scaled = y if bias is None else y - bias
        products = cotangent.astype(mx.float32) * scaled.astype(mx.float32)
        products = products.reshape(-1, y.shape[-1])
        if experts is None:
            sums = products.sum(axis=0)
        else:
            sums = mx.zeros(magnitude.shape).at[experts.flatten()].add(products)
        # A row of zeros may have m = 0, and then y = 0: no gradient instead of NaN.
        d_magnitude = mx.where(magnitude == 0, 0, sums / mx.where(magnitude == 0, 1, magnitude))
        # After that y is needed no more, and the products below may have its memory.
        (cotangent,) = mx.depends([cotangent], [d_magnitude])
        d_direction = (gain_of(magnitude) * cotangent).astype(cotangent.dtype)
        _, d_inputs = mx.vjp(terms, own_inputs, [d_direction, d_direction])
        return d_magnitude, *d_inputs

    return cast(mx.array, product(magnitude, *inputs))


def _apply_gain(
    frozen: mx.array, update: mx.array, gain: mx.array, bias: mx.array | None
) -> mx.array:
    # In this order y gets the strides of what the base computes, and the layers that follow round
    # as they do after the base: MLX chooses a product by the strides even of an axis of length 1.
    y = (frozen.astype(mx.float32) + update.astype(mx.float32)) * gain
    if bias is not None:
        # With a gain of 1 this adds zero, and y is what the base computes, bit for bit.
        y = y + (1 - gain) * bias
    return y.astype(frozen.dtype)


_fused_apply_gain = mx.compile(_apply_gain)


class DoRA(LowRankLayer):
    """``m / norm * (base + update)``, with a parameter ``magnitude``.

    Before the first update the gain is exactly 1 and the layer equals its base bit for bit.
    Magnitude, norm and gain are float32.
    """

    norm_type: type[AdaptedNorm] = RowNorm

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__(base, rank, alpha, dropout)
        self._norm_of_base = self.norm_type(base)
        self._hoisted_norm: mx.array | None = None
        self._can_hoist: bool | None = None
        self.magnitude = self._norm_of_base.without_update()

    def norm(self) -> mx.array:
        """``||W + s (A B)^T||`` as it is now, or as it was at the start of ``hoisted_norms``."""
        hoisted = self._hoisted_norm
        if hoisted is not None and self._can_hoist is None:
            # A compiled function takes A and B as arguments and may outlive the block: a norm
            # that is not an argument as well would be a constant in it. Asked at the first call
            # only, because in the backward of mx.checkpoint to evaluate A is to run the backward.
            self._can_hoist = evaluate(self.lora_a, self.lora_b) or not evaluate(hoisted)
        if hoisted is None or not self._can_hoist:
            return self._adapted_norm().factored(self._update())
        return hoisted

    def _combine(
        self,
        terms: Terms,
        inputs: tuple[mx.array, ...],
        bias: mx.array | None = None,
        experts: mx.array | None = None,
    ) -> mx.array:
        return dora_product(terms, inputs, self.magnitude, self.norm(), bias, experts)

    def _merged_gain(self) -> mx.array | None:
        (norm,) = safe_norms([(self._adapted_norm(), self._update())])
        return (self.magnitude / norm).reshape(-1, 1)

    def _adapted_norm(self) -> AdaptedNorm:
        if self._norm_of_base.base is not self.base:
            # Quantizing a model replaces its layers, and base is one.
            self._norm_of_base = self.norm_type(self.base)
        return self._norm_of_base

    def _state(self) -> list[mx.array]:
        """What the norm depends on."""
        return [self.lora_a, self.lora_b, *self._adapted_norm().sources()]


@contextmanager
def hoisted_norms(model: nn.Module) -> Iterator[None]:
    """Within the block, every DoRA layer of ``model`` uses the norm it has at entry.

    The norm depends on A, B and W only, so an optimizer step needs it once however many
    micro-batches it accumulates, and generation needs it once per answer. Outside of a block it
    is computed in every forward: there is nothing that could outlive the parameters.

    Compiled functions follow the parameters as well: one that takes the whole ``model.state``
    takes the norms with it, and one that takes parameters only, and is traced before other calls
    in the block, computes the norms itself.

    Here, and only here, norms whose factored sum cancels are computed directly
    (``kernels/row_norm.py``).

    Raises:
        RuntimeError: At the end of the block, if A, B or W of a layer changed within it.
    """
    layers = [module for _, module in model.named_modules() if isinstance(module, DoRA)]
    before = [array for layer in layers for array in layer._state()]
    norms = safe_norms([(layer._adapted_norm(), layer._update()) for layer in layers])
    for layer, norm in zip(layers, norms, strict=True):
        layer._hoisted_norm, layer._can_hoist = norm, None
    try:
        yield
    finally:
        for layer in layers:
            layer._hoisted_norm = None
    after = [array for layer in layers for array in layer._state()]
    if not _equal(before, after):
        raise RuntimeError(
            "weights of a DoRA layer changed within hoisted_norms, where its norm did not follow; "
            "update them outside of the block"
        )


def _equal(before: list[mx.array], after: list[mx.array]) -> bool:
    """Whether arrays have the same values; true where they have none yet, as in ``mx.compile``."""
    # mx.grad leaves other objects of the same values behind, so identity alone is not enough.
    if len(before) != len(after):
        return False
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if x is not y]
    if not pairs:
        return True
    equal = mx.stack([mx.array_equal(x, y, equal_nan=True) for x, y in pairs]).all()
    return not evaluate(equal) or bool(equal.item())
