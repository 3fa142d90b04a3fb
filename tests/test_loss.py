"""The chunked loss against the plain one, over the heads that mlx-lm's models have."""

import math
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dora_mlx.adapters.attach import attach
from dora_mlx.data.batches import Batch
from dora_mlx.kernels.blocked_layers import use_blocked_products
from dora_mlx.training.loss import ChunkedLoss, best_loss, plain_loss_sum

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
# Tied, untied, soft-capped and scaled output layers.
MODELS = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "gemma2-soft-cap": (
        "gemma2",
        {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 50.0,
         "query_pre_attn_scalar": 16},
    ),
    "granite-logit-scale": (
        "granite",
        {"logits_scaling": 8.0, "attention_multiplier": 0.25, "embedding_multiplier": 12.0,
         "residual_multiplier": 0.2, "attention_bias": False, "mlp_bias": False,
         "tie_word_embeddings": True},
    ),
    "cohere-logit-scale": (
        "cohere",
        {"logit_scale": 0.0625, "layer_norm_eps": 1e-5, "layer_norm_bias": False,
         "use_qk_norm": False},
    ),
}  # fmt: skip


def model_of(name, bits=None):
    module, special = MODELS[name]
    module = import_module(f"mlx_lm.models.{module}")
    mx.random.seed(0)
    values = {"model_type": module.__name__.rsplit(".", 1)[-1], **SIZES, **special}
    model = module.Model(module.ModelArgs.from_dict(values))
    if bits:
        nn.quantize(model, 32, bits)
        use_blocked_products(model)
    attach(model, "dora", rank=4)
    return model


def random_batch(rows=3, length=64, vocabulary=300, share=0.4):
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    weights = (random.random((rows, length)) < share).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def loss_and_gradients(model, loss, batch):
    value, gradients = nn.value_and_grad(model, loss)(model, batch)
    return value.item(), dict(tree_flatten(gradients))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", MODELS)
def test_chunked_loss_and_gradients_equal_the_plain_ones(name, bits, monkeypatch):
    # Chunks of 64 rows, of which the last is not full.
    monkeypatch.setattr("dora_mlx.training.loss.loss_chunk", lambda vocabulary: 64)
    model, batch = model_of(name, bits), random_batch()
    model.train()
    order = [key for key, _ in tree_flatten(model.parameters())]
    value, gradients = loss_and_gradients(model, ChunkedLoss(), batch)
    expected, expected_gradients = loss_and_gradients(model, plain_loss_sum, batch)
    assert value == pytest.approx(expected, rel=1e-6)
    for key, gradient in expected_gradients.items():
        tolerance = 1e-5 * mx.abs(gradient).max().item() + 1e-7
        assert mx.abs(gradient - gradients[key]).max().item() <= tolerance, key
    model.eval()
    assert ChunkedLoss()(model, batch).item() == pytest.approx(expected, rel=1e-6)
    assert [key for key, _ in tree_flatten(model.parameters())] == order


@pytest.mark.parametrize("name", MODELS)
def test_every_head_is_proven_and_used(name):
    loss, reason = best_loss(model_of(name), random_batch())
    assert isinstance(loss, ChunkedLoss)
    assert reason is None


def test_full_logits_never_exist(monkeypatch):
    monkeypatch.setattr("dora_mlx.training.loss.loss_chunk", lambda vocabulary: 64)
    batch = random_batch(4, 256, 20_000, share=0.25)
    sizes = {**SIZES, "vocab_size": 20_000, "tie_word_embeddings": False}
    module = import_module("mlx_lm.models.llama")
    model = module.Model(module.ModelArgs.from_dict({"model_type": "llama", **sizes}))
    attach(model, "dora")

    def peak(loss):
        mx.eval(model.parameters())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        # The CPU backend runs some tasks ahead unless memory is short, which hides the need.
        limit = mx.set_memory_limit(before + 2**20)
        mx.eval(nn.value_and_grad(model, loss)(model, batch))
        mx.set_memory_limit(limit)
        return mx.get_peak_memory() - before

    logits = 4 * 256 * 20_000 * 4
    assert peak(plain_loss_sum) > 2 * logits
    assert peak(ChunkedLoss()) < logits / 2


class Odd(nn.Module):
    """Its logits depend on the tokens outside of the body."""

    def __init__(self):
        super().__init__()
        inner = model_of("llama-untied")
        self.model = inner.model
        self.lm_head = inner.lm_head
        self.sizes = []
        self.freeze()

    def __call__(self, tokens):
        self.sizes.append(tokens.size)
        return self.lm_head(self.model(tokens)) * (1 + tokens[..., None])


def test_trained_head_falls_back_with_the_reason():
    model = model_of("llama-untied")
    model.lm_head.unfreeze()
    loss, reason = best_loss(model, random_batch())
    assert loss is plain_loss_sum
    assert "it is trained itself" in reason


def test_body_that_takes_more_than_tokens_has_its_plain_loss():
    phi = import_module("mlx_lm.models.phi")
    values = {"model_type": "phi", **SIZES, "num_key_value_heads": 4, "layer_norm_eps": 1e-5}
    model = phi.Model(phi.ModelArgs.from_dict({**values, "partial_rotary_factor": 0.5}))
    attach(model, "dora", rank=4)
    loss, reason = best_loss(model, random_batch())
    assert loss is plain_loss_sum
    assert "takes more than tokens" in reason
    assert loss_and_gradients(model, loss, random_batch())[0] > 0


def test_head_that_is_not_understood_falls_back_with_the_reason():
    loss, reason = best_loss(Odd(), random_batch())
    assert loss is plain_loss_sum
    assert "where the plain loss is" in reason


def test_proof_needs_few_logits_and_looks_where_tokens_are_trained():
    odd, batch = Odd(), random_batch(8, 256)
    batch.weights[:, :200] = 0
    assert "where the plain loss is" in best_loss(odd, batch)[1]
    assert max(odd.sizes) == 32


def test_masked_tokens_count_for_nothing_even_when_infinite():
    class Spiked(nn.Module):
        def __call__(self, tokens):
            logits = mx.zeros((*tokens.shape, 5))
            logits[:, 0, 1] = -mx.inf
            return logits

    tokens = np.ones((1, 3), np.int32)
    batch = Batch(tokens, tokens, np.array([[0, 1, 1]], np.float32))
    assert plain_loss_sum(Spiked(), batch).item() == pytest.approx(2 * math.log(5), rel=1e-6)
