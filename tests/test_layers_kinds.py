"""Embeddings and experts against float64 NumPy, and what holds for every kind of layer."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapted_layers import assert_all_close, assert_close, gradients, trained
from float64 import as64, dense64
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRAEmbedding as MlxLoRAEmbedding
from mlx_lm.tuner.lora import LoRASwitchLinear as MlxLoRASwitchLinear

from dora_mlx.kernels.blocked_layers import use_blocked_products
from dora_mlx.layers import (
    DoRAConv1d,
    DoRAConv2d,
    DoRAEmbedding,
    DoRASwitchLinear,
    LoRAConv1d,
    LoRAConv2d,
    LoRAEmbedding,
    LoRASwitchLinear,
    hoisted_norms,
)

MODES = [("affine", 2, 64), ("affine", 3, 32), ("affine", 4, 64), ("affine", 6, 128)]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


# Embeddings


def embeddings():
    yield pytest.param(lambda: nn.Embedding(70, 24), id="dense")
    for mode, bits, group in MODES:

        def make(mode=mode, bits=bits, group=group):
            model = nn.Sequential(nn.Embedding(70, 256).to_quantized(group, bits, mode))
            use_blocked_products(model)
            return model.layers[0]

        yield pytest.param(make, id=f"{mode}-{bits}-{group}")


def embedding_parts(layer):
    """``V = W + s A B`` and its gain per column, in float64."""
    total = dense64(layer.base) + layer.scale * as64(layer.lora_a) @ as64(layer.lora_b)
    norm = np.linalg.norm(total, axis=0)
    gain = as64(layer.magnitude) / norm if "magnitude" in layer else np.ones(total.shape[1])
    return total, norm, gain


def with_factors(layer, d_total, d_magnitude):
    expected = {
        "lora_a": layer.scale * d_total @ as64(layer.lora_b).T,
        "lora_b": layer.scale * as64(layer.lora_a).T @ d_total,
    }
    return expected | ({"magnitude": d_magnitude} if "magnitude" in layer else {})


@pytest.mark.parametrize("kind", [DoRAEmbedding, LoRAEmbedding])
@pytest.mark.parametrize("make_base", list(embeddings()))
def test_embedding_lookup_matches_float64(kind, make_base):
    mx.random.seed(1)
    layer = trained(kind.from_base(make_base(), rank=5, alpha=7.0))
    tokens = mx.random.randint(0, 70, (3, 40))
    total, norm, gain = embedding_parts(layer)
    d = mx.random.normal((3, 40, total.shape[1]))
    chosen, d64 = np.array(tokens), as64(d)
    # MLX looks up mxfp4, mxfp8 and nvfp4 in bfloat16.
    tolerance = 1e-5 if layer(tokens).dtype == mx.float32 else 2e-2
    assert_close(layer(tokens), gain * total[chosen], "y", tolerance)
    d_total = np.zeros_like(total)
    np.add.at(d_total, chosen, gain * d64)
    d_magnitude = (d64 * total[chosen]).sum((0, 1)) / norm
    actual = gradients(layer, lambda _: (layer(tokens) * d).sum())
    assert_all_close(actual, with_factors(layer, d_total, d_magnitude), tolerance)


@pytest.mark.parametrize("kind", [DoRAEmbedding, LoRAEmbedding])
@pytest.mark.parametrize("make_base", list(embeddings()))
def test_embedding_as_linear_matches_float64(kind, make_base):
    mx.random.seed(2)
    layer = trained(kind.from_base(make_base(), rank=5, alpha=7.0))
    total, norm, gain = embedding_parts(layer)
    x, d = mx.random.normal((2, 9, total.shape[1])), mx.random.normal((2, 9, 70))
    x64, d64 = as64(x).reshape(18, -1), as64(d).reshape(18, -1)
    assert_close(layer.as_linear(x), (gain * x64 @ total.T).reshape(2, 9, 70), "y")
    expected = with_factors(layer, d64.T @ (gain * x64), ((d64 @ total) * x64).sum(0) / norm)
    expected["x"] = (gain * (d64 @ total)).reshape(x.shape)
    actual = gradients(layer, lambda x: (layer.as_linear(x) * d).sum(), x)
    assert_all_close(actual, expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_small_magnitude_change_moves_half_precision_logits(dtype):
    mx.random.seed(3)
    base = nn.Embedding(70, 256)
    base.set_dtype(dtype)
    layer = trained(DoRAEmbedding.from_base(base))
    x = mx.random.normal((200, 256)).astype(dtype)
    before = layer.as_linear(x)
    layer.magnitude = layer.magnitude * 1.001
    after = layer.as_linear(x)
    assert before.dtype == after.dtype == layer(mx.array([1])).dtype == dtype
    growth = mx.abs(after.astype(mx.float32)).sum() / mx.abs(before.astype(mx.float32)).sum()
    assert growth.item() == pytest.approx(1.001, abs=2e-4)


# Experts


def experts():
    def dense(bias):
        layer = SwitchLinear(48, 40, 4, bias=bias)
        if bias:
            layer.bias = mx.random.normal((4, 40))
        return layer

    yield pytest.param(lambda: dense(False), id="dense")
    yield pytest.param(lambda: dense(True), id="dense-bias")
    for mode, bits, group in MODES:

        def make(mode=mode, bits=bits, group=group):
            layer = SwitchLinear(256, 40, 4, bias=bits == 4)
            if bits == 4:
                layer.bias = mx.random.normal((4, 40))
            return layer.to_quantized(group, bits, mode)

        yield pytest.param(make, id=f"{mode}-{bits}-{group}")


@pytest.mark.parametrize("kind", [DoRASwitchLinear, LoRASwitchLinear])
@pytest.mark.parametrize("make_base", list(experts()))
@pytest.mark.parametrize("sorted_indices", [False, True])
def test_experts_match_float64(kind, make_base, sorted_indices):
    mx.random.seed(4)
    base = make_base()
    layer = trained(kind.from_base(base, rank=5, alpha=7.0))
    width, s = base.input_dims, layer.scale
    if sorted_indices:
        # As mlx-lm passes many tokens: one row per token and expert, in the order of experts.
        x = mx.random.normal((21, 1, width))
        indices = mx.sort(mx.random.randint(0, 3, (21,)))
    else:
        x = mx.random.normal((2, 5, 1, 1, width))
        indices = mx.random.randint(0, 3, (2, 5, 2))
    a, b = as64(layer.lora_a), as64(layer.lora_b)
    total = dense64(base).reshape(4, 40, width) + s * b @ a
    norm = np.linalg.norm(total, axis=-1)
    gain = as64(layer.magnitude) / norm if "magnitude" in layer else np.ones((4, 40))
    expert = np.array(indices).reshape(-1)
    rows = as64(mx.broadcast_to(x, (*indices.shape, 1, width))).reshape(-1, width)
    direction = np.einsum("ni,noi->no", rows, total[expert])
    bias = as64(base.bias)[expert] if "bias" in base else 0
    y = layer(x, indices, sorted_indices)
    assert_close(y, (gain[expert] * direction + bias).reshape(y.shape), "y")

    d = mx.random.normal(y.shape)
    d64 = as64(d).reshape(-1, 40)
    scaled = d64 * gain[expert]
    d_total = np.zeros_like(total)
    np.add.at(d_total, expert, scaled[:, :, None] * rows[:, None, :])
    d_rows = np.einsum("no,noi->ni", scaled, total[expert])
    expected = {
        "lora_a": s * b.swapaxes(1, 2) @ d_total,
        "lora_b": s * d_total @ a.swapaxes(1, 2),
        "x": d_rows.reshape(*indices.shape, 1, width).sum(
            axis=() if sorted_indices else 2, keepdims=True
        ),
    }
    if "magnitude" in layer:
        d_magnitude = np.zeros((4, 40))
        np.add.at(d_magnitude, expert, d64 * direction)
        expected["magnitude"] = d_magnitude / norm
    actual = gradients(layer, lambda x: (layer(x, indices, sorted_indices) * d).sum(), x)
    assert_all_close(actual, expected)


def test_experts_with_a_global_scale_have_the_norms_of_what_they_mean():
    # MLX multiplies them on a GPU only, but norms and merges read them anywhere.
    base = SwitchLinear(64, 24, 3, bias=False).to_quantized(16, 4, "nvfp4", True)
    layer = trained(DoRASwitchLinear.from_base(base))
    meant = mx.stack(
        [
            mx.dequantize(w, s, None, 16, 4, "nvfp4", scale, mx.float32)
            for w, s, scale in zip(base.weight, base.scales, base.global_scale, strict=True)
        ]
    )
    total = as64(meant) + layer.scale * as64(layer.lora_b) @ as64(layer.lora_a)
    norm = np.linalg.norm(total, axis=-1)
    assert_close(layer.norm(), norm)
    assert_close(layer.merged_weight(), (as64(layer.magnitude) / norm)[..., None] * total)


# Every kind


def calls():
    """Kind, base and a call, for one layer of each."""
    tokens, indices = mx.array([[1, 3, 3], [0, 2, 5]]), mx.array([[0, 2], [1, 1], [2, 0]])
    quantized = [
        (DoRAEmbedding, LoRAEmbedding, lambda: nn.Embedding(70, 64).to_quantized(32, 4)),
        (DoRASwitchLinear, LoRASwitchLinear, lambda: SwitchLinear(64, 24, 3).to_quantized(32, 4)),
    ]
    dense = [
        (DoRAEmbedding, LoRAEmbedding, lambda: nn.Embedding(70, 64)),
        (DoRASwitchLinear, LoRASwitchLinear, lambda: SwitchLinear(64, 24, 3)),
        (DoRAConv1d, LoRAConv1d, lambda: nn.Conv1d(64, 24, 3)),
        (DoRAConv2d, LoRAConv2d, lambda: nn.Conv2d(64, 24, 3, groups=2)),
    ]

    def call(layer, dtype):
        mx.random.seed(7)
        if isinstance(layer, nn.Embedding | nn.QuantizedEmbedding | DoRAEmbedding | LoRAEmbedding):
            x = mx.random.normal((12, 64)).astype(dtype)
            return mx.concatenate([layer(tokens).flatten(), layer.as_linear(x).flatten()])
        base = layer.get("base", layer)
        if base["weight"].ndim == 4:
            return layer(mx.random.normal((2, 6, 7, 64)).astype(dtype))
        if isinstance(base, nn.Conv1d):
            return layer(mx.random.normal((2, 7, 64)).astype(dtype))
        return layer(mx.random.normal((3, 1, 1, 64)).astype(dtype), indices)

    for dora, lora, make in dense + quantized:
        for kind in (dora, lora):
            name = f"{kind.__name__}-{'quantized' if (dora, lora, make) in quantized else 'dense'}"
            yield pytest.param(kind, make, call, id=name)


def biased(base):
    if "bias" in base:
        base.bias = mx.random.normal(base.bias.shape)
    return base


@pytest.mark.parametrize(("kind", "make_base", "call"), list(calls()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_layer_equals_its_base_bit_for_bit(kind, make_base, call, dtype):
    base = biased(make_base())
    if isinstance(base, SwitchLinear):
        # All that MLX's CPU backend multiplies for dense experts.
        dtype = mx.float32
    base.set_dtype(dtype)
    expected = call(base, dtype)
    layer = kind.from_base(base)
    actual = call(layer, dtype)
    assert actual.dtype == expected.dtype == dtype
    assert mx.array_equal(actual, expected)
    # Lazily, so that nothing was kept: the norm in the block is the one outside of it.
    with hoisted_norms(nn.Sequential(layer)):
        assert mx.array_equal(call(layer, dtype), expected)


@pytest.mark.parametrize(("kind", "make_base", "call"), list(calls()))
def test_fused_layer_computes_what_the_adapted_one_does(kind, make_base, call):
    base = biased(make_base())
    layer = trained(kind.from_base(base, rank=3))
    expected = call(layer, mx.float32)
    fused = layer.fuse(dequantize=True)
    dense = {QuantizedSwitchLinear: SwitchLinear, nn.QuantizedEmbedding: nn.Embedding}
    assert type(fused) is dense.get(type(base), type(base))
    assert mx.allclose(call(fused, mx.float32), expected, atol=1e-5 * mx.abs(expected).max())
    again = layer.fuse()
    assert type(again) is type(base)
    assert set(again.keys()) == set(base.keys())
    assert call(again, mx.float32).shape == expected.shape


@pytest.mark.parametrize(("kind", "make_base", "call"), list(calls()))
def test_only_the_adapter_is_trainable(kind, make_base, call):
    layer = kind.from_base(make_base(), rank=3)
    names = {name for name, _ in tree_flatten(layer.trainable_parameters())}
    assert names == {"lora_a", "lora_b"} | ({"magnitude"} if "magnitude" in layer else set())
    assert not kind.from_base(make_base()).fuse().trainable_parameters().get("scales")


def test_fusing_leaves_the_base_frozen():
    # A shallow copy shares the set of frozen names with its original.
    layer = DoRAConv1d.from_base(nn.Conv1d(4, 6, 3))
    assert layer.fuse().trainable_parameters()
    assert not layer.base.trainable_parameters()


@pytest.mark.parametrize(
    ("ours", "theirs", "make_base"),
    [
        (LoRAEmbedding, MlxLoRAEmbedding, lambda: nn.Embedding(70, 64)),
        (LoRASwitchLinear, MlxLoRASwitchLinear, lambda: SwitchLinear(64, 24, 3)),
    ],
)
def test_shapes_are_those_of_mlx_lm(ours, theirs, make_base):
    base = make_base()
    mine, other = ours.from_base(base, rank=5, alpha=20.0), theirs.from_base(base, r=5, scale=4.0)
    assert mine.lora_a.shape == other.lora_a.shape
    assert mine.lora_b.shape == other.lora_b.shape
    trained(mine)
    other.lora_a, other.lora_b = mine.lora_a, mine.lora_b
    assert mx.allclose(mine.fuse().weight, other.fuse().weight, atol=1e-6)
