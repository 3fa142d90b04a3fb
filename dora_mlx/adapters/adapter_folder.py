"""``adapters.safetensors`` and ``adapter_config.json``: the form that mlx-lm loads as it is.

mlx-lm calls a magnitude ``m`` and knows the strength of an update as ``scale``; both are mapped
here and nowhere else.
"""

import json
import math
from pathlib import Path
from typing import Any, cast, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dora_mlx.adapters.attach import AdapterSpec, Method, linear_keys
from dora_mlx.adapters.stored import StoredAdapter, read_arrays, read_settings
from dora_mlx.atomic import replacing, save_arrays, write_text
from dora_mlx.errors import UserError

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
# What ``lora_parameters`` may hold; the first four are mlx-lm's.
_LOW_RANK_OPTIONS = {"rank", "scale", "dropout", "keys", "alpha", "rslora", "rank_overrides"}


def trainable_arrays(model: nn.Module) -> dict[str, mx.array]:
    """The trainable parameters of ``model`` under their names on disk."""
    parameters = cast(
        dict[str, mx.array], tree_flatten(model.trainable_parameters(), destination={})
    )
    return {_name_on_disk(name): array for name, array in parameters.items()}


def save_adapter(folder: Path, model: nn.Module, spec: AdapterSpec) -> None:
    """Write the adapter of ``model`` into ``folder``, each file atomically."""
    config = {
        "fine_tune_type": spec.method,
        "num_layers": spec.num_layers,
        "lora_parameters": {
            "rank": spec.rank,
            "scale": spec.scale,
            "dropout": spec.dropout,
            "keys": list(spec.keys),
            # mlx-lm reads the four above. It has one rank for all layers, so it refuses the
            # arrays of a run with rank overrides as misshapen.
            "alpha": spec.alpha,
            "rslora": spec.rslora,
            "rank_overrides": list(spec.rank_overrides),
        },
    }
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_arrays(temporary, trainable_arrays(model))
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def read_mlx_adapter(folder: Path, model: nn.Module, problems: list[str]) -> StoredAdapter:
    """The adapter in ``folder``, of dora_mlx or of mlx-lm; what is wrong goes to ``problems``.

    Raises:
        UserError: If a file is missing or damaged.
    """
    settings = read_settings(folder / CONFIG_FILE)
    try:
        spec = _spec_of(settings, model, problems)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / CONFIG_FILE} is not an adapter's configuration: {error!r}."
        ) from error
    arrays = read_arrays(folder / WEIGHTS_FILE)
    if spec.method != "full":
        arrays = {_name_in_model(name): array for name, array in arrays.items()}
    return StoredAdapter(spec, arrays)


def _name_on_disk(name: str) -> str:
    return name.removesuffix("magnitude") + "m" if name.endswith(".magnitude") else name


def _name_in_model(name: str) -> str:
    return name.removesuffix("m") + "magnitude" if name.endswith(".m") else name


def _spec_of(settings: dict[str, Any], model: nn.Module, problems: list[str]) -> AdapterSpec:
    """What ``adapter_config.json`` says; mlx-lm's has no alpha, and other options beside."""
    method = settings.get("fine_tune_type", "lora")
    if method not in get_args(Method):
        problems.append(
            f"its fine_tune_type {method!r} is not one of {', '.join(get_args(Method))}"
        )
    num_layers = int(settings["num_layers"])
    if method == "full":
        return AdapterSpec("full", 1, 1.0, 0.0, (), len(model.layers))
    low_rank = settings["lora_parameters"]
    unknown = sorted(low_rank.keys() - _LOW_RANK_OPTIONS)
    problems += [f"its option {name!r} is not known" for name in unknown]
    rank, scale = int(low_rank["rank"]), float(low_rank["scale"])
    if "alpha" not in low_rank and not 0 < num_layers <= len(model.layers):
        # To mlx-lm this means all blocks.
        num_layers = len(model.layers)
    spec = AdapterSpec(
        method,
        rank,
        float(low_rank.get("alpha", scale * rank)),
        float(low_rank.get("dropout", 0.0)),
        tuple(low_rank.get("keys") or linear_keys(model, num_layers)),
        num_layers,
        bool(low_rank.get("rslora", False)),
        tuple(low_rank.get("rank_overrides", ())),
    )
    if not math.isclose(spec.scale, scale, rel_tol=1e-6):
        problems.append(f"its scale is {scale:g}, which its alpha makes {spec.scale:g}")
    return spec
