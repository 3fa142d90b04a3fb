"""``adapters.safetensors`` and ``adapter_config.json``: the form that mlx-lm loads as it is.

mlx-lm calls a magnitude ``m`` and knows the strength of an update as ``scale``; both are mapped
here and nowhere else.
"""

import json
from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dora_mlx.adapters.attach import AdapterSpec, attach
from dora_mlx.atomic import replacing, save_arrays, write_text
from dora_mlx.errors import UserError

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"


def trainable_arrays(model: nn.Module) -> dict[str, mx.array]:
    """The trainable parameters of ``model`` under their names on disk."""
    parameters = cast(
        dict[str, mx.array], tree_flatten(model.trainable_parameters(), destination={})
    )
    return {_name_on_disk(name): array for name, array in parameters.items()}


def load_trainable_arrays(model: nn.Module, arrays: dict[str, mx.array], source: Path) -> None:
    """Put arrays under their names on disk into the trainable parameters of ``model``.

    Raises:
        UserError: Listing every missing, unexpected or misshapen array; the model is untouched.
    """
    wanted = trainable_arrays(model)
    problems = [f"{name} is missing" for name in wanted if name not in arrays]
    for name, array in arrays.items():
        if name not in wanted:
            problems.append(f"{name} has no place in the model")
        elif array.shape != wanted[name].shape:
            problems.append(f"{name} is {array.shape}, the model needs {wanted[name].shape}")
    if problems:
        shown = "; ".join(problems[:8]) + ("; ..." if len(problems) > 8 else "")
        raise UserError(f"{source} does not fit the model ({len(problems)} problems): {shown}.")
    renamed = [(_name_in_model(name), array) for name, array in arrays.items()]
    model.load_weights(renamed, strict=False)


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


def load_adapter(folder: Path, model: nn.Module) -> AdapterSpec:
    """Attach the adapter kept in ``folder`` to ``model``.

    Raises:
        UserError: If a file is missing or damaged, or the adapter is of another model.
    """
    spec = _read_spec(folder / CONFIG_FILE)
    weights_file = folder / WEIGHTS_FILE
    try:
        arrays = cast(dict[str, mx.array], mx.load(str(weights_file)))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"Cannot read the adapter {weights_file}: {error}.") from error
    attach(
        model,
        spec.method,
        spec.rank,
        spec.alpha,
        spec.dropout,
        spec.keys,
        spec.num_layers,
        spec.rslora,
        spec.rank_overrides,
    )
    load_trainable_arrays(model, arrays, weights_file)
    return spec


def _name_on_disk(name: str) -> str:
    return name.removesuffix("magnitude") + "m" if name.endswith(".magnitude") else name


def _name_in_model(name: str) -> str:
    return name.removesuffix("m") + "magnitude" if name.endswith(".m") else name


def _read_spec(path: Path) -> AdapterSpec:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        low_rank = config["lora_parameters"]
        return AdapterSpec(
            config["fine_tune_type"],
            low_rank["rank"],
            low_rank["alpha"],
            low_rank["dropout"],
            tuple(low_rank["keys"]),
            config["num_layers"],
            low_rank["rslora"],
            tuple(low_rank["rank_overrides"]),
        )
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an adapter configuration of dora_mlx: {error}.") from error
