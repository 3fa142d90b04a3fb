"""Packed rows: the same loss and gradients as examples alone, on tiny models of five families."""

from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dora_mlx.data.batches import BatchStream, make_batch, make_packed_batch
from dora_mlx.data.examples import Example
from dora_mlx.data.packing import pack
from dora_mlx.training.loss import ChunkedLoss, plain_loss_sum
from dora_mlx.training.packed_attention import PackedRows, attention_arguments, why_not_packed
from dora_mlx.training.recomputed_blocks import recomputed_blocks

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 61, "head_dim": 8,
    "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "phi3": {},
    # Every other layer sees a window of 8 tokens only.
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
}


def tiny(name):
    module = import_module(f"mlx_lm.models.{name}")
    mx.random.seed(1)
    arguments = module.ModelArgs.from_dict({"model_type": name, **TINY, **FAMILIES[name]})
    model = module.Model(arguments)
    model.eval()
    return model


def examples(lengths=(9, 30, 17, 5), seed=0):
    random = np.random.default_rng(seed)
    return [
        Example(random.integers(0, 61, n, dtype=np.int32), np.arange(n) > n // 2) for n in lengths
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_loss_and_gradient_are_those_of_the_examples_alone(name):
    model = tiny(name)
    assert why_not_packed(model) is None
    first, second, third, fourth = examples()
    packed, alone = make_packed_batch([[first, second], [third, fourth]]), make_batch(examples())
    assert packed.trained_tokens == alone.trained_tokens
    model.train()
    results = {}
    for kind, batch in (("packed", packed), ("alone", alone)):
        loss, gradients = nn.value_and_grad(model, plain_loss_sum)(model, batch)
        results[kind] = loss.item(), dict(tree_flatten(gradients))
    assert results["packed"][0] == pytest.approx(results["alone"][0], rel=1e-5)
    for key, gradient in results["alone"][1].items():
        assert mx.allclose(results["packed"][1][key], gradient, rtol=1e-3, atol=1e-4), key
    # Without the mask the loss is another one, so the agreement above says something.
    crossing = plain_loss_sum(model, type(packed)(packed.inputs, packed.targets, packed.weights))
    assert abs(crossing.item() - results["alone"][0]) > 1e-2


def test_chunked_loss_and_recomputed_blocks_pack_as_well():
    model = tiny("llama")
    model.model.embed_tokens.freeze()
    batch = make_packed_batch([examples()])
    model.train()
    expected, gradients = nn.value_and_grad(model, plain_loss_sum)(model, batch)
    with recomputed_blocks(model, keep=False):
        loss, others = nn.value_and_grad(model, ChunkedLoss())(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    others = dict(tree_flatten(others))
    for key, gradient in tree_flatten(gradients):
        assert mx.allclose(others[key], gradient, rtol=1e-3, atol=1e-4), key


def test_rotary_positions_that_go_on_through_a_row_change_nothing():
    # Only differences of positions enter, so an example may begin at any of them.
    model = tiny("llama")
    tokens = mx.array(examples((20,))[0].tokens)[None]
    rows = PackedRows(mx.zeros((1, 20), mx.int32))
    late = PackedRows(mx.zeros((1, 20), mx.int32))
    late.offset = 77
    one, other = (model(tokens, cache=[cache] * 2) for cache in (rows, late))
    assert mx.allclose(one, other, atol=1e-5)
    assert mx.allclose(one, model(tokens), atol=1e-5)


def test_neighbours_and_padding_change_no_logit_at_all():
    model = tiny("llama")
    first, second, *_ = examples()
    other = examples(seed=5)[0]
    batches = [make_packed_batch([[one, second]]) for one in (first, other)]
    logits = [model(mx.array(b.inputs), **attention_arguments(model, b)) for b in batches]
    place = slice(len(first) - 1, len(first) + len(second) - 2)
    assert mx.array_equal(logits[0][:, place], logits[1][:, place])
    assert not mx.isnan(logits[0]).any()


class Recurrent(nn.Module):
    """A model whose state goes on through a row, whatever the mask says."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = [nn.GRU(8, 8)]

    def __call__(self, tokens, cache=None):
        return self.embed.as_linear(self.layers[0](self.embed(tokens)))


class Maskless(Recurrent):
    """A model that takes no cache."""

    def __call__(self, tokens):
        return self.embed.as_linear(self.embed(tokens))


def test_models_that_cannot_pack_say_why():
    assert "changes the logits of its neighbour" in why_not_packed(Recurrent())
    assert "take no mask" in why_not_packed(Maskless())


def test_learned_positions_are_noticed():
    module = import_module("mlx_lm.models.gpt2")
    arguments = {
        "model_type": "gpt2", "n_ctx": 128, "n_embd": 32, "n_head": 4, "n_layer": 2,
        "n_positions": 128, "layer_norm_epsilon": 1e-5, "vocab_size": 61,
    }  # fmt: skip
    model = module.Model(module.ModelArgs.from_dict(arguments))
    # Positions that matter, as in a model that was trained.
    model.model.wpe.weight = mx.random.normal(model.model.wpe.weight.shape)
    assert "depend on where" in why_not_packed(model)


def test_rows_hold_every_example_once_and_are_full():
    random = np.random.default_rng(3)
    lengths = random.integers(1, 300, 2000)
    rows = pack(lengths, 512, seed=0)
    assert sorted(index for row in rows for index in row) == list(range(2000))
    assert all(sum(lengths[row]) <= 512 for row in rows)
    assert lengths.sum() / (len(rows) * 512) > 0.97
    assert rows == pack(lengths, 512, seed=0) != pack(lengths, 512, seed=1)


def test_packed_order_is_a_function_of_seed_and_position():
    data = examples(np.random.default_rng(1).integers(4, 40, 60))
    stream, again = (BatchStream(data, 2, seed=1, window=64) for _ in range(2))
    late = stream.batches_per_epoch + 3
    assert np.array_equal(again.batch(late).inputs, stream.batch(late).inputs)
    seen = [stream.batch(i) for i in range(stream.batches_per_epoch)]
    assert sum(batch.trained_tokens for batch in seen) == sum(int(e.trained.sum()) for e in data)
    assert all(batch.inputs.shape[1] <= 64 for batch in seen)
    assert stream.fill() > BatchStream(data, 2, seed=1).fill()
