"""Tiny models of real mlx-lm architectures, saved as a download would be."""

import importlib
import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dora_mlx.errors import UserError
from dora_mlx.loading import load_base

BASE = 500_000.0  # nobody's default

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
# model type -> (module of mlx-lm, fields that are its own)
ARCHITECTURES = {
    "llama": ("llama", {}),
    "mistral": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **MOE}),
}


def build(model_type, **fields):
    """A randomly initialized model of mlx-lm, and the configuration that describes it."""
    module, own = ARCHITECTURES.get(model_type, (model_type, {}))
    config = {"model_type": model_type, **COMMON, **own, **fields}
    arch = importlib.import_module(f"mlx_lm.models.{module}")
    mx.random.seed(0)
    model = arch.Model(arch.ModelArgs.from_dict(config))
    return model, config


def save(folder, model, config, **metadata):
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata)
    write_config(folder, config)
    return folder


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load_base(folder)
    message = str(caught.value)
    assert str(folder) in message
    return message
