"""Layers as a training leaves them, their gradients, and how near they are to float64."""

import mlx.core as mx
import numpy as np
from float64 import as64
from mlx.utils import tree_flatten


def assert_close(actual, expected, name="", tolerance=1e-5):
    error = np.abs(as64(actual).reshape(expected.shape) - expected).max()
    assert error <= tolerance * np.abs(expected).max(), f"{name}: {error}"


def trained(layer):
    layer.lora_b = 0.3 * mx.random.normal(layer.lora_b.shape)
    layer.lora_a = 0.3 * mx.random.normal(layer.lora_a.shape)
    if "magnitude" in layer:
        layer.magnitude = layer.magnitude * mx.random.uniform(0.7, 1.4, layer.magnitude.shape)
    return layer


def gradients(layer, objective, x=None):
    """Gradients of ``objective(x)`` by parameter name, and of ``x``."""

    def loss(parameters, x):
        layer.update(parameters)
        return objective(x)

    parameters = layer.trainable_parameters()
    if x is None:
        found = mx.grad(lambda parameters: loss(parameters, None))(parameters)
    else:
        found, found["x"] = mx.grad(loss, argnums=(0, 1))(parameters, x)
    layer.update(parameters)
    return dict(tree_flatten(found))


def assert_all_close(actual, expected, tolerance=1e-5):
    assert set(actual) == set(expected)
    for name in expected:
        assert_close(actual[name], expected[name], name, tolerance)
