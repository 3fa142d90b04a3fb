"""DoRA layers with an update, and whether a norm is that of their weights in float64."""

import mlx.core as mx
import numpy as np
from float64 import as64, dense64

from dora_mlx.kernels.frozen_weight import row_shape
from dora_mlx.layers import DoRAEmbedding


def is_right(layer, norm=None):
    """Whether a norm, or the one the layer gives, is that of the weights as they are now."""
    update = layer._update()
    change = as64(update.a) @ as64(update.b)
    total = dense64(layer.base) + layer.scale * change.swapaxes(-1, -2).reshape(
        row_shape(layer.base)
    )
    expected = np.linalg.norm(total, axis=0 if isinstance(layer, DoRAEmbedding) else 1)
    actual = as64(layer.norm() if norm is None else norm).reshape(-1)
    return np.allclose(actual, expected, rtol=1e-5)


def moved(layer, by=0.3):
    layer.lora_b = layer.lora_b + by * mx.random.normal(layer.lora_b.shape)
    return layer
