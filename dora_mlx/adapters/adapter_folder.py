"""``adapters.safetensors`` and ``adapter_config.json``: the form that mlx-lm loads as it is.

mlx-lm calls a magnitude ``m`` and knows the strength of an update as ``scale``; both are mapped
here and nowhere else.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dora_mlx.adapters.attach import (
    AdapterSpec,
    Method,
    adaptable_layers,
    adapted_places,
    is_embedding,
    is_experts,
    layer_ranks,
    linear_keys,
)
from dora_mlx.adapters.stored import StoredAdapter, merge_names, read_arrays, read_settings
from dora_mlx.atomic import replacing, save_arrays, write_text
from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_weight import is_quantized

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
    _write(folder, trainable_arrays(model), spec)


def write_mlx_adapter(folder: Path, adapter: StoredAdapter) -> None:
    """Write an adapter that mlx-lm loads also where its layers have several ranks.

    mlx-lm has one rank and one scale for all: lower ranks get zeros to the highest, and B takes
    what their scale has more, so that every layer computes what it did.
    """
    if adapter.spec.rank_overrides:
        adapter = _with_one_rank(adapter)
    arrays = {_name_on_disk(name): array for name, array in adapter.arrays.items()}
    _write(folder, arrays, adapter.spec)


def mlx_lm_problems(spec: AdapterSpec, model: nn.Module) -> list[str]:
    """What of an adapter mlx-lm 0.32 cannot load, as sentences; empty if it loads it all.

    ``docs/interop.md`` says why, and a test compares both with mlx-lm itself.
    """
    if spec.method == "full":
        if any(is_quantized(module) for _, module in adaptable_layers(model)):
            return ["All weights were trained, which mlx-lm loads on dense base models only."]
        return []
    if spec.method == "lora":
        return []
    places = [(path, module) for path, _, module in adapted_places(model, spec)]
    kinds = {
        "embeddings, which it adapts by another formula": is_embedding,
        "experts, for which it has no DoRA": is_experts,
        "quantized to 3, 5 or 6 bits, whose width it gets wrong": _has_odd_bits,
    }
    return [
        f"mlx-lm has no DoRA for {', '.join(merge_names(found))}: {why}."
        for why, is_kind in kinds.items()
        if (found := [path for path, module in places if is_kind(module)])
    ]


def _write(folder: Path, arrays: dict[str, mx.array], spec: AdapterSpec) -> None:
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
        save_arrays(temporary, arrays)
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _with_one_rank(adapter: StoredAdapter) -> StoredAdapter:
    spec = adapter.spec
    rank = max(layer_ranks(spec).values())
    # Of the layers at the rank of the spec, which keep their B.
    scale = spec.scale
    arrays = {}
    for name, array in adapter.arrays.items():
        own, axis = _rank_of(name, array)
        if own is not None:
            if name.endswith("lora_b"):
                root = math.sqrt(own) if spec.rslora else own
                array = array * (spec.alpha / root / scale)
            widths = [(0, rank - own) if n == axis else (0, 0) for n in range(array.ndim)]
            array = mx.pad(array, widths)
        arrays[name] = array
    one = replace(spec, rank=rank, alpha=scale * rank, rslora=False, rank_overrides=())
    return StoredAdapter(one, arrays)


def _rank_of(name: str, array: mx.array) -> tuple[int | None, int]:
    """Rank of a factor and the axis that has it; ``None`` for a magnitude."""
    parameter = name.rpartition(".")[2]
    if parameter not in ("lora_a", "lora_b"):
        return None, 0
    # A ``[in, rank]`` and B ``[rank, out]``; for experts ``[n, rank, in]`` and ``[n, out, rank]``.
    axes = {2: {"lora_a": 1, "lora_b": 0}, 3: {"lora_a": 1, "lora_b": 2}}
    axis = axes[array.ndim][parameter]
    return array.shape[axis], axis


def _has_odd_bits(module: nn.Module) -> bool:
    return is_quantized(module) and 32 % module.bits != 0


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
        arrays = {name_in_model(name): array for name, array in arrays.items()}
    return StoredAdapter(spec, arrays)


def _name_on_disk(name: str) -> str:
    return name.removesuffix("magnitude") + "m" if name.endswith(".magnitude") else name


def name_in_model(name: str) -> str:
    """The name that a parameter with ``name`` on disk has in the model."""
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
