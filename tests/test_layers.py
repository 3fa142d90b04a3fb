"""DoRA and LoRA layers against the formula in float64 NumPy, forward and every gradient."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from float64 import as64
from mlx.utils import tree_flatten

from dora_mlx.kernels.blocked_layers import use_blocked_products
from dora_mlx.kernels.frozen_product import frozen_product, frozen_product_transposed, takes_gain
from dora_mlx.kernels.frozen_weight import parameter_count, weight_rows, weight_shape
from dora_mlx.kernels.row_norm import RowNorm, Update
from dora_mlx.layers import DoRALinear, LoRALinear, hoisted_norms

AFFINE = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
MODES = [("affine", *pair) for pair in AFFINE] + [
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
]


def quantized(mode, bits, group, out=96, width=256, bias=False):
    layer = nn.Linear(width, out, bias=bias)
    if bias:
        layer.bias = mx.random.normal((out,))
    model = nn.Sequential(nn.QuantizedLinear.from_linear(layer, group, bits, mode))
    use_blocked_products(model)
    return model.layers[0]


def dense(out=33, width=17, bias=True):
    layer = nn.Linear(width, out, bias=bias)
    if bias:
        layer.bias = mx.random.normal((out,))
    return layer


def bases():
    yield pytest.param(lambda: dense(bias=False), id="dense")
    yield pytest.param(lambda: dense(bias=True), id="dense-bias")
    for mode, bits, group in MODES:
        yield pytest.param(
            lambda m=mode, b=bits, g=group: quantized(m, b, g, bias=b % 2 == 0),
            id=f"{mode}-{bits}-{group}",
        )


def trained(layer):
    """Move a fresh layer to where training might have brought it."""
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    if "magnitude" in layer:
        layer.magnitude = layer.magnitude * mx.random.uniform(0.7, 1.4, layer.magnitude.shape)
    return layer


def reference(layer, x, d):
    """Output and gradients of ``sum(d * y)`` by the formula, in float64."""
    base = layer.base
    w = as64(weight_rows(base, 0, weight_shape(base)[0], mx.float32))
    a, b, s = as64(layer.lora_a), as64(layer.lora_b), layer.scale
    x, d = as64(x).reshape(-1, w.shape[1]), as64(d).reshape(-1, w.shape[0])
    direction = x @ w.T + s * (x @ a) @ b
    if isinstance(layer, DoRALinear):
        gain = as64(layer.magnitude) / np.linalg.norm(w + s * (a @ b).T, axis=1)
    else:
        gain = np.ones(w.shape[0])
    d_direction = d * gain
    gradients = {
        "x": d_direction @ w + s * (d_direction @ b.T) @ a.T,
        "lora_a": s * x.T @ (d_direction @ b.T),
        "lora_b": s * (x @ a).T @ d_direction,
    }
    if isinstance(layer, DoRALinear):
        gradients["magnitude"] = (d * direction).sum(0) * gain / as64(layer.magnitude)
    bias = as64(base.bias) if "bias" in base else 0
    return gain * direction + bias, gradients


def computed(layer, x, d):
    """The same from the layer."""

    def objective(parameters, x):
        layer.update(parameters)
        return (layer(x) * d).sum()

    parameters = {name: layer[name] for name in ("lora_a", "lora_b", "magnitude") if name in layer}
    gradients, d_x = mx.grad(objective, argnums=(0, 1))(parameters, x)
    layer.update(parameters)
    return layer(x), {**gradients, "x": d_x}


def assert_close(actual, expected, tolerance, name=""):
    error = np.abs(as64(actual).reshape(expected.shape) - expected).max()
    assert error <= tolerance * np.abs(expected).max(), f"{name}: {error}"


@pytest.mark.parametrize("kind", [DoRALinear, LoRALinear])
@pytest.mark.parametrize("make_base", list(bases()))
# 1 x 3 rows take the quantized kernel and 3 x 11 the blocks on the CPU.
@pytest.mark.parametrize("rows", [(1, 3), (3, 11)])
def test_forward_and_gradients_match_float64(kind, make_base, rows):
    mx.random.seed(1)
    layer = trained(kind.from_base(make_base(), rank=5, alpha=7.0))
    out, width = weight_shape(layer.base)
    x, d = mx.random.normal((*rows, width)), mx.random.normal((*rows, out))
    y, gradients = reference(layer, x, d)
    actual, actual_gradients = computed(layer, x, d)
    assert_close(actual, y, 1e-5, "y")
    assert set(actual_gradients) == set(gradients)
    for name, expected in gradients.items():
        assert_close(actual_gradients[name], expected, 1e-5, name)


@pytest.mark.parametrize("kind", [DoRALinear, LoRALinear])
@pytest.mark.parametrize("make_base", list(bases()))
def test_fresh_layer_equals_its_base_bit_for_bit(kind, make_base):
    base = make_base()
    layer = kind.from_base(base)
    for rows in (1, 40):
        x = mx.random.normal((rows, weight_shape(base)[1]))
        assert mx.array_equal(layer(x), base(x))


@pytest.mark.parametrize("kind", [DoRALinear, LoRALinear])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_fresh_layer_adds_the_bias_as_nn_linear_does(kind, dtype):
    mx.random.seed(8)
    base = dense(200, 700)
    base.set_dtype(dtype)
    x = mx.random.normal((30, 700)).astype(dtype)
    # nn.Linear adds its bias inside of the product, which rounds differently.
    assert not mx.array_equal(base(x), x @ base.weight.T + base.bias)
    assert mx.array_equal(kind.from_base(base)(x), base(x))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_small_magnitude_change_moves_a_half_precision_output(dtype):
    # mlx-lm rounds the gain to the activations' dtype, where 1.001 is 1.0 in bfloat16.
    mx.random.seed(2)
    base = dense(64, 64, bias=False)
    base.set_dtype(dtype)
    layer = trained(DoRALinear.from_base(base))
    x = mx.random.normal((512, 64)).astype(dtype)
    before = layer(x).astype(mx.float32)
    layer.magnitude = layer.magnitude * 1.001
    after = layer(x)
    assert after.dtype == dtype
    growth = (mx.abs(after.astype(mx.float32)).sum() / mx.abs(before).sum()).item()
    assert growth == pytest.approx(1.001, abs=2e-4)


def test_gain_keeps_the_paper_identity_at_any_update():
    # With m = ||W + dW|| the layer is plain LoRA: the norm is that of the whole row.
    layer = trained(DoRALinear.from_base(quantized("affine", 4, 32), rank=4))
    layer.magnitude = layer.norm()
    x = mx.random.normal((20, 256))
    plain = frozen_product(x, layer.base) + layer.scale * (x @ layer.lora_a) @ layer.lora_b
    assert mx.allclose(layer(x), plain, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (96, 256), (1000, 4160)])
def test_row_norm_without_the_sum_matches_float64(shape):
    mx.random.seed(3)
    base = nn.Linear(shape[1], shape[0], bias=False)
    a, b = mx.random.normal((shape[1], 3)) / 9, mx.random.normal((3, shape[0])) / 9
    norm = RowNorm(base).factored(Update(a, b, 1.5))
    expected = np.linalg.norm(as64(base.weight) + 1.5 * (as64(a) @ as64(b)).T, axis=1)
    assert_close(norm, expected, 2e-6)


def test_zero_row_gives_zero_and_a_finite_gradient():
    # mlx-lm's DoRA divides zero by zero here.
    base = nn.Linear(8, 4, bias=False)
    base.weight[1] = mx.zeros(8)
    layer = DoRALinear.from_base(base)
    x = mx.random.normal((3, 8))
    y, gradients = computed(layer, x, mx.ones((3, 4)))
    assert mx.all(y[:, 1] == 0).item()
    assert all(mx.all(mx.isfinite(g)).item() for g in gradients.values())
    assert mx.all(mx.isfinite(layer.merged_weight())).item()


def test_hoisted_norm_does_not_outlive_its_block():
    layer = trained(DoRALinear.from_base(dense(bias=False)))
    model = nn.Sequential(layer)
    x = mx.random.normal((6, 17))
    with hoisted_norms(model):
        inside = model(x)
    assert mx.array_equal(inside, model(x))
    layer.lora_b = layer.lora_b * 3
    stale = inside
    with hoisted_norms(model):
        assert mx.array_equal(model(x), layer(x))
    assert not mx.allclose(model(x), stale)
    expected, _ = reference(layer, x, mx.zeros((6, 33)))
    assert_close(model(x), expected, 1e-5)


@pytest.mark.parametrize("kind", [DoRALinear, LoRALinear])
@pytest.mark.parametrize("make_base", list(bases()))
def test_fused_layer_computes_what_the_adapted_one_does(kind, make_base):
    layer = trained(kind.from_base(make_base(), rank=4))
    x = mx.random.normal((9, weight_shape(layer.base)[1]))
    fused = layer.fuse(dequantize=True)
    assert type(fused) is nn.Linear
    expected = layer(x)
    assert mx.allclose(fused(x), expected, atol=2e-5 * mx.abs(expected).max().item())


def test_fuse_keeps_the_quantization_and_the_dtype_of_the_base():
    base = quantized("affine", 4, 64)
    base.set_dtype(mx.bfloat16)
    fused = trained(DoRALinear.from_base(base)).fuse()
    assert isinstance(fused, nn.QuantizedLinear)
    assert (fused.bits, fused.group_size, fused.mode) == (4, 64, "affine")
    assert fused.scales.dtype == mx.bfloat16


@pytest.mark.parametrize(("mode", "bits", "group"), MODES)
@pytest.mark.parametrize("out", [96, 272])  # The backward goes by columns, or by rows.
def test_blocked_products_equal_mlx_quantized_products(mode, bits, group, out, monkeypatch):
    base = quantized(mode, bits, group, out)
    # Blocks of 5 rows: neither number of rows is a multiple of that.
    monkeypatch.setattr("dora_mlx.kernels.frozen_weight.BLOCK_VALUES", 5 * 256)
    x, d = mx.random.normal((17, 256)), mx.random.normal((17, out))
    stock = mx.quantized_matmul(
        x, base.weight, base.scales, base.get("biases"), True, group, bits, mode
    )
    assert mx.allclose(frozen_product(x, base), stock, atol=1e-4)
    stock = mx.quantized_matmul(
        d, base.weight, base.scales, base.get("biases"), False, group, bits, mode
    )
    assert mx.allclose(frozen_product_transposed(d, base), stock, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("out", [10, 70])
def test_a_gain_of_the_weight_is_one_of_the_outputs(bits, out, monkeypatch):
    # Blocks of 4 rows: neither number of rows is a multiple of that.
    monkeypatch.setattr("dora_mlx.kernels.frozen_weight.BLOCK_VALUES", 4 * 64)
    base = nn.Linear(64, out).to_quantized(32, bits)
    x, gain = mx.random.normal((2, 5, 64)), mx.random.uniform(0.5, 2, (out,))
    d = mx.random.normal((2, 5, out))
    assert takes_gain(x, base)
    ours, (d_ours,) = mx.vjp(lambda x: frozen_product(x, base, gain), [x], [d])
    plain, (d_plain,) = mx.vjp(lambda x: gain * frozen_product(x, base), [x], [d])
    assert mx.allclose(ours[0], plain[0], atol=1e-5)
    assert mx.allclose(d_ours, d_plain, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "mode"), [(mx.bfloat16, "affine"), (mx.float32, "mxfp4"), (mx.float32, None)]
)
def test_what_would_round_or_read_more_takes_no_gain(dtype, mode):
    base = nn.Linear(64, 10)
    if mode is not None:
        base = base.to_quantized(32, 4, mode=mode)
    x = mx.zeros((2, 5, 64), dtype)
    assert not takes_gain(x, base)
    with pytest.raises(ValueError, match="take a gain"):
        frozen_product(x, base, mx.ones(10))


def test_only_the_adapter_is_trainable_and_dropout_stops_in_evaluation():
    layer = trained(DoRALinear.from_base(dense(), rank=4, dropout=0.5))
    names = {name for name, _ in tree_flatten(layer.trainable_parameters())}
    assert names == {"lora_a", "lora_b", "magnitude"}
    x = mx.random.normal((4, 17))
    layer.train()
    assert not mx.array_equal(layer(x), layer(x))
    layer.eval()
    assert mx.array_equal(layer(x), layer(x))


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_parameter_count_counts_values_and_not_words(bits):
    model = nn.Sequential(nn.Linear(256, 96), nn.RMSNorm(96))
    before = parameter_count(model)
    nn.quantize(model, 64, bits, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    assert parameter_count(model) == before == 256 * 96 + 96 + 96


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_fresh_layer_merges_to_its_base_and_keeps_its_dtype(dtype, bits):
    # What mlx-lm's own tests of its DoRA layers expect.
    base = dense(64, 64, bias=False)
    base.set_dtype(dtype)
    base = base.to_quantized(32, bits) if bits else base
    layer = DoRALinear.from_base(base)
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((64, 8), (8, 64))
    assert layer.magnitude.shape == (64,)
    assert layer(mx.ones((2, 64), dtype)).dtype == dtype
    fused = layer.fuse(dequantize=True)
    assert type(fused) is nn.Linear
    assert fused.weight.dtype == dtype
    assert mx.array_equal(fused.weight, weight_rows(base, 0, 64, mx.float32).astype(dtype))


@pytest.mark.parametrize("make_base", list(bases()))
def test_evaluation_computes_what_training_does(make_base):
    # Evaluation does without the custom backward, whose parts a decoded token would wait for.
    mx.random.seed(1)
    layer = trained(DoRALinear.from_base(make_base(), rank=5))
    out, width = weight_shape(layer.base)
    x, d = mx.random.normal((3, 11, width)), mx.random.normal((3, 11, out))
    y, gradients = computed(layer, x, d)
    layer.eval()
    with hoisted_norms(layer):
        assert_close(layer(x), as64(y), 2e-6)
        assert_close(layer(x), as64(y), 2e-6, "with the norm of the first call")
    _, others = computed(layer, x, d)
    for name, gradient in gradients.items():
        assert_close(others[name], as64(gradient), 1e-5, name)
