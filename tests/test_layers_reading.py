"""What a norm reads and keeps: W once, with its layer's product, and nothing of W's size."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapted_norms import is_right, moved
from float64 import as64, dense64

from dora_mlx.kernels import frozen_product
from dora_mlx.kernels.frozen_product import SharedReading, shares_reading
from dora_mlx.layers import DoRALinear, hoisted_norms
from dora_mlx.layers import linear as linear_layers


def packed_layer(width=256, out=96, bits=4):
    mx.random.seed(6)
    base = nn.Linear(width, out).to_quantized(64, bits)
    return moved(DoRALinear.from_base(base, rank=3), by=0.03)


def test_sums_of_squares_made_within_a_gradient_keep_nothing_else():
    # All of W dequantized is 4 MiB.
    layer = packed_layer(width=1024, out=1024)
    other = nn.Linear(1024, 1024).to_quantized(64, 4)
    x = mx.random.normal((5, 1024))
    mx.eval(layer.parameters(), other.parameters(), x)
    layer.base.update({name: other[name] for name in ("weight", "scales", "biases")})
    held = []

    def loss(layer, x):
        before = mx.get_active_memory()
        y = layer(x).sum()
        held.append(mx.get_active_memory() - before)
        return y

    nn.value_and_grad(layer, loss)(layer, x)
    assert max(held) < 2**20
    assert is_right(layer)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_shared_reading_computes_the_same_product_bit_for_bit(bits, monkeypatch):
    # Blocks of 20 rows: 96 rows leave a last block that is not full.
    monkeypatch.setattr("dora_mlx.kernels.frozen_weight.BLOCK_VALUES", 20 * 256)
    layer = packed_layer(bits=bits)
    x = mx.random.normal((2, 5, 256))
    assert shares_reading(x, layer.base)
    reading = SharedReading(layer.base, layer.lora_a)
    assert mx.array_equal(reading.product(x), frozen_product.frozen_product(x, layer.base))
    expected = dense64(layer.base) @ as64(layer.lora_a)
    np.testing.assert_allclose(as64(reading.constant_product), expected, atol=1e-5)


def test_sixteen_bit_activations_do_not_round_the_norm():
    layer = packed_layer()
    x = mx.random.normal((10, 256)).astype(mx.bfloat16)
    assert not shares_reading(x, layer.base)
    with hoisted_norms(layer):
        layer(x)
        assert is_right(layer, layer._hoisted_norm)


def test_a_block_reads_the_weight_once_for_all_its_norms(monkeypatch):
    # Micro-batches, and the second forward of mx.checkpoint, find the norm of the first call.
    layer = packed_layer()
    readings = []

    class Counted(SharedReading):
        def __init__(self, *arguments):
            readings.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(linear_layers, "SharedReading", Counted)

    def loss(parameters, x):
        def forward(parameters, x):
            layer.update(parameters)
            return layer(x)

        return mx.checkpoint(forward)(parameters, x).square().sum()

    parameters = layer.trainable_parameters()
    with hoisted_norms(layer):
        for _ in range(3):
            mx.eval(mx.value_and_grad(loss)(parameters, mx.random.normal((9, 256))))
        layer.update(parameters)
    assert len(readings) == 1
    layer(mx.random.normal((9, 256)))
    assert len(readings) == 2, "outside of a block every forward has a norm of its own"


def test_a_norm_that_a_compiled_function_was_first_to_need_can_be_used_after_it():
    # Its trace has no values, and a norm that hung on x would have none afterwards.
    layer = packed_layer()
    x = mx.random.normal((9, 256))
    expected = layer(x)
    with hoisted_norms(layer):
        assert mx.allclose(mx.compile(layer)(x), expected, rtol=1e-5, atol=1e-5)
        assert mx.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_norm_does_not_bring_the_dequantized_weight_with_it(monkeypatch):
    # Blocks of 256 KiB; all of W dequantized is 4 MiB.
    monkeypatch.setattr("dora_mlx.kernels.frozen_weight.BLOCK_VALUES", 2**16)
    layer = packed_layer(width=1024, out=1024)
    x = mx.random.normal((8, 1024))

    def peak(function):
        gradient = mx.value_and_grad(lambda x: function(x).square().sum())
        mx.eval(gradient(x))
        before = mx.get_active_memory()
        limit = mx.set_memory_limit(before + 2**18)
        mx.reset_peak_memory()
        mx.eval(gradient(x))
        mx.set_memory_limit(limit)
        return mx.get_peak_memory() - before

    without_norm = peak(lambda x: frozen_product.frozen_product(x, layer.base))
    assert peak(layer) < without_norm + 2**20
