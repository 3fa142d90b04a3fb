"""LoRA and DoRA around ``nn.Linear`` and ``nn.QuantizedLinear``."""

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.frozen_product import (
    SharedReading,
    frozen_product,
    shares_reading,
    takes_gain,
)
from dora_mlx.kernels.frozen_weight import is_quantized, weight_shape
from dora_mlx.kernels.recomputation import product
from dora_mlx.layers.dora import DoRA, dora_product
from dora_mlx.layers.lora import LoRA, LowRankLayer, Terms, uniform


class _AdaptedLinear(LowRankLayer):
    def _add_parameters(self, base: nn.Module, rank: int) -> None:
        out, width = weight_shape(base)
        self.lora_a = uniform(width, (width, rank))
        self.lora_b = mx.zeros((rank, out))

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in] -> [..., out]`` in the dtype of ``x``."""
        dropped = self.dropout(x)
        low_rank, same = product(dropped, self.lora_a.astype(x.dtype))
        x = same if dropped is x else x
        bias = self.base.get("bias")
        if bias is not None and not is_quantized(self.base):
            # nn.Linear adds its bias inside of the product, which rounds differently.
            return self._combine(self._terms_with_bias, (x, low_rank, self.lora_b), bias)
        y = self._combine(self._terms, (x, low_rank, self.lora_b))
        return y if bias is None else y + bias

    def _terms(self, x: mx.array, low_rank: mx.array, lora_b: mx.array) -> list[mx.array]:
        return self._with_update(frozen_product(x, self.base), low_rank, lora_b)

    def _terms_with_bias(self, x: mx.array, low_rank: mx.array, lora_b: mx.array) -> list[mx.array]:
        weight, bias = mx.stop_gradient(self.base.weight), mx.stop_gradient(self.base.bias)
        return self._with_update(mx.addmm(bias, x, weight.T), low_rank, lora_b)

    def _with_update(
        self, frozen: mx.array, low_rank: mx.array, lora_b: mx.array
    ) -> list[mx.array]:
        """``frozen`` and ``s (x A) B`` of x A."""
        mixing = (self.scale * lora_b).astype(low_rank.dtype)
        if frozen.dtype == mx.float32:
            # Added in place. In 16 bits this would round the sum before the gain.
            return [mx.addmm(frozen, low_rank, mixing)]
        return [frozen, low_rank @ mixing]


class LoRALinear(LoRA, _AdaptedLinear):
    """LoRA around a linear layer.

    Parameters: ``lora_a [in, rank]`` and ``lora_b [rank, out]``, float32.
    """


class DoRALinear(DoRA, _AdaptedLinear):
    """DoRA around a linear layer.

    Parameters: ``lora_a [in, rank]``, ``lora_b [rank, out]`` and ``magnitude [out]``, float32.
    """

    def _combine(
        self,
        terms: Terms,
        inputs: tuple[mx.array, ...],
        bias: mx.array | None = None,
        experts: mx.array | None = None,
    ) -> mx.array:
        norm, forward = self._known_norm(), None
        if not shares_reading(inputs[0], self.base) or (norm is not None and not self.training):
            return super()._combine(terms, inputs, bias, experts)
        if norm is None:
            norm, forward = self._norm_and_forward(inputs[0])
        backward = self._terms_with_gain if takes_gain(inputs[0], self.base) else None
        return dora_product(terms, inputs, self.magnitude, norm, forward=forward, backward=backward)

    def _norm_and_forward(self, x: mx.array) -> tuple[mx.array, Terms]:
        """The norm and, from the same reading of W, the terms of ``x``."""
        update = self._update().constant()
        reading = SharedReading(self.base, update.a)
        norm = self._keep(self._adapted_norm().factored(update, reading.constant_product.T))

        def forward(x: mx.array, low_rank: mx.array, lora_b: mx.array) -> list[mx.array]:
            return self._with_update(reading.product(x), low_rank, lora_b)

        return norm, forward

    def _terms_with_gain(
        self, x: mx.array, low_rank: mx.array, lora_b: mx.array, gain: mx.array
    ) -> list[mx.array]:
        """The terms times ``gain``, which is multiplied into W and B."""
        return self._with_update(frozen_product(x, self.base, gain), low_rank, gain * lora_b)
