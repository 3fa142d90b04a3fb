"""A model without its weights: every module and shape, from the configuration alone.

Where a model folder is on this machine its headers say everything. Without weights two small files
do, ``config.json`` and the index of the weights, in a folder or on the Hub; without a network the
registry knows the sizes of the models with a short name.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_mlx.errors import UserError
from dora_mlx.loading import load_lazily, settled_arguments
from dora_mlx.model_config import Config, read_json
from dora_mlx.registry import (
    ModelShape,
    download_file,
    find_entry,
    folder_without_weights,
    local_folder,
)

if TYPE_CHECKING:
    from mlx.nn.layers.base import Module

_INDEX = "model.safetensors.index.json"
_4_BIT = {"group_size": 64, "bits": 4}


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before its weights are there.

    Attributes:
        source: Where from: ``folder``, ``configuration`` (a folder without weights), ``hub`` or
            ``registry``.
        folder: The model folder, if it is on this machine with its weights.
        config: Its configuration, or one of a llama of the same sizes.
        weights: Names of its tensors, or ``None`` where they are unknown.
    """

    source: str
    folder: Path | None
    config: Config
    weights: frozenset[str] | None


def find_facts(name: str, ask_hub: bool = True) -> ModelFacts:
    """What is known of the model ``name``.

    Args:
        name: Alias, folder (of which ``config.json`` is enough) or Hub name.
        ask_hub: Whether the Hub may be asked about a model that the registry knows as well.

    Raises:
        UserError: If there is no such model, or the Hub is needed and does not answer.
    """
    entry = find_entry(name)
    if entry is None and (described := folder_without_weights(name)) is not None:
        return _described("configuration", read_json(described / "config.json"), described / _INDEX)
    folder = local_folder(name)
    if folder is not None:
        return ModelFacts("folder", folder, read_json(folder / "config.json"), None)
    if entry is None or entry.hub is None or entry.shape is None:
        return _from_hub(name)
    if not ask_hub:
        return _from_registry(entry.shape)
    try:
        return _from_hub(entry.hub)
    except UserError:
        return _from_registry(entry.shape)


def build_skeleton(facts: ModelFacts) -> "Module":
    """The model with all its modules and none of its weights read, as MLX would hold it.

    Must not be evaluated: arrays are stand-ins, or as large as the model.

    Raises:
        UserError: If mlx-lm cannot build it.
    """
    import mlx.core as mx

    from dora_mlx.kernels.blocked_layers import use_blocked_products
    from dora_mlx.kernels.device import on_cpu

    if facts.folder is not None:
        model, _ = load_lazily(facts.folder)
    else:
        model = _from_configuration(facts)
    if on_cpu():
        model.set_dtype(mx.float32)
        use_blocked_products(model)
    return model


def _from_configuration(facts: ModelFacts) -> "Module":
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.utils import _get_classes

    config = facts.config
    where = Path(config.get("_name_or_path") or "the model")
    arguments: Any
    arguments, overrides = settled_arguments(config, where)
    config = {**config, **overrides}
    model_class, _ = _get_classes(config)
    try:
        model = model_class(arguments.from_dict(config))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"mlx-lm cannot build this {config['model_type']} model: {error}."
        ) from error
    kind = config.get("torch_dtype") or config.get("dtype")
    model.set_dtype(mx.float16 if kind == "float16" else mx.bfloat16)
    quantization = config.get("quantization")
    if isinstance(quantization, dict):
        nn.quantize(
            model,
            group_size=quantization.get("group_size", 64),
            bits=quantization.get("bits", 4),
            mode=quantization.get("mode", "affine"),
            class_predicate=functools.partial(_is_quantized, facts.weights, quantization),
        )
    return model


def _is_quantized(
    weights: frozenset[str] | None, quantization: Config, path: str, module: "Module"
) -> Any:
    """Whether, or how, a layer is quantized, in the form that MLX asks for."""
    if path in quantization:
        return quantization[path]
    if not hasattr(module, "to_quantized"):
        return False
    if weights is not None:
        return f"{path}.scales" in weights
    return module["weight"].shape[-1] % quantization.get("group_size", 64) == 0


def _from_registry(shape: ModelShape) -> ModelFacts:
    """A llama of the sizes in the registry: the layers of the other models are much like its."""
    config = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "quantization": _4_BIT,
    }
    return ModelFacts("registry", None, config, None)


@functools.lru_cache(maxsize=32)
def _from_hub(repo: str) -> ModelFacts:
    file = download_file(repo, "config.json")
    config = read_json(file) if file is not None else {}
    return _described("hub", config, download_file(repo, _INDEX, required=False))


def _described(source: str, config: Config, index: Path | None) -> ModelFacts:
    names = read_json(index).get("weight_map") if index is not None and index.is_file() else None
    weights = frozenset(names) if isinstance(names, dict) else None
    return ModelFacts(source, None, config, weights)
