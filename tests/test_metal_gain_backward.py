"""The gain's backward kernel: its source on the host against float64, and on a GPU if any."""

import sys
from collections.abc import Callable
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from metal_host.cases import GAIN_SHAPES, GAIN_TYPES, gain_arguments
from metal_host.exact import to_float64
from metal_host.host_kernel import HostKernel, shared_compiler

from dora_mlx.kernels import gain_backward as module

on_host = pytest.mark.skipif(
    sys.platform != "linux", reason="the host program is for Linux; a Mac runs the kernel itself"
)
on_metal = pytest.mark.skipif(
    not mx.metal.is_available(), reason="no Metal here: the kernel itself did not run"
)

# Relative to sum |d y| / |m|: float32 sums on three levels, of at most eight terms but the last.
BOUND = 4e-7

Gradients = tuple[mx.array, mx.array]


def on_the_host(patch: pytest.MonkeyPatch, **options: object) -> None:
    """Let the calls of the kernel run on the host."""
    real = module._kernel
    patch.setattr(module, "_kernel", lambda: HostKernel(real(), shared_compiler(), **options))


def check(gradients: Gradients, arrays: tuple[mx.array, ...]) -> None:
    """dL/dh to one rounding; dL/dm to ``BOUND``, and zero where the magnitude is."""
    d_direction, d_magnitude = gradients
    assert d_direction.dtype == arrays[0].dtype
    assert d_direction.shape == arrays[0].shape
    assert d_magnitude.dtype == mx.float32
    cotangent, y, magnitude, norm = map(to_float64, arrays)
    relative = {mx.float32: 2.0**-22, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
    exact = magnitude / norm * cotangent
    np.testing.assert_allclose(
        # The smallest half numbers keep fewer digits.
        to_float64(d_direction),
        exact,
        rtol=relative[arrays[0].dtype],
        atol=1e-7,
    )
    products = (cotangent * y).reshape(-1, y.shape[-1])
    safe = np.where(magnitude == 0, np.inf, magnitude)
    error = np.abs(to_float64(d_magnitude) - products.sum(axis=0) / safe)
    assert np.all(error <= BOUND * np.abs(products).sum(axis=0) / safe)


@pytest.mark.parametrize(("shape", "dtype"), list(product(GAIN_SHAPES, GAIN_TYPES)), ids=str)
def test_reference_against_float64(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    arrays = gain_arguments(shape, dtype)
    check(module.reference_gain_backward(*arrays), arrays)


# Guards the op that layers call in their backward: this is the gradient of the formula itself.
def test_reference_is_the_gradient_of_the_formula() -> None:
    cotangent, direction, magnitude, norm = gain_arguments((9, 21), mx.float32)
    magnitude += 1

    def forward(direction: mx.array, magnitude: mx.array) -> mx.array:
        return magnitude / norm * direction

    _, expected = mx.vjp(forward, [direction, magnitude], [cotangent])
    y = forward(direction, magnitude)
    for ours, theirs in zip(
        module.reference_gain_backward(cotangent, y, magnitude, norm), expected, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# Guards partly filled blocks and tiles, every type, and buffers' bounds at both ends.
@on_host
@pytest.mark.parametrize(("shape", "dtype"), list(product(GAIN_SHAPES, GAIN_TYPES)), ids=str)
def test_kernel_on_the_host_against_float64(
    shape: tuple[int, ...], dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = gain_arguments(shape, dtype)
    results = []
    for seed, at_end in ((0, True), (3, False)):
        with monkeypatch.context() as patch:
            on_the_host(patch, seed=seed, at_end=at_end)
            results.append(module.metal_gain_backward(*arrays))
    check(results[0], arrays)
    for first, second in zip(*results, strict=True):
        assert mx.array_equal(first, second)
    # The gradient that goes on into the network is the same, bit for bit, on either path.
    assert mx.array_equal(results[0][0], module.reference_gain_backward(*arrays)[0])


@on_host
def test_the_op_takes_the_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = gain_arguments((6, 10), mx.float32)
    on_the_host(monkeypatch)
    monkeypatch.setattr(module, "kernel_serves", lambda *arrays: True)
    monkeypatch.setattr(module, "reference_gain_backward", None)
    check(module.gain_backward(*arrays), arrays)


@pytest.mark.metal
@on_metal
@pytest.mark.parametrize("name", ["metal_gain_backward", "gain_backward"])
def test_kernel_on_metal_against_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "reference_gain_backward", None)
    gain_backward: Callable[..., Gradients] = getattr(module, name)
    for shape, dtype in product(GAIN_SHAPES, GAIN_TYPES):
        arrays = gain_arguments(shape, dtype)
        with mx.stream(mx.gpu):
            gradients = gain_backward(*arrays)
            mx.eval(*gradients)
        check(gradients, arrays)
