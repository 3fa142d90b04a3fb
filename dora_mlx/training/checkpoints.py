"""Checkpoints: all that a run needs to go on as if nothing had happened.

A checkpoint is one folder ``checkpoints/step_00000100``: the adapter as mlx-lm and this package
load it, ``optimizer.safetensors`` and ``state.json``. It is written under a temporary name and
renamed when it is complete and on the disk. Order of the data, dropout and learning rate are
functions of the seed, the step and the position in the data, so these numbers are all the state
they have.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.adapters.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    name_in_model,
    save_adapter,
)
from dora_mlx.adapters.attach import AdapterSpec
from dora_mlx.atomic import flush_to_disk, save_arrays
from dora_mlx.errors import UserError
from dora_mlx.run_folder import checkpoint_name, checkpoints_newest_first, step_of

_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
# Of what a checkpoint holds; the first ones did not say it.
_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands after ``step`` optimizer steps.

    ``position`` is the next batch of the data, counted over all epochs; ``tokens`` counts the
    trained tokens so far; ``best_loss`` is the lowest validation loss (``None`` before the first)
    and ``validations_since_best`` how many followed it; ``skipped_in_a_row`` counts steps with a
    non-finite loss.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    best_loss: float | None = None
    validations_since_best: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back; arrays have the names of the model and of the optimizer's state."""

    path: Path
    adapter: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    progress: Progress


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    spec: AdapterSpec,
    optimizer: dict[str, mx.array],
    progress: Progress,
    keep: int,
) -> Path | None:
    """Write a checkpoint into ``folder``, leave the newest ``keep`` and return the new one.

    A step that already has its checkpoint keeps it, and nothing is returned: the state of a step
    never differs.
    """
    folder.mkdir(exist_ok=True)
    target = folder / checkpoint_name(progress.step)
    if target.exists():
        return None
    temporary = folder / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_adapter(temporary, model, spec)
        save_arrays(temporary / _OPTIMIZER, optimizer)
        digests = {path.name: _digest(path) for path in sorted(temporary.iterdir())}
        state = {"version": _VERSION, "progress": asdict(progress), "sha256": digests}
        (temporary / _STATE).write_text(json.dumps(state), encoding="utf-8")
        for path in (temporary / _OPTIMIZER, temporary / _STATE, temporary):
            flush_to_disk(path)
        temporary.rename(target)
        flush_to_disk(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints_newest_first(folder)[keep:]:
        shutil.rmtree(old)
    return target


def check_space(folder: Path, trainable_bytes: int, keep: int) -> None:
    """Refuse to start a run whose checkpoints will not fit on the disk of ``folder``.

    Raises:
        UserError: Saying how much is needed and how much is free.
    """
    # A checkpoint has the parameters and two moments each; one more is written before the
    # oldest goes. The adapter is replaced in the same way.
    needed = trainable_bytes * (3 * (keep + 1) + 2)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e6:.0f} MB for checkpoints and has {free / 1e6:.0f} MB "
            "free. Free some space, or choose another place by --runs-dir."
        )


def load_newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The newest intact checkpoint in ``folder``, if any, and the damaged ones passed over.

    Damaged checkpoints newer than it are deleted, so that the run can write theirs again. Where
    none is intact they stay: without them the run would look as if it had never had one.

    Raises:
        UserError: If one that would be used is of another version of this package.
    """
    damaged: list[Path] = []
    for path in checkpoints_newest_first(folder):
        checkpoint = _read_checkpoint(path)
        if checkpoint is not None:
            for one in damaged:
                shutil.rmtree(one)
            return checkpoint, damaged
        damaged.append(path)
    return None, damaged


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps that a run keeps a checkpoint of, ascending; ``folder`` is its ``checkpoints``."""
    return sorted(step_of(path) for path in checkpoints_newest_first(folder))


def load_trained_parameters(folder: Path, step: int) -> dict[str, mx.array]:
    """The trained parameters at ``step``, under their names in the model, read when used.

    Raises:
        UserError: If the checkpoint is damaged or of another version of this package.
    """
    path = folder / checkpoint_name(step)
    checkpoint = _read_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"The checkpoint {path} is damaged. Look at another one.")
    return checkpoint.adapter


def _read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at ``path``, or ``None`` if it is not as it was written.

    Raises:
        UserError: If it says that it is of a version that is not understood.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        _check_version(path, state.get("version", _VERSION))
        progress = _progress_of(state["progress"])
        files = (WEIGHTS_FILE, CONFIG_FILE, _OPTIMIZER)
        if any(state["sha256"][name] != _digest(path / name) for name in files):
            return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    adapter, optimizer = (
        cast(dict[str, mx.array], mx.load(str(path / name))) for name in (WEIGHTS_FILE, _OPTIMIZER)
    )
    adapter = {name_in_model(name): array for name, array in adapter.items()}
    return Checkpoint(path, adapter, optimizer, progress)


def _check_version(path: Path, version: Any) -> None:
    """Refuse another version; anything but a whole number is no version, but damage."""
    if not isinstance(version, int):
        raise TypeError("a version is a whole number")
    if version != _VERSION:
        raise UserError(
            f"The checkpoint {path} was written by another version of dora-mlx. Go on with "
            f"that version, or begin a new run with its adapter by --init-adapter {path}."
        )


def _progress_of(saved: dict[str, Any]) -> Progress:
    """The progress in a state; raises TypeError or KeyError where it is not as it was written."""
    for one in fields(Progress):
        if not isinstance(saved[one.name], cast(type, one.type)):
            raise TypeError(f"{one.name} is of another type")
    return Progress(**saved)


def _digest(path: Path) -> str:
    # hashlib.file_digest needs Python 3.11.
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
