"""Convolutions against float64 NumPy, forward and every gradient."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapted_layers import assert_all_close, assert_close, gradients, trained
from float64 import as64, dense64

from dora_mlx.layers import DoRAConv1d, DoRAConv2d, LoRAConv1d, LoRAConv2d

# kernel, stride, padding, dilation, groups, bias
CONVOLUTIONS_2D = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, True),
    ((3, 2), (2, 1), (0, 1), (1, 1), 1, False),
    ((2, 3), (1, 2), (2, 1), (2, 1), 1, True),
    ((3, 3), (1, 1), (1, 1), (1, 1), 3, True),
    ((3, 3), (2, 2), (1, 1), (1, 1), 6, False),
]
CONVOLUTIONS_1D = [(3, 1, 1, 1, 1, True), (4, 2, 0, 1, 1, False), (3, 1, 2, 2, 1, True)]
CONVOLUTIONS_1D += [(3, 1, 1, 1, 3, True), (3, 2, 1, 1, 6, False)]


def patches(x, kernel, stride, padding, dilation, groups):
    """``[batch, height, width, groups, in]``: what each output sees of ``x [batch, h, w, c]``."""
    x = np.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)))
    size = [(x.shape[1 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    seen = np.empty((len(x), *size, groups, *kernel, x.shape[3] // groups), x.dtype)
    for i, j in np.ndindex(*size):
        for p, q in np.ndindex(*kernel):
            place = x[:, i * stride[0] + p * dilation[0], j * stride[1] + q * dilation[1]]
            seen[:, i, j, :, p, q] = place.reshape(len(x), groups, -1)
    return seen.reshape(*seen.shape[:4], -1)


def assert_convolution_matches(layer, x, geometry):
    """All of a layer's outputs and gradients; ``x`` and ``geometry`` have two places."""
    base, groups = layer.base, layer.base.groups
    own_x = x if isinstance(base, nn.Conv2d) else x.squeeze(2)
    total = dense64(base) + layer.scale * (as64(layer.lora_a) @ as64(layer.lora_b)).T
    norm = np.linalg.norm(total, axis=1)
    gain = as64(layer.magnitude) / norm if "magnitude" in layer else np.ones(len(total))
    # Indices of the inputs take the same way as the inputs, which gives the way back.
    seen = patches(as64(x), *geometry)
    weights = total.reshape(groups, -1, total.shape[1])
    direction = np.einsum("bhwgi,goi->bhwgo", seen, weights).reshape(*seen.shape[:3], -1)
    y = layer(own_x)
    expected_y = gain * direction + (as64(base.bias) if "bias" in base else 0)
    assert_close(y, expected_y.reshape(y.shape), "y")

    d = mx.random.normal(y.shape)
    d64 = as64(d).reshape(direction.shape)
    scaled = (d64 * gain).reshape(*seen.shape[:4], -1)
    d_total = np.einsum("bhwgi,bhwgo->goi", seen, scaled).reshape(total.shape)
    d_seen = np.einsum("bhwgo,goi->bhwgi", scaled, weights)
    positions = np.arange(1, x.size + 1, dtype=np.float64).reshape(x.shape)
    positions = patches(positions, *geometry).astype(int)
    d_x = np.zeros(x.size + 1)
    np.add.at(d_x, positions, d_seen)
    expected = {
        "lora_a": layer.scale * d_total.T @ as64(layer.lora_b).T,
        "lora_b": layer.scale * as64(layer.lora_a).T @ d_total.T,
        "x": d_x[1:].reshape(own_x.shape),
    }
    if "magnitude" in layer:
        expected["magnitude"] = (d64 * direction).sum((0, 1, 2)) / norm
    actual = gradients(layer, lambda x: (layer(x) * d).sum(), own_x)
    assert_all_close(actual, expected)


@pytest.mark.parametrize("kind", [DoRAConv2d, LoRAConv2d])
@pytest.mark.parametrize("options", CONVOLUTIONS_2D)
def test_convolution_2d_matches_float64(kind, options):
    mx.random.seed(5)
    *geometry, bias = options
    base = nn.Conv2d(6, 12, *geometry, bias=bias)
    if bias:
        base.bias = mx.random.normal((12,))
    layer = trained(kind.from_base(base, rank=4, alpha=7.0))
    assert_convolution_matches(layer, mx.random.normal((2, 9, 8, 6)), geometry)


@pytest.mark.parametrize("kind", [DoRAConv1d, LoRAConv1d])
@pytest.mark.parametrize("options", CONVOLUTIONS_1D)
def test_convolution_1d_matches_float64(kind, options):
    mx.random.seed(6)
    *geometry, groups, bias = options
    base = nn.Conv1d(6, 12, *geometry, groups, bias=bias)
    if bias:
        base.bias = mx.random.normal((12,))
    layer = trained(kind.from_base(base, rank=4, alpha=7.0))
    flat = [(geometry[0], 1), (geometry[1], 1), (geometry[2], 0), (geometry[3], 1), groups]
    assert_convolution_matches(layer, mx.random.normal((2, 11, 1, 6)), flat)
