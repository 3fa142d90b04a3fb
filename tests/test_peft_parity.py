"""The same adapter in PEFT on torch's CPU: output and every gradient, in float32."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapted_layers import gradients

from dora_mlx.layers import (
    DoRAConv2d,
    DoRAEmbedding,
    DoRALinear,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
)

# Installed by the extra `parity`, and in continuous integration always.
peft = pytest.importorskip("peft", reason="needs the extra `parity`: pip install '.[parity]'")
torch = pytest.importorskip("torch", reason="needs the extra `parity`: pip install '.[parity]'")

TOLERANCE = 1e-5
RANK = 6


def peft_layer(module, rslora, dora):
    """``module`` with a PEFT adapter that has been somewhere in training."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=9,
        target_modules=["0"],
        use_dora=dora,
        use_rslora=rslora,
        init_lora_weights=True,
    )
    layer = peft.get_peft_model(torch.nn.Sequential(module), config).base_model.model[0]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
    return layer


def alpha_for(rslora):
    # rsLoRA divides by the square root of the rank; the layers here always divide by the rank.
    return 9 * math.sqrt(RANK) if rslora else 9


def assert_close(actual, expected, name):
    actual, expected = np.array(actual), expected.detach().numpy()
    assert actual.shape == expected.shape, name
    error = np.abs(actual - expected).max()
    assert error <= TOLERANCE * np.abs(expected).max(), f"{name}: {error}"


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dora, rslora, bias):
    torch.manual_seed(0)
    reference = peft_layer(torch.nn.Linear(48, 40, bias=bias), rslora, dora)
    base = nn.Linear(48, 40, bias=bias)
    base.weight = mx.array(reference.base_layer.weight.detach().numpy())
    if bias:
        base.bias = mx.array(reference.base_layer.bias.detach().numpy())
    layer = (DoRALinear if dora else LoRALinear).from_base(base, RANK, alpha_for(rslora))
    a, b = reference.lora_A["default"].weight, reference.lora_B["default"].weight
    layer.lora_a, layer.lora_b = mx.array(a.detach().numpy().T), mx.array(b.detach().numpy().T)
    if dora:
        m = reference.lora_magnitude_vector["default"].weight
        layer.magnitude = mx.array(m.detach().numpy())

    x, d = torch.randn(3, 7, 48, requires_grad=True), torch.randn(3, 7, 40)
    y = reference(x)
    (y * d).sum().backward()
    own_x, own_d = mx.array(x.detach().numpy()), mx.array(d.numpy())
    assert_close(layer(own_x), y, "y")
    own = gradients(layer, lambda x: (layer(x) * own_d).sum(), own_x)
    assert_close(own["x"], x.grad, "x")
    assert_close(own["lora_a"], a.grad.T, "lora_a")
    assert_close(own["lora_b"], b.grad.T, "lora_b")
    if dora:
        assert_close(own["magnitude"], m.grad, "magnitude")
    merged = layer.merged_weight()
    reference.merge()
    assert_close(merged, reference.base_layer.weight, "merged weight")


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_embedding(dora, rslora):
    torch.manual_seed(0)
    reference = peft_layer(torch.nn.Embedding(50, 24), rslora, dora)
    base = nn.Embedding(50, 24)
    base.weight = mx.array(reference.base_layer.weight.detach().numpy())
    layer = (DoRAEmbedding if dora else LoRAEmbedding).from_base(base, RANK, alpha_for(rslora))
    a, b = reference.lora_embedding_A["default"], reference.lora_embedding_B["default"]
    layer.lora_a, layer.lora_b = mx.array(a.detach().numpy().T), mx.array(b.detach().numpy().T)
    if dora:
        m = reference.lora_magnitude_vector["default"].weight
        assert m.shape == (24,)
        layer.magnitude = mx.array(m.detach().numpy())

    # Some tokens come up more than once.
    tokens, d = torch.randint(0, 50, (4, 30)), torch.randn(4, 30, 24)
    y = reference(tokens)
    (y * d).sum().backward()
    own_tokens, own_d = mx.array(tokens.numpy()), mx.array(d.numpy())
    assert_close(layer(own_tokens), y, "y")
    own = gradients(layer, lambda _: (layer(own_tokens) * own_d).sum())
    assert_close(own["lora_a"], a.grad.T, "lora_a")
    assert_close(own["lora_b"], b.grad.T, "lora_b")
    if dora:
        assert_close(own["magnitude"], m.grad, "magnitude")
    merged = layer.merged_weight()
    reference.merge()
    assert_close(merged, reference.base_layer.weight, "merged weight")


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "bias"),
    [
        ((3, 3), (1, 1), (1, 1), True),
        ((3, 2), (2, 1), (0, 1), False),
        ((1, 1), (1, 1), (0, 0), True),
    ],
)
def test_convolution(dora, rslora, kernel, stride, padding, bias):
    torch.manual_seed(0)
    module = torch.nn.Conv2d(5, 12, kernel, stride, padding, bias=bias)
    reference = peft_layer(module, rslora, dora)
    base = nn.Conv2d(5, 12, kernel, stride, padding, bias=bias)
    # torch has channels before places, MLX has them last.
    base.weight = mx.array(reference.base_layer.weight.detach().numpy().transpose(0, 2, 3, 1))
    if bias:
        base.bias = mx.array(reference.base_layer.bias.detach().numpy())
    layer = (DoRAConv2d if dora else LoRAConv2d).from_base(base, RANK, alpha_for(rslora))
    a, b = reference.lora_A["default"].weight, reference.lora_B["default"].weight

    def as_lora_a(weight):
        return weight.permute(2, 3, 1, 0).reshape(-1, RANK)

    layer.lora_a = mx.array(as_lora_a(a).detach().numpy())
    layer.lora_b = mx.array(b.detach().numpy()[:, :, 0, 0].T)
    if dora:
        m = reference.lora_magnitude_vector["default"].weight
        layer.magnitude = mx.array(m.detach().numpy().reshape(-1))

    x = torch.randn(2, 5, 9, 8, requires_grad=True)
    y = reference(x)
    d = torch.randn(y.shape)
    (y * d).sum().backward()
    own_x = mx.array(x.detach().numpy().transpose(0, 2, 3, 1))
    own_d = mx.array(d.numpy().transpose(0, 2, 3, 1))
    assert_close(layer(own_x), y.permute(0, 2, 3, 1), "y")
    own = gradients(layer, lambda x: (layer(x) * own_d).sum(), own_x)
    assert_close(own["x"], x.grad.permute(0, 2, 3, 1), "x")
    assert_close(own["lora_a"], as_lora_a(a.grad), "lora_a")
    assert_close(own["lora_b"], b.grad[:, :, 0, 0].T, "lora_b")
    if dora:
        assert_close(own["magnitude"], m.grad.reshape(-1), "magnitude")
    merged = layer.merged_weight()
    reference.merge()
    assert_close(merged, reference.base_layer.weight.permute(0, 2, 3, 1), "merged weight")
