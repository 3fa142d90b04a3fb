"""Layers that run the Metal kernels: here compiled for the host, on a Mac the kernels themselves.

The host stands in for the device: what a layer gives a kernel, and what it makes of the result,
is what it is on a Mac.
"""

import logging
import sys
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from float64 import as64
from metal_host.host_kernel import HostKernel, shared_compiler
from mlx_lm.models.switch_layers import SwitchLinear

from dora_mlx.kernels import (
    frozen_product,
    frozen_weight,
    gain_backward,
    metal_dispatch,
    packed_row_norm,
)
from dora_mlx.kernels.frozen_weight import row_shape, weight_rows
from dora_mlx.layers import DoRALinear, DoRASwitchLinear, dora, hoisted_norms

on_host = pytest.mark.skipif(
    sys.platform != "linux", reason="the host program is for Linux; a Mac runs the kernel itself"
)
on_metal = pytest.mark.skipif(
    not mx.metal.is_available(), reason="no Metal here: the kernel itself did not run"
)


MODULES = {"packed_row_norm": packed_row_norm, "gain_backward": gain_backward}


@pytest.fixture
def launches(monkeypatch):
    """The host as a GPU; the names of the kernels that ran."""
    names = []
    monkeypatch.setattr(metal_dispatch, "use_metal", lambda: True)
    monkeypatch.setattr(metal_dispatch, "_verdicts", {})
    for module in (frozen_product, frozen_weight, dora):
        monkeypatch.setattr(module, "on_cpu", lambda: False)
    for name, module in MODULES.items():

        def on_the_host(*mode, real=module._kernel, name=name):
            names.append(name)
            return HostKernel(real(*mode), shared_compiler())

        monkeypatch.setattr(module, "_kernel", on_the_host)
    return names


def trained(layer):
    mx.random.seed(3)
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    layer.magnitude = layer.magnitude * mx.random.uniform(0.7, 1.4, layer.magnitude.shape)
    return layer


def linear(bits=None, bias=True, dtype=mx.float32, mode="affine"):
    mx.random.seed(1)
    base = nn.Linear(160, 37, bias=bias)
    if bias:
        base.bias = mx.random.normal((37,))
    base.set_dtype(dtype)
    return base.to_quantized(32, bits, mode) if bits else base


BASES = [
    pytest.param(lambda: linear(), 1, id="dense-bias"),
    pytest.param(lambda: linear(4), 2, id="affine-4-bias"),
    pytest.param(lambda: linear(3, bias=False), 2, id="affine-3"),
    pytest.param(lambda: linear(8, mode="mxfp8"), 2, id="mxfp8"),
]


def value_and_gradients(layer, *inputs):
    """Output and gradients of ``sum(d * y)`` for a fixed d."""
    d = mx.cos(mx.arange(layer(*inputs).size, dtype=mx.float32)).reshape(layer(*inputs).shape)

    def objective(parameters, x):
        layer.update(parameters)
        y = layer(x, *inputs[1:])
        return (y.astype(mx.float32) * d).sum(), y

    parameters = {name: layer[name] for name in ("lora_a", "lora_b", "magnitude")}
    (_, y), (gradients, d_x) = mx.value_and_grad(objective, argnums=(0, 1))(parameters, inputs[0])
    layer.update(parameters)
    return {"y": y, "x": d_x, **gradients}


def formula(layer, x):
    """Output of the layer in float64."""
    base = layer.base
    weight = as64(weight_rows(base, 0, row_shape(base)[0], mx.float32))
    change = layer.scale * (as64(layer.lora_a) @ as64(layer.lora_b)).T
    gain = as64(layer.magnitude) / np.linalg.norm(weight + change, axis=1)
    bias = as64(base.bias) if "bias" in base else 0
    return gain * (as64(x) @ (weight + change).T) + bias


# Guards a kernel that gets another argument than it is tested with, or a result used wrongly.
@on_host
@pytest.mark.parametrize(("make_base", "kernels"), BASES)
@pytest.mark.parametrize("hoist", [False, True])
def test_a_layer_through_the_kernels_computes_the_formula(
    make_base, kernels, hoist, launches, monkeypatch
):
    layer = trained(DoRALinear.from_base(make_base(), rank=5))
    x = mx.random.normal((3, 11, 160))
    with hoisted_norms(layer) if hoist else nullcontext():
        found = value_and_gradients(layer, x)
    assert len(set(launches)) == kernels
    np.testing.assert_allclose(as64(found["y"]), formula(layer, x), rtol=1e-5, atol=2e-5)
    monkeypatch.setattr(metal_dispatch, "use_metal", lambda: False)
    expected = value_and_gradients(layer, x)
    assert set(found) == {"y", "x", "lora_a", "lora_b", "magnitude"}
    for name, gradient in expected.items():
        size = np.abs(as64(gradient)).max()
        np.testing.assert_allclose(as64(found[name]), as64(gradient), atol=1e-5 * size)


@on_host
@pytest.mark.parametrize("bits", [None, 4])
def test_experts_through_the_kernels_compute_what_they_do_without(bits, launches, monkeypatch):
    mx.random.seed(1)
    base = SwitchLinear(64, 33, 3)
    base = base.to_quantized(32, bits) if bits else base
    layer = trained(DoRASwitchLinear.from_base(base, rank=3))
    inputs = mx.random.normal((5, 1, 64)), mx.array([2, 0, 0, 1, 2])
    found = value_and_gradients(layer, *inputs)
    assert ("packed_row_norm" in launches) == bool(bits)
    monkeypatch.setattr(metal_dispatch, "use_metal", lambda: False)
    for name, gradient in value_and_gradients(layer, *inputs).items():
        size = np.abs(as64(gradient)).max()
        np.testing.assert_allclose(as64(found[name]), as64(gradient), atol=1e-5 * size)


@on_host
@pytest.mark.parametrize("make_base", [param.values[0] for param in BASES])
def test_a_fresh_layer_through_the_kernels_equals_its_base_bit_for_bit(make_base, launches):
    layer = DoRALinear.from_base(make_base())
    x = mx.random.normal((5, 160))
    assert mx.array_equal(layer(x), layer.base(x))
    with hoisted_norms(layer):
        assert mx.array_equal(layer(x), layer.base(x))


# Guards 0 / 0: the kernel gives a row of zeros the norm 0.
@on_host
def test_a_row_of_zeros_through_the_kernels_is_finite(launches):
    base = linear(4, bias=False)
    base.scales[2] = 0
    base.biases[2] = 0
    layer = DoRALinear.from_base(base)
    found = value_and_gradients(layer, mx.random.normal((4, 160)))
    assert all(mx.isfinite(array).all().item() for array in found.values())
    assert not found["y"][:, 2].any()


@on_host
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_small_magnitude_change_moves_a_half_precision_output(dtype, launches):
    layer = trained(DoRALinear.from_base(linear(4, bias=False, dtype=dtype)))
    x = mx.random.normal((256, 160)).astype(dtype)
    before = as64(layer(x))
    layer.magnitude = 1.001 * layer.magnitude
    growth = np.abs(as64(layer(x))).sum() / np.abs(before).sum()
    assert layer(x).dtype == dtype
    assert growth == pytest.approx(1.001, abs=3e-4)
    assert value_and_gradients(layer, x)["x"].dtype == dtype


# The trials.

TRIALS = [
    pytest.param(lambda: packed_row_norm.kernel_serves(linear(4)), packed_row_norm, id="row norm"),
    pytest.param(
        lambda: packed_row_norm.kernel_serves(linear(4, mode="mxfp4")), packed_row_norm, id="mxfp4"
    ),
    pytest.param(
        lambda: gain_backward.kernel_serves(mx.zeros((2, 3)), mx.zeros((2, 3), mx.bfloat16)),
        gain_backward,
        id="gain",
    ),
]


@on_host
@pytest.mark.parametrize(("serves", "module"), TRIALS)
def test_the_right_kernels_pass_their_trials(serves, module, launches):
    mx.random.seed(1)
    assert serves()
    state = mx.array(mx.random.state[0])
    assert len(launches) == 1
    mx.random.seed(1)
    assert serves()
    assert len(launches) == 1, "tried once"
    assert mx.array_equal(state, mx.random.state[0]), "random numbers are those without a trial"


@on_host
@pytest.mark.parametrize(
    ("serves", "module", "right", "wrong"),
    [
        (*TRIALS[0].values, "k < ranks; ++k", "k < ranks - 1; ++k"),
        (*TRIALS[0].values, "BITS / 32", "BITS / 16"),
        (*TRIALS[2].values, "column_gain * d", "column_gain"),
        (*TRIALS[2].values, "s < SLICES; ++s", "s < SLICES - 1; ++s"),
        (*TRIALS[0].values, "metal::sqrt(", "metal::no_such_function("),
    ],
)
def test_wrong_kernels_fail_their_trials(
    serves, module, right, wrong, launches, monkeypatch, caplog
):
    real = module._kernel

    def edited(*mode):
        def call(**options):
            kernel = real(*mode)
            kernel._edit = lambda source: source.replace(right, wrong)
            try:
                return kernel(**options)
            except AssertionError as fault:
                # As MLX reports what Apple's compiler says.
                raise RuntimeError(f"Unable to build metal library\n{fault}") from fault

        return call

    monkeypatch.setattr(module, "_kernel", edited)
    with caplog.at_level(logging.WARNING):
        assert not serves()
        assert not serves()
    assert len(caplog.records) == 1
    assert "is not used, plain ops are" in caplog.text
    # The layer goes on without it.
    layer = trained(DoRALinear.from_base(linear(4), rank=5))
    x = mx.random.normal((4, 160))
    np.testing.assert_allclose(as64(layer(x)), formula(layer, x), rtol=1e-5, atol=2e-5)
    found = value_and_gradients(layer, x)
    assert mx.isfinite(found["magnitude"]).all().item()


@pytest.mark.metal
@on_metal
@pytest.mark.parametrize(("serves", "module"), TRIALS)
def test_the_kernels_pass_their_trials_on_metal(serves, module):
    with mx.stream(mx.gpu):
        assert serves()


@pytest.mark.metal
@on_metal
@pytest.mark.parametrize(("make_base", "kernels"), BASES)
def test_a_layer_on_metal_computes_the_formula(make_base, kernels, monkeypatch):
    monkeypatch.setattr(gain_backward, "reference_gain_backward", None)
    with mx.stream(mx.gpu):
        layer = trained(DoRALinear.from_base(make_base(), rank=5))
        x = mx.random.normal((3, 11, 160))
        found = value_and_gradients(layer, x)
        mx.eval(found)
    # Metal may multiply matrices of float32 in TF32.
    np.testing.assert_allclose(as64(found["y"]), formula(layer, x), rtol=2e-3, atol=2e-3)
