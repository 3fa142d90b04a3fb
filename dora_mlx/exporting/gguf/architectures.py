"""Which models become which GGUF architecture, and how their tensors change on the way.

llama.cpp rotates neighbouring channels for the architectures marked ``permuted``, where the
checkpoints rotate the two halves of a head: their query and key rows are reordered. A new
architecture is an entry in ``ARCHITECTURES`` plus a case in the tests with real llama.cpp.
"""

from dataclasses import dataclass
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dora_mlx.errors import UserError
from dora_mlx.exporting.rope import Rope, read_rope

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Architecture:
    """How one ``model_type`` is written."""

    gguf_arch: gguf.MODEL_ARCH
    permuted: bool


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, permuted=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, permuted=True),
}


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of ``config.json`` that llama.cpp needs to build the model."""

    context_length: int
    embedding_length: int
    block_count: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file: where it comes from, its name, and its shape.

    ``heads`` is the number of heads whose rows are reordered, or 0.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int

    def arrange(self, tensor: mx.array) -> mx.array:
        """``tensor`` as the file wants it, same shape."""
        return permute_heads(tensor, self.heads) if self.heads else tensor


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


def read_hyperparameters(config: dict[str, Any]) -> Hyperparameters:
    """The hyper-parameters of a ``config.json``.

    Raises:
        UserError: Listing everything that is missing or that llama.cpp would compute otherwise.
    """
    problems = [*_missing(config), *_unsupported(config)]
    if problems:
        raise UserError(
            "The base model's config.json cannot be exported to GGUF: " + "; ".join(problems) + "."
        )
    rope = read_rope(config)
    if rope.kind not in ROPE_KINDS:
        raise UserError(
            f"RoPE scaling of type {rope.kind!r} cannot be exported to GGUF yet; these can: "
            f"{', '.join(ROPE_KINDS)}."
        )
    heads = config["num_attention_heads"]
    return Hyperparameters(
        context_length=config["max_position_embeddings"],
        embedding_length=config["hidden_size"],
        block_count=config["num_hidden_layers"],
        feed_forward_length=config["intermediate_size"],
        head_count=heads,
        head_count_kv=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rms_norm_eps=config["rms_norm_eps"],
        rope=rope,
    )


def plan_tensors(
    architecture: Architecture, numbers: Hyperparameters, shapes: dict[str, tuple[int, ...]]
) -> list[TensorPlan]:
    """One plan for every tensor in ``shapes``, in the same order.

    Raises:
        UserError: When a tensor has no place in the architecture, or does not fit the config.
    """
    names = gguf.get_tensor_name_map(architecture.gguf_arch, numbers.block_count)
    plans = []
    for source, shape in shapes.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                f"{source} has no place in a GGUF file of a "
                f"{gguf.MODEL_ARCH_NAMES[architecture.gguf_arch]} model, so this model cannot be "
                "exported yet."
            )
        heads = _permuted_heads(name, numbers) if architecture.permuted else 0
        if heads and shape[0] != heads * numbers.head_dim:
            raise UserError(
                f"{source} has {shape[0]} rows where config.json says {heads} heads of "
                f"{numbers.head_dim}. Export with the config.json this model was trained from."
            )
        plans.append(TensorPlan(source, name, shape, heads))
    return plans


def permute_heads(tensor: mx.array, heads: int) -> mx.array:
    """Rows from half-split to neighbouring order, head by head; shape is kept.

    ``[heads * head_dim, ...]``: row i of a head's first half goes to 2 i, of its second to 2 i + 1.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def rope_frequency_factors(numbers: Hyperparameters) -> NDArray[np.float32] | None:
    """What llama.cpp divides each rotary frequency by: ``[head_dim / 2]``, or ``None`` for 1.

    Llama 3 stretches slow frequencies by ``factor``, keeps fast ones, and blends between.
    """
    if numbers.rope.kind != "llama3":
        return None
    scaling = numbers.rope.scaling
    factor, low, high = (
        float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    exponents = np.arange(0, numbers.head_dim, 2, dtype=np.float64) / numbers.head_dim
    wavelengths = 2 * np.pi * numbers.rope.base**exponents
    turns = float(scaling["original_max_position_embeddings"]) / wavelengths
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


def _permuted_heads(name: str, numbers: Hyperparameters) -> int:
    part = name.split(".")[-2]
    return {"attn_q": numbers.head_count, "attn_k": numbers.head_count_kv}.get(part, 0)


def _missing(config: dict[str, Any]) -> list[str]:
    required = [
        "max_position_embeddings",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "rms_norm_eps",
    ]
    problems = [f"{key} is missing" for key in required if config.get(key) is None]
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    needed = {
        "linear": ["factor"],
        "llama3": [
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ],
    }
    kind = str(scaling.get("rope_type") or scaling.get("type"))
    return problems + [
        f"the {kind} RoPE scaling has no {key}"
        for key in needed.get(kind, [])
        if key not in scaling
    ]


def _unsupported(config: dict[str, Any]) -> list[str]:
    problems = []
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"its activation is {config['hidden_act']!r} where llama.cpp uses 'silu'")
    if config.get("rope_traditional"):
        problems.append("it sets rope_traditional")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        problems.append("some of its layers attend to a sliding window")
    return problems
