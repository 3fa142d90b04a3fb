"""Trainings as processes of their own: started here, found again after any restart.

A training is ``python -m dora_mlx.train``, and everything about it is on the disk: the run folder
that it writes, and in the folder ``.app`` beside the runs what only its starter knows. No state is
kept in the server, so a page, the server and the training may end in any order.

Only one may go on at a time. The lock on ``.app/training.lock`` is taken here and handed to the
child, so the system frees it when the training ends, however that is.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_mlx import (
    RunFolder,
    TrainConfig,
    UserError,
    find_run,
    list_runs,
    lock_holder,
    train_command,
)

# What of a log is worth showing: a training says its errors at its end.
_LOG_TAIL = 20_000
_SECONDS_BETWEEN_SIGNALS = 0.2


@dataclass(frozen=True)
class Activity:
    """The training that was started last by this app or a former one.

    Attributes:
        run: Name of its run.
        began: When it was started or resumed, in seconds since the epoch.
        alive: Whether its process is there.
        started: Whether its run has its folder: before, model and data are being prepared.
        error: What it could not start for, in its own words; empty if there was nothing.
    """

    run: str
    began: float
    alive: bool
    started: bool
    error: str


class Trainings:
    """Starts, stops and finds trainings in one folder of runs."""

    def __init__(self, runs_dir: Path):
        self.runs_dir = runs_dir
        self._place = runs_dir / ".app"

    @property
    def log_file(self) -> Path:
        """What the last training wrote to its terminal."""
        return self._place / "training.log"

    @property
    def _record(self) -> Path:
        return self._place / "training.json"

    @property
    def _lock_file(self) -> Path:
        return self._place / "training.lock"

    def start(self, config: TrainConfig, run: str) -> None:
        """Start a new run.

        Raises:
            UserError: If another training goes on, or the name is taken.
        """
        if (self.runs_dir / run).exists():
            raise UserError(f"There is a run {run} already. Give the new one another name.")
        self._launch(run, train_command(config, run, self.runs_dir))

    def resume(self, run: str) -> None:
        """Go on with a run that was stopped or broke off.

        Raises:
            UserError: If another training goes on, or there is no such run.
        """
        folder = find_run(run, self.runs_dir)
        folder.pause_file.unlink(missing_ok=True)
        folder.stop_file.unlink(missing_ok=True)
        self._launch(run, ["--resume", run, "--runs-dir", str(self.runs_dir)])

    def stop(self, run: str) -> None:
        """Ask a run to end after its current step with everything saved."""
        find_run(run, self.runs_dir).stop_file.touch()

    def cancel(self) -> None:
        """End the training that is still being prepared; it leaves nothing behind."""
        # The first signal asks to stop after the step that never comes, the second means it.
        for _ in range(2):
            process = lock_holder(self._lock_file)
            if process is not None:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
                time.sleep(_SECONDS_BETWEEN_SIGNALS)

    def pause(self, run: str) -> None:
        """Ask a run to wait before its next step."""
        find_run(run, self.runs_dir).pause_file.touch()

    def unpause(self, run: str) -> None:
        """Let a paused run go on."""
        find_run(run, self.runs_dir).pause_file.unlink(missing_ok=True)

    def forget(self, run: str) -> None:
        """The last training is none to speak of if it was of this run, which has just gone."""
        last = self.status()
        if last is not None and last.run == run and not last.alive:
            self._record.unlink(missing_ok=True)

    def status(self) -> Activity | None:
        """The last training, or ``None`` if there never was one."""
        try:
            last: dict[str, Any] = json.loads(self._record.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        run = RunFolder(self.runs_dir / last["run"])
        alive = lock_holder(self._lock_file) is not None
        started = run.config_file.is_file()
        return Activity(run.name, last["began"], alive, started, "" if alive else self._error())

    def log(self) -> str:
        """The end of what the last training wrote to its terminal."""
        try:
            with open(self.log_file, "rb") as file:
                file.seek(max(0, self.log_file.stat().st_size - _LOG_TAIL))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def _launch(self, run: str, words: list[str]) -> None:
        active = next((r.name for r in list_runs(self.runs_dir) if r.is_active), None)
        self._place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self._lock_file, "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                active = active or "another run"
            if active is not None:
                raise UserError(
                    f"{active} is being trained, and one training at a time is what the memory of "
                    "a machine is for. Wait for it to end, or stop it first."
                )
            command = [sys.executable, "-m", "dora_mlx.train", *words]
            record = {"run": run, "began": time.time()}
            self._record.write_text(json.dumps(record), encoding="utf-8")
            lock.truncate(0)
            with open(self.log_file, "wb") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
            lock.write(str(process.pid))
        # Without a wait the ended child would stay in the process table as long as the server.
        threading.Thread(target=process.wait, daemon=True).start()

    def _error(self) -> str:
        """The error message at the end of the log."""
        _, found, message = f"\n{self.log()}".rpartition("\nerror: ")
        return message.strip() if found else ""
