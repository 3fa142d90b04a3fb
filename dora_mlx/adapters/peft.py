"""PEFT's form of an adapter: ``adapter_model.safetensors`` and ``adapter_config.json``.

Its matrices lie the other way round (``lora_A [rank, in]``, ``lora_B [out, rank]``), and its
configuration names layers by rules, which are followed here as PEFT follows them.
"""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.adapters.attach import (
    AdapterSpec,
    adaptable_layers,
    adapted_places,
    block_paths,
    is_embedding,
    is_experts,
    layer_ranks,
)
from dora_mlx.adapters.stored import StoredAdapter, merge_names, read_arrays, read_settings
from dora_mlx.atomic import replacing, save_arrays, write_text
from dora_mlx.errors import UserError
from dora_mlx.loading import LoadedModel

PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_CONFIG_FILE = "adapter_config.json"

# Architectures whose layers mlx-lm names as Transformers does; a test compares them.
SAME_NAMES = (
    "cohere",
    "cohere2",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "granite",
    "hunyuan_v1_dense",
    "llama",
    "ministral3",
    "mistral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)

_PREFIX = "base_model.model."
# Parameter of PEFT and of this package, for a linear layer and for an embedding. Magnitudes have
# the ending ``.weight`` or, in files of older versions, none.
_PARAMETERS = {
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
}
_NAME = re.compile(
    rf"{re.escape(_PREFIX)}(?P<path>.+)\.(?P<parameter>{'|'.join(_PARAMETERS)})(\.weight)?"
)
# The untouched weight of an adapted embedding, which PEFT saves beside the adapter.
_BASE_COPY = re.compile(rf"{re.escape(_PREFIX)}.+\.base_layer\.weight")

# Options that are read below, and those that change nothing of what an adapter computes.
_READ = {
    "alpha_pattern",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# These initializations change the base weights, so the adapter is one of other weights.
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_peft_folder(folder: Path) -> bool:
    """Whether ``folder`` has an adapter as PEFT saves it."""
    return (folder / PEFT_WEIGHTS_FILE).is_file() or (folder / "adapter_model.bin").is_file()


def read_peft(folder: Path, model: nn.Module, problems: list[str]) -> StoredAdapter:
    """The adapter in ``folder``; what is wrong goes to ``problems``.

    Raises:
        UserError: If a file is missing or damaged, or the adapter is no LoRA or DoRA.
    """
    if not (folder / PEFT_WEIGHTS_FILE).is_file():
        raise UserError(
            f"{folder} has its weights in adapter_model.bin, a form that can run code when it is "
            "opened. Save the adapter again with a current PEFT, which writes safetensors."
        )
    settings = read_settings(folder / PEFT_CONFIG_FILE)
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{folder} holds an adapter of PEFT of type {settings.get('peft_type')!r}; only LORA, "
            "with use_dora or without, can be used here."
        )
    problems += _unusable_options(settings)
    arrays, paths = {}, set()
    for name, array in read_arrays(folder / PEFT_WEIGHTS_FILE).items():
        match = _NAME.fullmatch(name)
        if match:
            paths.add(match["path"])
            own_name = f"{match['path']}.{_PARAMETERS[match['parameter']]}"
            arrays[own_name] = array if array.ndim < 2 else array.T
        elif not _BASE_COPY.fullmatch(name):
            problems.append(f"{name} is no array of a LoRA or DoRA adapter")
    try:
        spec = _spec_of(settings, model, paths)
        arrays = _rescaled(arrays, spec, settings, model)
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise UserError(
            f"{folder / PEFT_CONFIG_FILE} is not an adapter's configuration: {error!r}."
        ) from error
    return StoredAdapter(spec, arrays)


def peft_problems(spec: AdapterSpec, base: LoadedModel) -> list[str]:
    """What of an adapter PEFT cannot express, as sentences; empty if it can all be written."""
    problems = []
    if spec.method == "full":
        return ["All weights were trained, so there is no adapter that PEFT could load."]
    model_type = base.config.get("model_type")
    if model_type not in SAME_NAMES:
        problems.append(
            f"Transformers may name the layers of {model_type!r} otherwise than mlx-lm does; "
            f"known to be the same are {', '.join(SAME_NAMES)}."
        )
    places = {path: module for path, _, module in adapted_places(base.model, spec)}
    if experts := [p for p, m in places.items() if is_experts(m)]:
        problems.append(
            f"{', '.join(merge_names(experts))} are experts, stacked in one array by mlx-lm, which "
            "PEFT has no layer for."
        )
    tied = base.config.get("tie_word_embeddings", False)
    if tied and any(map(is_embedding, places.values())):
        problems.append(
            "The embedding is also the output layer of this model, where PEFT would not adapt it."
        )
    return problems


def write_peft(
    folder: Path, adapter: StoredAdapter, base: LoadedModel, base_name: str | None = None
) -> None:
    """Write an adapter that ``PeftModel.from_pretrained`` loads, each file atomically.

    Args:
        folder: An existing folder.
        adapter: One that fits ``base``.
        base: The base model; only shapes and names of it are needed.
        base_name: What the adapter says that it belongs to; by default the folder of ``base``.

    Raises:
        UserError: With ``peft_problems``; nothing is written then.
    """
    if problems := peft_problems(adapter.spec, base):
        raise UserError("This adapter cannot be written for PEFT. " + " ".join(problems))
    embeddings = {path for path, module in adaptable_layers(base.model) if is_embedding(module)}
    arrays = {}
    for name, array in adapter.arrays.items():
        path, _, parameter = name.rpartition(".")
        name = _peft_parameter(parameter, path in embeddings)
        arrays[f"{_PREFIX}{path}.{name}"] = mx.contiguous(array if array.ndim < 2 else array.T)
    settings = _settings_of(adapter.spec, base)
    settings["base_model_name_or_path"] = base_name or str(base.path)
    with replacing(folder / PEFT_WEIGHTS_FILE) as temporary:
        save_arrays(temporary, arrays)
    write_text(folder / PEFT_CONFIG_FILE, json.dumps(settings, indent=2) + "\n")


def _peft_parameter(parameter: str, of_embedding: bool) -> str:
    if parameter == "magnitude":
        return "lora_magnitude_vector"
    letter = parameter[-1].upper()
    return f"lora_embedding_{letter}" if of_embedding else f"lora_{letter}.weight"


def _settings_of(spec: AdapterSpec, base: LoadedModel) -> dict[str, Any]:
    """``adapter_config.json``."""
    ranks = layer_ranks(spec)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_dora": spec.method == "dora",
        "use_rslora": spec.rslora,
        "target_modules": sorted(spec.keys),
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {key: rank for key, rank in ranks.items() if rank != spec.rank},
        "alpha_pattern": {},
    }
    blocks = len(base.model.layers)
    if spec.num_layers < blocks:
        settings["layers_to_transform"] = list(range(blocks - spec.num_layers, blocks))
    adapted = {path for path, _, _ in adapted_places(base.model, spec)}
    if _targets(settings, base.model) != adapted:
        # The rules would name other layers as well, so each is named by itself.
        places = {path: ranks[key] for path, key, _ in adapted_places(base.model, spec)}
        settings["target_modules"] = sorted(places)
        settings["layers_to_transform"] = None
        settings["rank_pattern"] = {p: rank for p, rank in places.items() if rank != spec.rank}
    return settings


def _unusable_options(settings: dict[str, Any]) -> list[str]:
    problems = [
        f"its option {name} = {json.dumps(value)} cannot be used here"
        for name, value in sorted(settings.items())
        if name not in _READ | _WITHOUT_EFFECT and value and value != "none"
    ]
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGING_THE_BASE):
        problems.append(
            f"its init_lora_weights {start!r} changed the base weights, so it is no adapter of the "
            "model as it was published; PEFT can convert it when it saves"
        )
    return problems


def _targets(settings: dict[str, Any], model: nn.Module) -> set[str]:
    """Paths of the layers of ``model`` that a configuration of PEFT names."""
    return {path for path, module in adaptable_layers(model) if _is_target(path, module, settings)}


def _is_target(path: str, module: nn.Module, settings: dict[str, Any]) -> bool:
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if excluded and _names(excluded, path):
        return False
    if targets == "all-linear":
        # To PEFT the output layer is none of them.
        return not is_embedding(module) and not path.endswith("lm_head")
    if not targets or not _names(targets, path):
        return False
    chosen = settings.get("layers_to_transform")
    if isinstance(targets, str) or path in targets or chosen is None or chosen == []:
        return True
    patterns = settings.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for pattern in patterns]
    numbers = [int(match[1]) for match in found if match]
    return bool(numbers) and numbers[0] in ([chosen] if isinstance(chosen, int) else chosen)


def _names(rule: str | list[str], path: str) -> bool:
    """Whether ``target_modules`` or ``exclude_modules`` names a layer: a pattern, or endings."""
    if isinstance(rule, str):
        return re.fullmatch(rule, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in rule)


def _by_pattern(patterns: dict[str, Any], path: str, otherwise: Any) -> Any:
    """What ``rank_pattern`` or ``alpha_pattern`` says about a layer."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return otherwise


def _spec_of(settings: dict[str, Any], model: nn.Module, found: set[str]) -> AdapterSpec:
    """The same adapter in the terms of this package, for all layers that should be or are there."""
    rank = int(settings["r"])
    patterns = settings.get("rank_pattern") or {}
    # What no layer of the model answers to is told by the arrays that have no place.
    paths = _targets(settings, model) | (found & {path for path, _ in adaptable_layers(model)})
    ranks = {path: int(_by_pattern(patterns, path, rank)) for path in paths}
    keys, num_layers = _in_blocks(ranks, model)
    return AdapterSpec(
        "dora" if settings.get("use_dora") else "lora",
        rank,
        float(settings["lora_alpha"]),
        float(settings.get("lora_dropout", 0.0)),
        tuple(sorted(keys)),
        num_layers,
        bool(settings.get("use_rslora", False)),
        tuple(f"{key}={own}" for key, own in sorted(keys.items()) if own != rank),
    )


def _in_blocks(ranks: dict[str, int], model: nn.Module) -> tuple[dict[str, int], int]:
    """Ranks by key, and the number of blocks, of the layers that ``ranks`` has by path.

    Where the last n blocks have the same layers with the same ranks, a key is a path inside a
    block; layers of anything else are named by their full paths.
    """
    blocks = block_paths(model)
    inside: list[dict[str, int]] = [
        {p.removeprefix(f"{block}."): r for p, r in ranks.items() if p.startswith(f"{block}.")}
        for block in blocks
    ]
    adapted = [own for own in inside if own]
    count = len(adapted)
    if count and inside[-count:] == adapted and all(own == adapted[0] for own in adapted):
        outside = {
            p: r for p, r in ranks.items() if not p.startswith(tuple(f"{b}." for b in blocks))
        }
        return adapted[0] | outside, count
    return ranks, len(blocks)


def _rescaled(
    arrays: dict[str, mx.array], spec: AdapterSpec, settings: dict[str, Any], model: nn.Module
) -> dict[str, mx.array]:
    """The arrays with every B as if its layer had the alpha of the others."""
    patterns = settings.get("alpha_pattern") or {}
    scaled = dict(arrays)
    for path, _, _ in adapted_places(model, spec):
        own = float(_by_pattern(patterns, path, spec.alpha))
        name = f"{path}.lora_b"
        if own != spec.alpha and name in scaled:
            scaled[name] = scaled[name].astype(mx.float32) * (own / spec.alpha)
    return scaled
