"""Arrays and weights as NumPy's float64, which tests compute their expectations in."""

import mlx.core as mx
import numpy as np

from dora_mlx.kernels.frozen_weight import row_shape, weight_rows


def as64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def dense64(base):
    """The weight of a layer as a list of rows, dequantized."""
    return as64(weight_rows(base, 0, row_shape(base)[0], mx.float32))
