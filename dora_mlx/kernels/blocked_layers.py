"""MLX's quantized layers with the products of ``frozen_product.py``, for the CPU."""

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.frozen_product import frozen_product


class _BlockedProduct:
    """Mixin for MLX's quantized layers: the same parameters, another product."""

    def __call__(self, x: mx.array) -> mx.array:
        y = frozen_product(x, self)  # type: ignore[arg-type]
        return y + self["bias"] if "bias" in self else y  # type: ignore[operator,index]


class BlockedQuantizedLinear(_BlockedProduct, nn.QuantizedLinear):
    """``nn.QuantizedLinear`` that multiplies with ``frozen_product``."""


class BlockedQuantizedEmbedding(nn.QuantizedEmbedding):
    """``nn.QuantizedEmbedding`` whose ``as_linear`` multiplies with ``frozen_product``."""

    def as_linear(self, x: mx.array) -> mx.array:
        """``x W^T``: ``[..., dims] -> [..., num_embeddings]``."""
        return frozen_product(x, self)


def use_blocked_products(model: nn.Module) -> None:
    """Give every quantized layer of ``model`` the products of ``frozen_product.py``, in place.

    Called once after loading on the CPU backend. Parameters, names and types as seen by
    ``isinstance`` stay what they were, and base and adapted model keep using the same product.
    """
    for _, module in model.named_modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = BlockedQuantizedLinear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = BlockedQuantizedEmbedding
