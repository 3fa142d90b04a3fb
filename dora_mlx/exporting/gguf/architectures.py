"""Which models become which GGUF architecture, and what is particular about each.

Facts only: an entry of ``ARCHITECTURES`` says where llama.cpp's idea of a model differs from a
plain Llama's. ``docs/gguf.md`` has the steps to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter

from dora_mlx.errors import UserError

_SILU = ("silu", "swish")
_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh")
_PLAIN = ("default", "linear", "yarn")


@dataclass(frozen=True)
class Number:
    """One number of ``config.json`` that the file holds under a key of its own."""

    name: str
    write: Callable[[GGUFWriter, Any], None]


@dataclass(frozen=True)
class Architecture:
    """How one ``model_type`` of ``config.json`` is written.

    Attributes:
        arch: The architecture in llama.cpp.
        permuted: llama.cpp rotates neighbouring channels of a head where the checkpoint rotates
            its two halves, so the rows of queries and keys are reordered.
        norm_offset: What the checkpoint's norms leave out: they multiply by ``1 + weight``.
        ropes: Kinds of rotary scaling that mlx-lm and llama.cpp compute alike.
        activations: ``hidden_act`` that both compute.
        epsilon: Name of the norms' epsilon.
        numbers: What else the file holds.
        defaults: What mlx-lm takes for numbers that published configs leave out.
        fixed: What llama.cpp takes for granted, by name in the config: the values it may have.
        prefix: What the names of all tensors start with, in front of ``model.``.
    """

    arch: MODEL_ARCH
    permuted: bool = False
    norm_offset: float = 0.0
    ropes: tuple[str, ...] = _PLAIN
    activations: tuple[str, ...] = _SILU
    epsilon: str = "rms_norm_eps"
    numbers: tuple[Number, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    prefix: str = ""


_LLAMA_ROPES = (*_PLAIN, "llama3")
_EXPERTS = (
    Number("num_experts", GGUFWriter.add_expert_count),
    Number("num_experts_per_tok", GGUFWriter.add_expert_used_count),
)
_SMALL_EXPERTS = (
    *_EXPERTS,
    Number("moe_intermediate_size", GGUFWriter.add_expert_feed_forward_length),
)
_LLAMA = Architecture(MODEL_ARCH.LLAMA, permuted=True, ropes=_LLAMA_ROPES)
_GEMMA3 = Architecture(
    MODEL_ARCH.GEMMA3,
    norm_offset=1.0,
    ropes=("default", "linear"),
    activations=_GELU,
    numbers=(
        Number("sliding_window", GGUFWriter.add_sliding_window),
        Number("sliding_window_pattern", GGUFWriter.add_sliding_window_pattern),
        Number("rope_local_base_freq", GGUFWriter.add_rope_freq_base_swa),
    ),
    defaults={
        "rms_norm_eps": 1e-6,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
)

ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Architecture(MODEL_ARCH.LLAMA, permuted=True, ropes=("default",), numbers=_EXPERTS),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen2_moe": Architecture(
        MODEL_ARCH.QWEN2MOE,
        ropes=("default",),
        numbers=(
            *_SMALL_EXPERTS,
            Number(
                "shared_expert_intermediate_size",
                GGUFWriter.add_expert_shared_feed_forward_length,
            ),
        ),
    ),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "qwen3_moe": Architecture(
        MODEL_ARCH.QWEN3MOE,
        ropes=("default",),
        numbers=_SMALL_EXPERTS,
        fixed={"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    ),
    "gemma": Architecture(MODEL_ARCH.GEMMA, norm_offset=1.0, ropes=("default",), activations=_GELU),
    "gemma2": Architecture(
        MODEL_ARCH.GEMMA2,
        norm_offset=1.0,
        ropes=("default",),
        activations=_GELU,
        numbers=(
            Number("attn_logit_softcapping", GGUFWriter.add_attn_logit_softcapping),
            Number("final_logit_softcapping", GGUFWriter.add_final_logit_softcapping),
            Number("sliding_window", GGUFWriter.add_sliding_window),
        ),
        defaults={
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 144.0,
            "sliding_window": 4096,
            "rope_theta": 1e4,
        },
    ),
    "gemma3_text": _GEMMA3,
    # The language model inside the one that sees; mlx-lm leaves the rest out.
    "gemma3": replace(
        _GEMMA3,
        prefix="language_model.",
        defaults={
            **_GEMMA3.defaults,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    "phi3": Architecture(MODEL_ARCH.PHI3, ropes=("default", "linear", "longrope", "su")),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, permuted=True),
    "olmo2": Architecture(
        MODEL_ARCH.OLMO2,
        defaults={"tie_word_embeddings": True},
        fixed={"tie_word_embeddings": (False,)},
    ),
    "granite": Architecture(
        MODEL_ARCH.GRANITE,
        permuted=True,
        ropes=_LLAMA_ROPES,
        numbers=(
            Number("attention_multiplier", GGUFWriter.add_attention_scale),
            Number("embedding_multiplier", GGUFWriter.add_embedding_scale),
            Number("residual_multiplier", GGUFWriter.add_residual_scale),
            Number("logits_scaling", GGUFWriter.add_logit_scale),
        ),
    ),
    "starcoder2": Architecture(
        MODEL_ARCH.STARCODER2,
        ropes=("default",),
        activations=_GELU,
        epsilon="norm_epsilon",
        defaults={"norm_epsilon": 1e-5, "rope_theta": 1e5},
    ),
}


def find_architecture(config: dict[str, Any]) -> Architecture:
    """The architecture of a ``config.json``.

    Raises:
        UserError: When it is not one that can be exported, with the list of those that can.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"Models of type {model_type!r} cannot be exported to GGUF yet; these can: "
            f"{', '.join(ARCHITECTURES)}. Export safetensors instead, if it supports them."
        )
    return ARCHITECTURES[model_type]
