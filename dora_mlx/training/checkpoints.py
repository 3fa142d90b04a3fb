"""Checkpoints: all that a run needs to go on as if nothing had happened.

A checkpoint is one folder ``checkpoints/step_00000100`` with the trainable parameters, the
optimizer's state and ``state.json``. It is written under a temporary name and renamed when it is
complete and on the disk. Order of the data, dropout and learning rate are functions of the seed
and the step, so the step number is all the state they have.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx

from dora_mlx.atomic import flush_to_disk, save_arrays
from dora_mlx.errors import UserError

_PREFIX = "step_"
_ARRAYS = "arrays.safetensors"
_STATE = "state.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after ``step`` optimizer steps.

    ``tokens`` counts the trained tokens so far; ``best_loss`` is the lowest validation loss
    (``None`` before the first) and ``validations_since_best`` how many followed it;
    ``skipped_in_a_row`` counts steps with a non-finite loss.
    """

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None
    validations_since_best: int = 0
    skipped_in_a_row: int = 0


def save_checkpoint(
    folder: Path, arrays: dict[str, mx.array], progress: Progress, kept: int
) -> Path:
    """Write a checkpoint into ``folder``, keep the newest ``kept`` and return the new one.

    A step that already has its checkpoint keeps it: the state of a step never differs.
    """
    folder.mkdir(exist_ok=True)
    target = folder / f"{_PREFIX}{progress.step:08d}"
    if target.exists():
        return target
    temporary = folder / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_arrays(temporary / _ARRAYS, arrays)
        state = {"progress": asdict(progress), "sha256": _digest(temporary / _ARRAYS)}
        (temporary / _STATE).write_text(json.dumps(state), encoding="utf-8")
        for path in (temporary / _ARRAYS, temporary / _STATE, temporary):
            flush_to_disk(path)
        temporary.rename(target)
        flush_to_disk(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _newest_first(folder)[kept:]:
        shutil.rmtree(old)
    return target


def check_space(folder: Path, trainable_bytes: int, kept: int) -> None:
    """Refuse to start a run whose checkpoints will not fit on the disk of ``folder``.

    Raises:
        UserError: Saying how much is needed and how much is free.
    """
    # A checkpoint has the parameters and two moments each; one more is written before the
    # oldest goes. The adapter is replaced in the same way.
    needed = trainable_bytes * (3 * (kept + 1) + 2)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e6:.0f} MB for checkpoints and has {free / 1e6:.0f} MB "
            "free. Free some space, or choose another place by --runs-dir."
        )


def load_newest_checkpoint(
    folder: Path,
) -> tuple[dict[str, mx.array], Progress, list[Path]] | None:
    """Arrays and progress of the newest intact checkpoint, and the damaged ones passed over.

    Damaged checkpoints are deleted, so that the run can write theirs again. ``None`` if there is
    no intact checkpoint in ``folder``.
    """
    damaged: list[Path] = []
    for path in _newest_first(folder):
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            if state["sha256"] == _digest(path / _ARRAYS):
                arrays = cast(dict[str, mx.array], mx.load(str(path / _ARRAYS)))
                return arrays, Progress(**state["progress"]), damaged
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(path)
        damaged.append(path)
    return None


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps that ``folder`` has a checkpoint of, ascending."""
    return sorted(int(path.name.removeprefix(_PREFIX)) for path in _newest_first(folder))


def load_trained_parameters(folder: Path, step: int) -> dict[str, mx.array]:
    """The trained parameters at ``step``, under their names in the model, read when used.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    path = folder / f"{_PREFIX}{step:08d}"
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        intact = state["sha256"] == _digest(path / _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"The checkpoint {path} is damaged. Look at another one.")
    arrays = cast(dict[str, mx.array], mx.load(str(path / _ARRAYS)))
    prefix = "model."
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*"), reverse=True)


def _digest(path: Path) -> str:
    # hashlib.file_digest needs Python 3.11.
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
