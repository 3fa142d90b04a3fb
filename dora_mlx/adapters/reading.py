"""From a folder on the disk to an adapter that is known to fit a model.

One reader for every form: a run folder or a checkpoint of dora_mlx, an adapter of mlx-lm, and one
of PEFT. Everything that is wrong is told in one message.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.adapters.adapter_folder import WEIGHTS_FILE, read_mlx_adapter
from dora_mlx.adapters.attach import AdapterSpec
from dora_mlx.adapters.peft import is_peft_folder, read_peft
from dora_mlx.adapters.stored import StoredAdapter, fit_problems
from dora_mlx.errors import UserError
from dora_mlx.loading import LoadedModel, fingerprint
from dora_mlx.run_folder import RunFolder


def read_adapter(folder: Path, base: LoadedModel) -> StoredAdapter:
    """The adapter in ``folder``, checked against ``base``, which stays as it is.

    Raises:
        UserError: If there is no adapter, or listing everything that does not fit.
    """
    problems = _base_problems(folder, base)
    return _read(folder, base.model, problems, str(base.path))


def load_adapter(folder: Path, model: nn.Module) -> AdapterSpec:
    """Attach the adapter in ``folder`` to ``model``, trainable.

    Raises:
        UserError: As ``read_adapter`` does; nothing is known of the model but its layers.
    """
    return _read(folder, model, [], "").attach_to(model)


def read_spec(folder: Path, model: nn.Module) -> AdapterSpec:
    """What ``load_adapter`` would attach to ``model``, which stays as it is.

    Raises:
        UserError: As ``load_adapter`` does.
    """
    return _read(folder, model, [], "").spec


def run_of(folder: Path) -> dict[str, Any] | None:
    """``config.json`` of the run that an adapter's folder, or its checkpoint, belongs to."""
    for place in (folder, folder.parent.parent):
        run = RunFolder(place)
        if run.config_file.is_file() and "options" in (config := run.read_config()):
            return config
    return None


def _read(folder: Path, model: nn.Module, problems: list[str], model_name: str) -> StoredAdapter:
    if is_peft_folder(folder):
        adapter = read_peft(folder, model, problems)
    elif (folder / WEIGHTS_FILE).is_file():
        adapter = read_mlx_adapter(folder, model, problems)
    else:
        raise UserError(
            f"{folder} holds no adapter: neither {WEIGHTS_FILE} (of dora_mlx or mlx-lm) nor "
            "adapter_model.safetensors (of PEFT) is there."
        )
    if adapter.spec.method != "full":
        # What trains is float32, whatever the file is.
        wide = {name: array.astype(mx.float32) for name, array in adapter.arrays.items()}
        adapter = StoredAdapter(adapter.spec, wide)
    problems += fit_problems(adapter, model)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"{folder} does not fit the model {model_name}".rstrip() + f":{listed}")
    return adapter


def _base_problems(folder: Path, base: LoadedModel) -> list[str]:
    run = run_of(folder)
    if run is None or fingerprint(base.path) == run["model"]["fingerprint"]:
        return []
    return [f"it was trained on another base model: {run['model']['path']}"]
