"""DoRA (arXiv 2402.09353): learn magnitude and direction of a frozen weight separately.

    y = m / ||W + s (A B)^T||_row * (x W^T + s (x A) B) + bias

W ``[out, in]`` frozen, maybe quantized; A ``[in, rank]``; B ``[rank, out]``; m ``[out]`` starts
as ``||W||_row``; s = alpha / rank. The norm runs over the input axis of each output row (the
paper's column norm in MLX's weight layout) and gets no gradient (section 4.3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.device import on_cpu, planning_for_gpu
from dora_mlx.kernels.gain_backward import (
    expert_gain_backward,
    gain_backward,
    magnitude_gradient,
)
from dora_mlx.kernels.recomputation import gradients_of, kept, together
from dora_mlx.kernels.row_norm import (
    AdaptedNorm,
    RowNorm,
    evaluate,
    may_cancel,
    safe_norms,
    same_values,
)
from dora_mlx.layers.lora import LowRankLayer, Terms


def dora_product(
    terms: Terms,
    inputs: tuple[mx.array, ...],
    magnitude: mx.array,
    norm: mx.array,
    bias: mx.array | None = None,
    experts: mx.array | None = None,
    forward: Terms | None = None,
    backward: Terms | None = None,
) -> mx.array:
    """``m / norm * (x W^T + s (x A) B)``: ``[..., out]`` in the dtype of the terms.

    Args:
        terms: Gives x W^T and s (x A) B, or their sum; linear in every input.
        inputs: What ``terms`` takes.
        magnitude: m ``[out]``, or ``[experts, out]``, float32.
        norm: ``||W + s (A B)^T||``, float32 and shaped as m; a constant here.
        bias: The bias ``[out]`` that ``terms`` contains, which is not to be scaled.
        experts: Which row of m each ``[1, out]`` of the output takes: indices ``[...]``.
        forward: Another way to what ``terms`` gives, for the forward alone; not kept after it.
        backward: Gives the terms times a gain ``[out]``, its last argument, where that costs less
            than a gain of all outputs; for the backward alone.

    Differentiable in the inputs and m. The sum and the gain are float32 and only y is rounded, so
    that a magnitude change of 0.1 % moves a bfloat16 output; rounded before the gain, it would
    round back to where it was. The backward needs the inputs and y, and nothing of the size of W:
    y is linear in m, hence dL/dm_j = sum_t d_tj y_tj / m_j.
    """
    forward = terms if forward is None else forward

    @mx.custom_function
    def product(magnitude: mx.array, *inputs: mx.array) -> mx.array:
        gain = _gain(magnitude, norm, experts)
        return kept(lambda: [_with_gain(forward(*inputs), gain, bias)])[0]

    @product.vjp
    def product_vjp(
        primals: tuple[mx.array, ...], cotangent: mx.array, y: mx.array
    ) -> tuple[mx.array, ...]:
        magnitude, *own_inputs = primals
        scaled, own_terms = y if bias is None else y - bias, terms
        constants: list[mx.array] = []
        if backward is not None:
            d_magnitude = magnitude_gradient(cotangent, scaled, magnitude)
            # After that y is needed no more, and what follows may have its memory.
            (d_direction,) = mx.depends([cotangent], [d_magnitude])
            own_terms, constants = backward, [_gain(magnitude, norm, experts)]
        elif experts is None:
            d_direction, d_magnitude = gain_backward(cotangent, scaled, magnitude, norm)
        else:
            d_direction, d_magnitude = expert_gain_backward(
                cotangent, scaled, magnitude, norm, experts
            )
        d_inputs = gradients_of(
            lambda *given: [_sum(own_terms(*given))], own_inputs, [d_direction], constants
        )
        return together([d_magnitude, *d_inputs])

    return cast(mx.array, product(magnitude, *inputs))


def _gain(magnitude: mx.array, norm: mx.array, experts: mx.array | None) -> mx.array:
    gain = magnitude / norm
    return gain if experts is None else gain[experts][..., None, :]


def _with_gain(terms: list[mx.array], gain: mx.array, bias: mx.array | None) -> mx.array:
    # Elementwise and in one pass where that needs no C++ compiler at run time.
    if planning_for_gpu():
        # A plan has the operations that are fused one by one, and these make no float32 arrays.
        return _sum(terms) * gain.astype(terms[0].dtype)
    apply = _apply_gain if on_cpu() else _fused_apply_gain
    return apply(terms, gain, bias)


def _apply_gain(terms: list[mx.array], gain: mx.array, bias: mx.array | None) -> mx.array:
    # In this order y gets the strides of what the base computes, and the layers that follow round
    # as they do after the base: MLX chooses a product by the strides even of an axis of length 1.
    y = _sum([term.astype(mx.float32) for term in terms]) * gain
    if bias is not None:
        # With a gain of 1 this adds zero, and y is what the base computes, bit for bit.
        y = y + (1 - gain) * bias
    return y.astype(terms[0].dtype)


_fused_apply_gain = mx.compile(_apply_gain)


def _sum(terms: list[mx.array]) -> mx.array:
    return reduce(mx.add, terms)


@dataclass
class _Block:
    """What a layer knows of the block of ``hoisted_norms`` that it is in.

    Attributes:
        has_values: Whether A and B had values at entry, which they have not in ``mx.compile``.
        usable: Whether a norm may serve several calls; not asked before the first.
    """

    has_values: bool
    usable: bool | None = None


class DoRA(LowRankLayer):
    """``m / norm * (base + update)``, with a parameter ``magnitude``.

    Before the first update the gain is exactly 1 and the layer equals its base bit for bit.
    Magnitude, norm and gain are float32.
    """

    norm_type: type[AdaptedNorm] = RowNorm

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__(base, rank, alpha, dropout)
        self._norm_of_base = self.norm_type(base)
        # Here and not in the block, so that they are in ``model.state``.
        self._hoisted_norm: mx.array | None = None
        self._hoisted_from: tuple[mx.array, ...] = ()
        self._block: _Block | None = None
        self.magnitude = self._norm_of_base.without_update()

    def norm(self) -> mx.array:
        """``||W + s (A B)^T||`` as it is now, or within ``hoisted_norms``."""
        known = self._known_norm()
        return self._keep(self._adapted_norm().of(self._update())) if known is None else known

    def _known_norm(self) -> mx.array | None:
        """The norm that the block of ``hoisted_norms`` has for this layer, if there is one.

        NaN where A, B or W turn out not to be those that it was computed from.
        """
        if self._block is None:
            return None
        if self._block.usable is None:
            # A compiled function takes A and B as arguments and may outlive the block: a norm
            # that is not an argument as well would be a constant in it. Asked at the first call
            # only, because in the backward of mx.checkpoint to evaluate A is to run the backward.
            self._block.usable = (
                evaluate(self.lora_a, self.lora_b)
                or not self._block.has_values
                or (self._hoisted_norm is not None and not evaluate(self._hoisted_norm))
            )
        if not self._block.usable or self._hoisted_norm is None:
            return None
        same = self._is_as_at_entry()
        return self._hoisted_norm if same is None else mx.where(same, self._hoisted_norm, mx.nan)

    def _is_as_at_entry(self) -> mx.array | None:
        """Whether A, B and W have the values that they had at entry; ``None`` is a plain yes."""
        before_a, before_b, *before_w = self._hoisted_from
        pairs = [(self.lora_a, before_a), (self.lora_b, before_b)]
        # A W that is another object is that of a gradient, or an argument of a compiled function.
        # The latter has no values.
        pairs += [
            (now, then)
            for now, then in zip(self._adapted_norm().sources(), before_w, strict=False)
            if now is not then and not evaluate(now)
        ]
        # To look at A would run what it hangs on, which in the backward of mx.checkpoint is all
        # of the forward, so the graph looks.
        same = [
            mx.array_equal(mx.stop_gradient(now), then, equal_nan=True)
            for now, then in pairs
            if now is not then
        ]
        return mx.stack(same).all() if same else None

    def _keep(self, norm: mx.array) -> mx.array:
        """``norm``, which further calls in the block will find."""
        if self._block is not None and self._block.usable:
            self._hoisted_norm = norm
        return norm

    def _combine(
        self,
        terms: Terms,
        inputs: tuple[mx.array, ...],
        bias: mx.array | None = None,
        experts: mx.array | None = None,
    ) -> mx.array:
        if self.training:
            return dora_product(terms, inputs, self.magnitude, self.norm(), bias, experts)
        # The same without what spares memory in a backward: a token at a time, it would be felt.
        gain = _gain(self.magnitude, self.norm(), experts)
        return _with_gain(terms(*inputs), gain, bias)

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
    """Within the block, every DoRA layer of ``model`` computes its norm once, at its first call.

    The norm depends on A, B and W only, so an optimizer step needs it once however many
    micro-batches it accumulates, and generation needs it once per answer. Outside of a block it
    is computed in every forward: there is nothing that could outlive the parameters.

    Compiled functions follow the parameters as well: they compute the norms themselves, unless
    they take the whole ``model.state`` and the norms with it. One that takes less and is traced
    after other calls in the block is refused by MLX, or gives NaN once the weights are others.

    Here, and only here, norms whose factored sum may cancel are computed at entry, directly where
    they do (``kernels/row_norm.py``).

    Raises:
        RuntimeError: At the end of the block, if A, B or W of a layer changed within it.
    """
    layers = [module for _, module in model.named_modules() if isinstance(module, DoRA)]
    before = [array for layer in layers for array in layer._state()]
    updates = [(layer._adapted_norm(), layer._update()) for layer in layers]
    at_risk = [i for i, risk in enumerate(may_cancel(updates)) if risk]
    norms = dict(zip(at_risk, safe_norms([updates[i] for i in at_risk]), strict=True))
    has_values = evaluate(*before)
    for i, layer in enumerate(layers):
        layer._block, layer._hoisted_norm = _Block(has_values), norms.get(i)
        layer._hoisted_from = tuple(layer._state())
    try:
        yield
    finally:
        for layer in layers:
            layer._block, layer._hoisted_norm, layer._hoisted_from = None, None, ()
    after = [array for layer in layers for array in layer._state()]
    # mx.grad leaves other objects of the same values behind, so identity alone is not enough.
    if same_values(before, after) is False:
        raise RuntimeError(
            "weights of a DoRA layer changed within hoisted_norms, where its norm did not follow; "
            "update them outside of the block"
        )
