"""The Hugging Face layout in Transformers itself: every name, every value, the same logits."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from exporting_models import STARTER, write_safetensors
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from dora_mlx.adapters.attach import attach
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.reload import logits_of_folder, logits_of_weights
from dora_mlx.exporting.safetensors import DTYPES, MODEL_TYPES, SafetensorsWriter, stored_tensors
from dora_mlx.exporting.stored import check_shards
from dora_mlx.exporting.writer import ExportSource
from dora_mlx.loading import LoadedModel, load_base
from dora_mlx.model_config import read_json

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
OWN = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {},
    "qwen2_moe": {
        **EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": {
        **EXPERTS,
        "num_experts": 4,
        "head_dim": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "gemma2": {
        "head_dim": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
        "sliding_window": 128,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "head_dim": 16,
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 16,
        "sliding_window": 128,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 1000.0,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {"rope_scaling": None, "original_max_position_embeddings": 256},
    "smollm3": {"no_rope_layer_interval": 2, "no_rope_layers": [1, 0], "use_sliding_window": False},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.25,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "starcoder2": {
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
        # Published ones say tanh, which mlx-lm does not compute.
        "hidden_act": "gelu",
    },
}


def architecture_of(model_type):
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return mapping[model_type]


def make_model(model_type, folder):
    """A random adapted model of a type in memory, its config and a tokenizer in ``folder``."""
    config = {"model_type": model_type, **SMALL, **OWN[model_type]}
    config["architectures"] = [architecture_of(model_type)]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STARTER / name, folder / name)
    model_class, arguments = _get_classes(config)
    mx.random.seed(0)
    model = model_class(arguments.from_dict(config))
    model = sharpened(model)
    nn.quantize(model, group_size=32, bits=8, class_predicate=quantizable)
    attach(model, "dora", rank=2)
    moved = [
        (name, mx.random.normal(value.shape) * 0.3 if "lora_b" in name else 1.1 * value)
        for name, value in tree_flatten(model.trainable_parameters())
    ]
    model.update(tree_unflatten(moved))
    return model.eval()


def quantizable(path, module):
    # Routers decide discretely: rounding them would compare other experts.
    router = path.endswith((".gate", "shared_expert_gate"))
    return hasattr(module, "to_quantized") and not router and module.weight.shape[-1] % 32 == 0


def sharpened(model):
    """Norms off one and sharp attention: a lost norm or a wrong frequency shows."""
    values = []
    for name, value in tree_flatten(model.parameters()):
        if "norm" in name or "bias" in name:
            value = value + 0.2 * mx.random.normal(value.shape)
        elif "q_proj" in name or "k_proj" in name:
            value = 2 * value
        values.append((name, value))
    model.update(tree_unflatten(values))
    return model


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_transformers_loads_what_was_exported(tmp_path, model_type):
    model = make_model(model_type, tmp_path / "base")
    weights = MergedWeights(model)
    base, out = tmp_path / "base", tmp_path / "out"
    write_safetensors(weights, base, out, "f16", max_shard_bytes=200_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, dtype=torch.float32
    )
    assert type(theirs).__name__ == architecture_of(model_type)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokens = np.random.default_rng(0).integers(3, 128, (2, 48))
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    # In float32, and with the very values that were written: equal means equal.
    ours, computed_in = logits_of_folder(out, mx.array(tokens))
    assert computed_in == mx.float32
    assert np.abs(logits - ours).max() < 1e-4 * np.abs(ours).max()
    # And these values are the merged weights.
    assert check_shards(out, stored_tensors(weights, model_type, DTYPES["f16"])) >= len(weights)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_config_as_transformers_5_writes_it_comes_out_whole(tmp_path, model_type):
    # It keeps the rotary base and scaling in rope_parameters alone, some of it by kind of layer,
    # renames num_experts and sliding_window_pattern; mlx-lm knows the older names only.
    model = make_model(model_type, tmp_path / "base")
    base, out = tmp_path / "first", tmp_path / "second"
    write_safetensors(MergedWeights(model), tmp_path / "base", base, "f16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs.config.save_pretrained(base)
    loaded = load_base(base)
    source = ExportSource(load_base(base, lazy=True), MergedWeights(loaded.model))
    SafetensorsWriter().write(source, out, "f16")
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(3, 128, (1, 40))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
        assert np.array_equal(again(torch.tensor(tokens)).logits.numpy(), wanted)
    ours, _ = logits_of_folder(out, mx.array(tokens))
    assert np.abs(ours - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_names_are_the_inverse_of_what_mlx_lm_does_to_them(tmp_path, model_type):
    model = make_model(model_type, tmp_path / "base")
    weights = MergedWeights(model)
    found = {}
    for stored in stored_tensors(weights, model_type, DTYPES["bf16"]):
        chunks = {}
        for name, chunk in stored.chunks():
            chunks.setdefault(name, []).append(chunk)
        for name, spec in stored.specs.items():
            found[name] = mx.concatenate(chunks[name]).reshape(spec.shape)
    sanitize = getattr(model, "sanitize", lambda arrays: arrays)
    back = sanitize(found)
    assert back.keys() == weights.shapes().keys()
    for name, tensor in back.items():
        assert mx.array_equal(tensor, weights[name]).item(), name
    # Read block by block, as a file without a program of its own is checked.
    base = LoadedModel(None, None, read_json(tmp_path / "base" / "config.json"), tmp_path)
    tokens = mx.array([[5, 9, 17, 80, 3, 44]])
    logits, _ = logits_of_weights(base, weights, tokens)
    wanted = np.array(model(tokens))
    assert np.abs(logits - wanted).max() < 1e-4 * np.abs(wanted).max()
