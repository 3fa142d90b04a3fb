"""What there is to see of a run: its summary and its events, read on and not read again."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.trainings import Activity, Trainings
from dora_mlx import EventReader, RunFolder, RunSummary, find_run, summarize_run

# Runs whose events are kept in memory, about a kilobyte a step.
_KEPT = 12


@dataclass(frozen=True)
class RunLook:
    """A run at one moment.

    ``summary`` is ``None`` as long as it has no folder; ``activity`` is the last training of the
    app if it was of this run.
    """

    name: str
    summary: RunSummary | None
    events: list[dict[str, Any]]
    activity: Activity | None

    @property
    def is_preparing(self) -> bool:
        """Whether its training was started and has not begun."""
        if self.activity is None or not self.activity.alive:
            return False
        begun = any(event["time"] > self.activity.began for event in self.events[-1:])
        return not begun and not (self.summary is not None and self.summary.is_active)

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to stop and has not yet."""
        return (
            self.summary is not None
            and self.summary.is_active
            and self.summary.folder.stop_file.exists()
        )

    @property
    def version(self) -> tuple[Any, ...]:
        """Differs whenever there is something new to show."""
        last = self.events[-1] if self.events else {}
        status = self.summary.status if self.summary else None
        seen = len(self.events), last.get("time")
        return self.name, status, *seen, self.is_stopping, self.activity


class RunWatch:
    """Looks at runs, for every page of a server."""

    def __init__(self, trainings: Trainings):
        self._trainings = trainings
        self._readers: OrderedDict[Path, EventReader] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, name: str) -> RunLook:
        """The run as it is now.

        Raises:
            UserError: If there is no such run and none on its way.
        """
        activity = self._trainings.status()
        if activity is not None and activity.run != name:
            activity = None
        if activity is not None and not activity.started:
            return RunLook(name, None, [], activity)
        folder = find_run(name, self._trainings.runs_dir)
        return RunLook(name, summarize_run(folder), self.events(folder), activity)

    def events(self, folder: RunFolder) -> list[dict[str, Any]]:
        """The events of a run so far."""
        with self._lock:
            reader = self._readers.pop(folder.path, None) or EventReader(folder.path)
            reader.update()
            self._readers[folder.path] = reader
            if len(self._readers) > _KEPT:
                self._readers.popitem(last=False)
            return list(reader.events)
