"""A tiny random model of every architecture that GGUF export knows, for the tests."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from exporting_models import ROWS, STARTER
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from dora_mlx.layers import DoRALinear, DoRASwitchLinear

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": ROWS,
    "max_position_embeddings": 256,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
GRANITE = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
}
GEMMA3 = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 1000.0,
}
CASES = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "head_dim": 32},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-yarn": {"model_type": "qwen2", "rope_scaling": YARN},
    "qwen2_moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 96, **EXPERTS},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **EXPERTS,
    },
    "gemma": {"model_type": "gemma", "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {"model_type": "gemma3_text", **GEMMA3},
    "gemma3": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **GEMMA3}},
    "phi3": {"model_type": "phi3"},
    "phi3-longrope": {
        "model_type": "phi3",
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 64,
    },
    "phi3-partial": {"model_type": "phi3", "partial_rotary_factor": 0.5},
    "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2"},
    "granite": {"model_type": "granite", **GRANITE},
    "starcoder2": {"model_type": "starcoder2", "norm_epsilon": 1e-5},
}


def make_model(folder: Path, tokenizer: Path = STARTER, seed: int = 0, **options) -> nn.Module:
    """A random model in memory, and its config.json and tokenizer in ``folder``.

    Sharp queries and keys make the attention, and so the rotary embedding, matter; norms and
    biases away from their start make them matter.
    """
    config = {**COMMON, **options}
    if "text_config" in config:
        inner = {**COMMON, **config["text_config"]}
        config = {k: v for k, v in config.items() if k not in COMMON or k == "vocab_size"}
        config["text_config"] = inner
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    mx.random.seed(seed)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    changed = [(name, _changed(name, value)) for name, value in tree_flatten(model.parameters())]
    model.update(tree_unflatten(changed))
    mx.eval(model.parameters())
    return model.eval()


def _changed(name: str, value: mx.array) -> mx.array:
    if "norm" in name or name.endswith("bias"):
        return value + mx.random.normal(value.shape) * 0.2
    return 3 * value if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else value


def adapt_model(model: nn.Module) -> nn.Module:
    """DoRA, moved well away from its start, on a layer of attention and one of the MLP."""
    for block in model.layers:
        for name, parent in block.named_modules():
            for key in ("q_proj", "qkv_proj", "down_proj", "c_proj"):
                if key in parent and not name.endswith("shared_expert"):
                    parent[key] = _adapted(parent[key])
    mx.eval(model.parameters())
    return model.eval()


def _adapted(base: nn.Module) -> nn.Module:
    kind = DoRASwitchLinear if base["weight"].ndim == 3 else DoRALinear
    layer = kind.from_base(base, rank=4, alpha=8)
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.2
    layer.magnitude = layer.magnitude * (1 + 0.2 * mx.random.normal(layer.magnitude.shape))
    return layer
