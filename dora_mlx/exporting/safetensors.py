"""A folder in the layout of Hugging Face, loaded by Transformers, mlx-lm and others."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from dora_mlx.errors import UserError
from dora_mlx.exporting.folder import FolderWriter
from dora_mlx.exporting.merge import Weights
from dora_mlx.exporting.rope import read_rope
from dora_mlx.exporting.stored import Spec, Stored
from dora_mlx.exporting.writer import ExportSource

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16}
_CONFIG_NAMES = {"bf16": "bfloat16", "f16": "float16"}


@dataclass(frozen=True)
class Experts:
    """How a mixture's experts are named in a checkpoint: one matrix each.

    mlx-lm stacks them to ``{block}.switch_mlp.{projection}``; a checkpoint has
    ``{block}.experts.{number}.{name}``, with ``names`` from one to the other.
    """

    block: str
    names: dict[str, str]


_PROJECTIONS = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

# The inverse of mlx-lm's ``sanitize`` for every architecture that is written here: ``None`` where
# its names are the checkpoint's. The tests run the real one on what this gives.
MODEL_TYPES: dict[str, Experts | None] = {
    "llama": None,
    "mistral": None,
    "mixtral": Experts("block_sparse_moe", _MIXTRAL),
    "qwen2": None,
    "qwen2_moe": Experts("mlp", _PROJECTIONS),
    "qwen3": None,
    "qwen3_moe": Experts("mlp", _PROJECTIONS),
    "gemma2": None,
    "gemma3_text": None,
    "phi3": None,
    "smollm3": None,
    "olmo2": None,
    "granite": None,
    "starcoder2": None,
}


def stored_tensors(weights: Weights, model_type: str, dtype: mx.Dtype) -> list[Stored]:
    """The tensors of the checkpoint, under its names; computes nothing."""
    experts = MODEL_TYPES[model_type]
    return [_stored(weights, name, experts, dtype) for name in weights]


def _stored(weights: Weights, name: str, experts: Experts | None, dtype: mx.Dtype) -> Stored:
    shape = weights.shapes()[name]
    names, shape = ([name], shape) if experts is None else _unstacked(name, shape, experts)
    specs = dict.fromkeys(names, Spec(shape, dtype))
    rows = 1 if len(shape) == 1 else shape[0]

    def chunks() -> Iterator[tuple[str, mx.array]]:
        row = 0
        for block in weights.blocks(name):
            # A block of rows may end in one expert and go on in the next.
            while block.shape[0]:
                number, inside = divmod(row, rows)
                part = block[: rows - inside]
                yield names[number], part
                row += part.shape[0]
                block = block[part.shape[0] :]

    return Stored(specs, chunks)


def _unstacked(
    name: str, shape: tuple[int, ...], experts: Experts
) -> tuple[list[str], tuple[int, ...]]:
    """The checkpoint's names of a stack of experts, and the shape of each."""
    block, found, rest = name.partition(f".{experts.block}.switch_mlp.")
    if not found:
        return [name], shape
    projection, _, part = rest.partition(".")
    own = f"{block}.{experts.block}.experts.{{}}.{experts.names[projection]}.{part}"
    return [own.format(number) for number in range(shape[0])], shape[1:]


def plain_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A ``config.json`` for Transformers and mlx-lm alike, of weights that are not quantized.

    Raises:
        UserError: When the architecture is not in ``MODEL_TYPES`` or computes what Transformers
            does not.
    """
    config = dict(config)
    if config.get("model_type") not in MODEL_TYPES:
        raise UserError(
            f"Models of type {config.get('model_type')!r} cannot be exported to safetensors yet; "
            f"these can: {', '.join(MODEL_TYPES)}."
        )
    if config.get("rope_traditional"):
        raise UserError(
            "This model rotates neighbouring channels (rope_traditional), which Transformers "
            "does not do for its architecture, so it cannot be exported."
        )
    rope = read_rope(config)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    # Transformers 5 writes rope_parameters only, and mlx-lm reads the older names only.
    config["rope_theta"] = rope.base
    if rope.kind != "default":
        config["rope_scaling"] = {"rope_type": rope.kind, **rope.scaling}
    config["torch_dtype"] = dtype
    if "dtype" in config:
        config["dtype"] = dtype
    return config


class SafetensorsWriter(FolderWriter):
    """See ``Writer``."""

    # Transformers refuses a file that does not say which framework's layout it has.
    source_format = "pt"

    def tensors(self, source: ExportSource, quant: str) -> list[Stored]:
        """What the folder holds, in order; computes nothing."""
        return stored_tensors(source.weights, source.base.config["model_type"], DTYPES[quant])

    def config(self, source: ExportSource, quant: str) -> dict[str, Any]:
        """The folder's ``config.json``, or a ``UserError``."""
        config = plain_config(source.base.config, _CONFIG_NAMES[quant])
        # Transformers and mlx-lm take different defaults where the base model's is silent.
        config["tie_word_embeddings"] = "lm_head.weight" not in source.weights
        return config

    def precision(self, source: ExportSource, quant: str) -> mx.Dtype | None:
        """The type of the weights."""
        return DTYPES[quant]


WRITER = SafetensorsWriter()
