"""The numbers of a ``config.json`` that llama.cpp builds a model from: read, checked, written."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.architectures import Architecture, find_architecture
from dora_mlx.exporting.rope import Rope, read_rope
from dora_mlx.model_config import Config, read_json, rope_base, rope_parameters

# What a kind of rotary scaling has to say.
_SCALING_NUMBERS = {
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "longrope": ("long_factor",),
    "su": ("long_factor",),
}
# llama.cpp has one scale of the attention for these, and another for their largest model.
_LARGEST_GEMMA = {gguf.MODEL_ARCH.GEMMA2: 46, gguf.MODEL_ARCH.GEMMA3: 62}


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of ``config.json`` that llama.cpp needs to build the model.

    ``rope_dim`` channels of each head are rotated. ``config`` is the config with mlx-lm's defaults
    in it and with the numbers of a language model inside another model at its top.
    """

    config: Config
    context_length: int
    embedding_length: int
    block_count: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int
    rope_dim: int
    epsilon: float
    rope: Rope


def read_model_config(base_dir: Path) -> tuple[Architecture, Config]:
    """The architecture of the model in ``base_dir``, and its config with all numbers in it.

    Raises:
        UserError: When the architecture cannot be exported.
    """
    config = read_json(base_dir / "config.json")
    architecture = find_architecture(config)
    inner = config.get("text_config") or {}
    given = {key: value for key, value in (config | inner).items() if value is not None}
    if "num_experts" not in given and "num_local_experts" in given:
        given["num_experts"] = given["num_local_experts"]
    # What the full-attention layers have in the newer form counts before a default.
    _, sliding = rope_parameters(given)
    local = rope_base(given, "rope_local_base_freq", sliding, "the base model's config.json")
    if local is not None:
        given["rope_local_base_freq"] = local
    return architecture, {**architecture.defaults, **given}


def read_hyperparameters(architecture: Architecture, config: Config) -> Hyperparameters:
    """The hyper-parameters of a config from ``read_model_config``.

    Raises:
        UserError: Listing everything that is missing or that llama.cpp would compute otherwise.
    """
    problems = [*_missing(architecture, config), *_differences(architecture, config)]
    if problems:
        raise UserError(
            "The base model's config.json cannot be exported to GGUF: " + "; ".join(problems) + "."
        )
    rope = read_rope(config)
    if rope.kind not in architecture.ropes:
        raise UserError(
            f"RoPE scaling of type {rope.kind!r} cannot be exported to GGUF for "
            f"{config['model_type']} yet; these can: {', '.join(architecture.ropes)}."
        )
    heads = config["num_attention_heads"]
    head_dim = _head_dim(config)
    return Hyperparameters(
        config=config,
        context_length=config["max_position_embeddings"],
        embedding_length=config["hidden_size"],
        block_count=config["num_hidden_layers"],
        feed_forward_length=config["intermediate_size"],
        head_count=heads,
        head_count_kv=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_dim=int(head_dim * _rotated_share(config)),
        epsilon=config[architecture.epsilon],
        rope=rope,
    )


def write_hyperparameters(
    writer: gguf.GGUFWriter, architecture: Architecture, numbers: Hyperparameters
) -> None:
    """Add every key of the model to ``writer`` except those of its vocabulary."""
    writer.add_context_length(numbers.context_length)
    writer.add_embedding_length(numbers.embedding_length)
    writer.add_block_count(numbers.block_count)
    writer.add_feed_forward_length(numbers.feed_forward_length)
    writer.add_head_count(numbers.head_count)
    writer.add_head_count_kv(numbers.head_count_kv)
    writer.add_key_length(numbers.head_dim)
    writer.add_value_length(numbers.head_dim)
    if architecture.epsilon == "rms_norm_eps":
        writer.add_layer_norm_rms_eps(numbers.epsilon)
    else:
        writer.add_layer_norm_eps(numbers.epsilon)
    for number in architecture.numbers:
        number.write(writer, numbers.config[number.name])
    if architecture.arch == gguf.MODEL_ARCH.PHI3:
        # mlx-lm attends to everything; 0 keeps every version of llama.cpp from a window.
        writer.add_sliding_window(0)
    _write_rope(writer, numbers)


def rope_tensors(numbers: Hyperparameters) -> dict[str, NDArray[np.float32]]:
    """Tensors of what llama.cpp divides each rotary frequency by: ``[rope_dim / 2]`` each."""
    scaling = numbers.rope.scaling
    if numbers.rope.kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(numbers)}
    if numbers.rope.kind in ("longrope", "su"):
        factors = np.array(scaling["long_factor"], np.float32)
        # mlx-lm takes the long factors at every length, and so did the training.
        return {"rope_factors_long.weight": factors, "rope_factors_short.weight": factors}
    return {}


def _llama3_factors(numbers: Hyperparameters) -> NDArray[np.float32]:
    """Llama 3 stretches slow frequencies by ``factor``, keeps fast ones, and blends between."""
    scaling = numbers.rope.scaling
    factor, low, high = (
        float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    exponents = np.arange(0, numbers.rope_dim, 2, dtype=np.float64) / numbers.rope_dim
    wavelengths = 2 * np.pi * numbers.rope.base**exponents
    turns = float(scaling["original_max_position_embeddings"]) / wavelengths
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


def _write_rope(writer: gguf.GGUFWriter, numbers: Hyperparameters) -> None:
    scaling = numbers.rope.scaling
    writer.add_rope_dimension_count(numbers.rope_dim)
    writer.add_rope_freq_base(numbers.rope.base)
    if numbers.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    elif numbers.rope.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(float(scaling.get("beta_fast", 32)))
        writer.add_rope_scaling_yarn_beta_slow(float(scaling.get("beta_slow", 1)))
    elif numbers.rope.kind in ("longrope", "su"):
        original = _original_length(numbers.config)
        stretch = numbers.context_length / original
        attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(attention)


def _original_length(config: Config) -> int:
    parameters, _ = rope_parameters(config)
    given = config.get("original_max_position_embeddings")
    return int(given or parameters.get("original_max_position_embeddings") or 4096)


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rotated_share(config: Config) -> float:
    parameters, _ = rope_parameters(config)
    return config.get("partial_rotary_factor") or parameters.get("partial_rotary_factor") or 1.0


def _missing(architecture: Architecture, config: Config) -> Iterator[str]:
    required = [
        "max_position_embeddings",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        architecture.epsilon,
        *(number.name for number in architecture.numbers),
    ]
    yield from (f"{key} is missing" for key in required if config.get(key) is None)
    scaling = config.get("rope_scaling") or rope_parameters(config)[0]
    kind = str(scaling.get("rope_type") or scaling.get("type"))
    for key in _SCALING_NUMBERS.get(kind, ()):
        if scaling.get(key) is None:
            yield f"the {kind} RoPE scaling has no {key}"


def _differences(architecture: Architecture, config: Config) -> Iterator[str]:
    """What the config says that llama.cpp computes in another way."""
    activation = config.get("hidden_act", architecture.activations[0])
    if activation not in architecture.activations:
        yield (
            f"its activation is {activation!r} where llama.cpp uses {architecture.activations[0]!r}"
        )
    if config.get("rope_traditional"):
        yield "it sets rope_traditional"
    window = "sliding_window" in {number.name for number in architecture.numbers}
    if not window and set(config.get("layer_types") or ()) - {"full_attention"}:
        yield "some of its layers attend to a sliding window"
    for key, allowed in architecture.fixed.items():
        if config.get(key, allowed[0]) not in allowed:
            yield f"its {key} is {config[key]!r} where llama.cpp takes {allowed[0]!r} for granted"
    yield from _gemma_differences(architecture, config)
    if architecture.arch == gguf.MODEL_ARCH.SMOLLM3:
        layers = range(1, config.get("num_hidden_layers", 0) + 1)
        rotated = [int(layer % 4 != 0) for layer in layers]
        interval = config.get("no_rope_layer_interval", 4)
        if config.get("no_rope_layers", rotated) != rotated or interval != 4:
            yield "it leaves out RoPE in other layers than every fourth"


def _gemma_differences(architecture: Architecture, config: Config) -> Iterator[str]:
    largest = _LARGEST_GEMMA.get(architecture.arch)
    if largest is None or not config.get("num_attention_heads"):
        return
    if config.get("num_hidden_layers") == largest:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    else:
        scalar = _head_dim(config)
    if config["query_pre_attn_scalar"] != scalar:
        yield (
            f"its query_pre_attn_scalar is {config['query_pre_attn_scalar']} where llama.cpp "
            f"takes {scalar} for granted"
        )
