"""The runs there are: a summary of each from its files, renaming and deleting."""

import functools
import json
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dora_mlx.errors import UserError
from dora_mlx.run_folder import RunFolder, check_run_name, find_run, is_run_name
from dora_mlx.training.events import EVENTS_FILE, RECENT_STEPS, Event, recent_loss

RunStatus = Literal[
    "training", "paused", "completed", "early_stopped", "stopped", "interrupted", "failed", "ended"
]
_STEP = b'{"event": "step"'


@dataclass(frozen=True)
class RunSummary:
    """A run at a glance.

    ``status`` is ``ended`` when its process is gone without having said why (killed, power
    lost); such a run can be resumed. ``created`` is in seconds since the epoch; ``loss`` is
    the mean of the last ten steps; losses are ``None`` before the first.
    """

    folder: RunFolder
    status: RunStatus
    model: str
    method: str
    created: float
    step: int
    steps: int
    loss: float | None
    best_validation: float | None
    has_adapter: bool

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def is_active(self) -> bool:
        """Whether a process trains it now."""
        return self.status in ("training", "paused")

    @property
    def can_resume(self) -> bool:
        """Whether there is something left to train."""
        return self.status in ("stopped", "interrupted", "failed", "ended")


def list_runs(runs_dir: Path) -> list[RunSummary]:
    """Every run in ``runs_dir``, the newest first; a folder that is none is passed over."""
    folders = [RunFolder(path.parent) for path in runs_dir.glob("*/config.json")]
    found = [summarize_run(folder) for folder in folders if is_run_name(folder.name)]
    return sorted(
        (run for run in found if run is not None), key=lambda run: (-run.created, run.name)
    )


def summarize_run(folder: RunFolder) -> RunSummary | None:
    """The summary of a run; ``None`` if its configuration cannot be read."""
    try:
        options: dict[str, Any] = folder.read_config()["options"]
        created = folder.config_file.stat().st_mtime
        has_adapter = (folder.path / "adapters.safetensors").is_file()
    except (UserError, OSError, KeyError, TypeError):
        return None
    facts = _facts_now(folder.path / EVENTS_FILE)
    return RunSummary(
        folder=folder,
        status=run_status(folder, facts.end),
        model=str(options.get("model")),
        method=str(options.get("method")),
        created=created,
        step=facts.step,
        steps=int(options.get("steps") or 0),
        loss=facts.loss,
        best_validation=min(facts.validations, default=None),
        has_adapter=has_adapter,
    )


def run_status(folder: RunFolder, end: Event | None) -> RunStatus:
    """What a run is doing; ``end`` is its last event if that is an end."""
    if folder.holder() is not None:
        return "paused" if folder.pause_file.exists() else "training"
    reason: RunStatus = "ended" if end is None else end["reason"]
    return reason


def delete_run(name: str, runs_dir: Path) -> None:
    """Delete a run with everything in its folder.

    Raises:
        UserError: If there is none, or it is being trained.
    """
    folder = find_run(name, runs_dir)
    # A hidden name first: what another process lists is either a whole run or none.
    doomed = folder.path.with_name(f".{name}.deleted")
    with folder.lock():
        shutil.rmtree(doomed, ignore_errors=True)
        folder.path.rename(doomed)
    shutil.rmtree(doomed)


def rename_run(name: str, new_name: str, runs_dir: Path) -> RunFolder:
    """Give a run another name; returns it there.

    Raises:
        UserError: If the name is taken or cannot be one, or the run is being trained.
    """
    folder = find_run(name, runs_dir)
    check_run_name(new_name)
    renamed = RunFolder(runs_dir / new_name)
    if renamed.path.exists():
        raise UserError(f"There is a run {new_name} already. Choose another name.")
    with folder.lock():
        folder.path.rename(renamed.path)
    return renamed


@dataclass
class _Facts:
    """What a summary takes from the events."""

    step: int
    loss: float | None
    validations: list[float]
    end: Event | None


def _facts_now(path: Path) -> _Facts:
    try:
        status = path.stat()
    except FileNotFoundError:
        return _Facts(0, None, [], None)
    return _facts(path, status.st_ino, status.st_size, status.st_mtime_ns)


# Lists are asked for again and again, and of a hundred runs at most one has changed.
@functools.lru_cache(maxsize=1024)
def _facts(path: Path, inode: int, size: int, changed: int) -> _Facts:
    """Facts about a run whose file is as the other values say.

    Of thousands of steps only those that matter are decoded.
    """
    facts = _Facts(0, None, [], None)
    validations: list[tuple[int, float]] = []
    losses: list[tuple[int, float | None]] = []
    for event in _milestones(path):
        kind = event.get("event")
        facts.end = event if kind == "end" else None
        if kind == "start":
            facts.step = event.get("resumed_from") or 0
            validations = [(step, loss) for step, loss in validations if step <= facts.step]
            losses = [(step, loss) for step, loss in losses if step <= facts.step]
        elif kind == "step":
            facts.step = event["step"]
            losses.append((event["step"], event["loss"]))
        elif kind == "validation" and event["step"] > 0 and event["loss"] is not None:
            # Before the first step it was the base model that was measured.
            validations.append((event["step"], event["loss"]))
    facts.loss = recent_loss(loss for _, loss in losses)
    facts.validations = [loss for _, loss in validations]
    return facts


def _milestones(path: Path) -> Iterator[Event]:
    """The events; of steps that follow each other directly only the last few."""
    steps: deque[bytes] = deque(maxlen=RECENT_STEPS)
    try:
        with open(path, "rb") as file:
            for line in file:
                if line.startswith(_STEP) and line.endswith(b"\n"):
                    steps.append(line)
                    continue
                yield from _decoded(*steps, line)
                steps.clear()
    except FileNotFoundError:
        return
    yield from _decoded(*steps)


def _decoded(*lines: bytes) -> Iterator[Event]:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event
