"""Which layers of a model get which adapter layer."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3_moe

import dora_mlx.layers.dora as formula
from dora_mlx.adapters.adapter_folder import save_adapter
from dora_mlx.adapters.attach import adapted_layers, adapters_disabled, attach
from dora_mlx.adapters.reading import load_adapter
from dora_mlx.errors import UserError
from dora_mlx.kernels.blocked_layers import use_blocked_products
from dora_mlx.layers import (
    DoRAEmbedding,
    DoRALinear,
    DoRASwitchLinear,
    LoRASwitchLinear,
    hoisted_norms,
)

TOKENS = mx.array([[3, 5, 5, 9, 1]])


def experts_model():
    mx.random.seed(0)
    model = qwen3_moe.Model(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            moe_intermediate_size=32,
            rms_norm_eps=1e-5,
            vocab_size=40,
            num_key_value_heads=2,
            head_dim=32,
            rope_theta=1e4,
            tie_word_embeddings=False,
            max_position_embeddings=64,
            norm_topk_prob=True,
        )
    )
    mx.eval(model.parameters())
    return model


def tied_model():
    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=40,
            tie_word_embeddings=True,
        )
    )
    mx.eval(model.parameters())
    return model


def move(model):
    for _, layer in adapted_layers(model):
        layer.lora_b = 0.2 * mx.random.normal(layer.lora_b.shape)


@pytest.mark.parametrize(
    ("method", "kind"), [("dora", DoRASwitchLinear), ("lora", LoRASwitchLinear)]
)
@pytest.mark.parametrize("bits", [None, 4])
def test_experts_are_adapted_by_default(method, kind, bits):
    model = experts_model()
    if bits:
        nn.quantize(model, 32, bits)
        use_blocked_products(model)
    expected = model(TOKENS)
    spec = attach(model, method, rank=2)
    layers = dict(adapted_layers(model))
    assert isinstance(layers["model.layers.0.mlp.switch_mlp.up_proj"], kind)
    # mlx-lm adapts every linear layer of a block, so also a router that is one.
    assert "mlp.gate" in spec.keys
    assert mx.array_equal(model(TOKENS), expected)

    def loss(model):
        return model(TOKENS).astype(mx.float32).square().mean()

    with hoisted_norms(model):
        _, gradients = nn.value_and_grad(model, loss)(model)
    found = dict(tree_flatten(gradients))
    assert len(found) == len(tree_flatten(model.trainable_parameters()))
    assert all(mx.isfinite(gradient).all().item() for gradient in found.values())


def test_embedding_is_adapted_when_it_is_named(tmp_path):
    model = tied_model()
    base = model(TOKENS)
    spec = attach(model, "dora", rank=2, target_modules=("q_proj", "embed_tokens"))
    assert spec.keys == ("model.embed_tokens", "self_attn.q_proj")
    assert isinstance(model.model.embed_tokens, DoRAEmbedding)
    assert mx.array_equal(model(TOKENS), base)
    move(model)
    expected = model(TOKENS)
    assert not mx.allclose(expected, base)
    with adapters_disabled(model):
        assert mx.array_equal(model(TOKENS), base)
    save_adapter(tmp_path, model, spec)
    other = tied_model()
    assert load_adapter(tmp_path, other) == spec
    assert mx.array_equal(other(TOKENS), expected)


def test_a_pattern_means_the_blocks_first():
    model = tied_model()
    assert "model.embed_tokens" not in attach(model, "dora", 2, target_modules=("*",)).keys
    with pytest.raises(UserError, match=r"matches embed\. There are .*model\.embed_tokens"):
        attach(tied_model(), "dora", 2, target_modules=("embed",))


def test_full_fine_tuning_unpacks_experts():
    model = experts_model()
    nn.quantize(model, 32, 8)
    before = model(TOKENS)
    attach(model, "full")
    assert mx.allclose(model(TOKENS), before, atol=1e-3)
    assert all(a.dtype == mx.float32 for _, a in tree_flatten(model.trainable_parameters()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_gain_computes_what_the_plain_one_does(monkeypatch, dtype, bias):
    # What runs on a GPU; here mx.compile builds it for the CPU.
    base = nn.Linear(40, 24, bias=bias)
    base.set_dtype(dtype)
    layer = DoRALinear.from_base(base, rank=3)
    layer.lora_b = 0.2 * mx.random.normal(layer.lora_b.shape)
    x = mx.random.normal((7, 40)).astype(dtype)

    def outcome():
        loss, gradients = nn.value_and_grad(layer, lambda x: layer(x).sum())(x)
        return [layer(x), loss, *(array for _, array in tree_flatten(gradients))]

    plain = outcome()
    monkeypatch.setattr(formula, "on_cpu", lambda: False)
    for one, other in zip(plain, outcome(), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.array(array.astype(mx.float32)) for array in (one, other))
        np.testing.assert_allclose(one, other, rtol=1e-6 if dtype == mx.float32 else 1e-2)
