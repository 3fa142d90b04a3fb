"""The run folder: the only hand-over between training and everything that comes after it.

runs/NAME/
  config.json            every option, versions, fingerprints of base model and data
  events.jsonl           what happened, one JSON object a line
  adapters.safetensors   the best adapter so far, with adapter_config.json; mlx-lm loads both
  adapter_config.json
  checkpoints/           all that is needed to go on; each step_N is an adapter folder as well
  log.txt                what the terminal showed
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_mlx.atomic import write_text
from dora_mlx.errors import UserError

DEFAULT_RUNS_DIR = "runs"
_CHECKPOINT = "step_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the rules for creating and locking it."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def config_file(self) -> Path:
        """``config.json``."""
        return self.path / "config.json"

    @property
    def checkpoints_dir(self) -> Path:
        """``checkpoints/``."""
        return self.path / "checkpoints"

    @property
    def log_file(self) -> Path:
        """``log.txt``."""
        return self.path / "log.txt"

    @property
    def stop_file(self) -> Path:
        """``stop``: while it is there, training ends at the next step with everything saved."""
        return self.path / "stop"

    @property
    def pause_file(self) -> Path:
        """``pause``: while it is there, training waits before the next step."""
        return self.path / "pause"

    def adapter_dir(self, checkpoint: str | None = None) -> Path:
        """Folder of an adapter of this run.

        Args:
            checkpoint: ``None`` for the best adapter, ``last`` for the newest checkpoint's, or
                the number of a step that has one.

        Raises:
            UserError: If there is no such checkpoint; the message names those there are.
        """
        if checkpoint is None:
            return self.path
        paths = checkpoints_newest_first(self.checkpoints_dir)
        chosen = {str(step_of(path)): path for path in paths}
        if checkpoint == "last" and paths:
            return paths[0]
        if checkpoint not in chosen:
            there = f"There are {', '.join(['last', *chosen])}." if chosen else "It has none."
            raise UserError(f"The run {self.name} has no checkpoint {checkpoint!r}. {there}")
        return chosen[checkpoint]

    def write_config(self, config: dict[str, Any]) -> None:
        """Replace ``config.json``."""
        write_text(self.config_file, json.dumps(config, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The content of ``config.json``.

        Raises:
            UserError: If it is missing or damaged.
        """
        try:
            config: dict[str, Any] = json.loads(self.config_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is no run folder: it has no config.json.") from error
        except ValueError as error:
            raise UserError(f"{self.config_file} is damaged: {error}.") from error
        return config

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the lock goes with the process, however it ends.

        Raises:
            UserError: If another process holds it.
        """
        with open(self.path / "lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(
                    f"The run {self.name} is being trained by process {file.read().strip()}. "
                    "Stop that one first, or give this run another --run name."
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def holder(self) -> int | None:
        """Id of the process that trains this run now, if there is one."""
        return lock_holder(self.path / "lock")

    @contextmanager
    def creating(self, overwrite: bool) -> Iterator[None]:
        """Make the folder; if the block fails, all is as it was before.

        Raises:
            UserError: If the run exists and ``overwrite`` is not set, or cannot be made here.
        """
        self.recover()
        if self.path.exists():
            if not overwrite:
                raise UserError(
                    f"The run {self.path} exists already. Go on with it by --resume {self.name}, "
                    "replace it by --overwrite, or choose another --run name."
                )
            with self.lock():
                shutil.rmtree(self._replaced, ignore_errors=True)
                self.path.rename(self._replaced)
        first_run = not self.path.parent.exists()
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"Cannot make the run folder {self.path}: {error.strerror}. "
                "Choose another place by --runs-dir."
            ) from error
        try:
            # What is not held and has no options yet is abandoned.
            with self.lock():
                yield
        except BaseException:
            shutil.rmtree(self.path)
            if self._replaced.exists():
                self._replaced.rename(self.path)
            if first_run:
                self.path.parent.rmdir()
            raise
        shutil.rmtree(self._replaced, ignore_errors=True)

    def recover(self) -> None:
        """Put things back as they were before a process was killed in the midst of ``creating``."""
        if not self.path.is_dir() or {entry.name for entry in self.path.iterdir()} != {"lock"}:
            return
        # Whoever makes the folder now has not written its process id yet, or holds the lock.
        if not (self.path / "lock").read_text(encoding="utf-8") or self.holder() is not None:
            return
        shutil.rmtree(self.path)
        if self._replaced.exists():
            self._replaced.rename(self.path)

    @property
    def _replaced(self) -> Path:
        """Where a run is while the one that replaces it is made."""
        return self.path.with_name(f".{self.name}.replaced")


def is_run_name(name: str) -> bool:
    """Whether a run can be called so."""
    return _NAME.fullmatch(name) is not None


def lock_holder(lock: Path) -> int | None:
    """Id of the process that holds a lock file, which has to have written it there."""
    try:
        with open(lock, encoding="utf-8") as file:
            holder = int(file.read().strip() or 0)
            # The lock is only tried when its writer is there: whoever tries one keeps a process
            # that starts in the same moment from it.
            if not holder or not _is_alive(holder):
                return None
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return holder
    except (OSError, ValueError):
        return None
    # The number belongs to another process by now.
    return None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def checkpoint_name(step: int) -> str:
    """Name of the folder that keeps the state after optimizer step ``step``."""
    return f"{_CHECKPOINT}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step whose state the folder ``checkpoint`` keeps: inverse of ``checkpoint_name``."""
    return int(checkpoint.name.removeprefix(_CHECKPOINT))


def checkpoints_newest_first(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``."""
    return sorted(folder.glob(f"{_CHECKPOINT}*"), reverse=True)


def check_run_name(name: str) -> None:
    """Refuse a name that no run can have.

    Raises:
        UserError: If it is one.
    """
    if not is_run_name(name):
        raise UserError(
            f"{name!r} cannot be a run's name: that has up to 100 letters, digits, dots, dashes "
            "and underscores, and no folder before it."
        )


def new_run(name: str | None, runs_dir: Path, fallback: str) -> RunFolder:
    """The folder for a new run; without a name, ``fallback`` with the first free number.

    Raises:
        UserError: If ``name`` cannot be a folder's name.
    """
    if name is not None:
        check_run_name(name)
        return RunFolder(runs_dir / name)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", fallback).strip("-._")[:80] or "run"
    number = 1
    while (path := runs_dir / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return RunFolder(path)


def find_run(name: str, runs_dir: Path) -> RunFolder:
    """The existing run called ``name``.

    Raises:
        UserError: If there is none; the message names those there are.
    """
    folder = RunFolder(runs_dir / name)
    if is_run_name(name):
        folder.recover()
        if folder.config_file.is_file():
            return folder
    runs = sorted((p.parent for p in runs_dir.glob("[!.]*/config.json")), key=_age)
    known = ", ".join(run.name for run in runs[:8])
    there = f"The newest there are: {known}." if known else "There are none; train one first."
    raise UserError(f"There is no run {name!r} in {runs_dir}. {there}")


def _age(path: Path) -> float:
    return -(path / "config.json").stat().st_mtime
