"""``events.jsonl``: the one record of a run, append-only, one JSON object a line.

Every line has ``event`` (start, step, validation, checkpoint, warning, end) and ``time`` (seconds
since the epoch). The progress bar is one reader of it and the app another.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from dora_mlx.atomic import naming

Event = dict[str, Any]
Listener = Callable[[Event], None]

EVENTS_FILE = "events.jsonl"

# Steps whose mean is called the training loss of a moment: the loss of one batch says little.
RECENT_STEPS = 10


class EventLog:
    """Appends events to a run's ``events.jsonl`` and passes each on to a listener.

    A line is on its way to the disk when ``write`` returns; the last line may be half-written
    after a crash, and readers leave it out. Without a folder nothing is written: what happens is
    recorded by another worker.
    """

    def __init__(self, folder: Path | None, listener: Listener | None = None):
        self._listener = listener
        self._watchers: list[Listener] = []
        self._file: TextIO | None = None
        if folder is not None:
            path = folder / EVENTS_FILE
            _drop_open_line(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        # Closing writes what is left; an error that is on its way already says why it cannot.
        with suppress(OSError) if kind else naming(Path(self._file.name)):
            self._file.close()

    def watch(self, listener: Listener) -> None:
        """Pass every later event on to one more listener, which may write events itself."""
        self._watchers.append(listener)

    def write(self, event: str, **values: Any) -> None:
        """Append one event; a value that is not finite becomes null, which JSON can say.

        Raises:
            OSError: If the disk is full. The line may be half-written, as after a crash.
        """
        if self._file is None:
            return
        line = {"event": event, "time": time.time(), **values}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        with naming(Path(self._file.name)):
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        if self._listener is not None:
            self._listener(line)
        for watcher in self._watchers:
            watcher(line)


class EventReader:
    """Reads the events of a run that may still be going on, only the new ones at each look.

    Args:
        folder: The run's; it need not be there yet.

    Attributes:
        events: The events as the training went, without what a resume undid: a resumed run goes
            on from its checkpoint, and what was recorded behind that step happens again.
    """

    def __init__(self, folder: Path):
        self.events: list[Event] = []
        self._path = folder / EVENTS_FILE
        self._file: tuple[int, int] | None = None
        self._read = 0

    def update(self) -> bool:
        """Read on; returns whether there was anything new. Half-written lines are left."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            changed, self.events, self._file, self._read = bool(self.events), [], None, 0
            return changed
        if (status.st_dev, status.st_ino) != self._file or status.st_size < self._read:
            # Another run was put in the place of this one.
            self.events, self._read = [], 0
            self._file = (status.st_dev, status.st_ino)
        if status.st_size == self._read:
            return False
        with open(self._path, "rb") as file:
            file.seek(self._read)
            *lines, _open = file.read().split(b"\n")
        self._read += sum(len(line) + 1 for line in lines)
        for line in lines:
            self._add(line)
        return bool(lines)

    def _add(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return
        if not isinstance(event, dict) or "event" not in event:
            return
        if event["event"] == "start" and event.get("resumed_from") is not None:
            last = event["resumed_from"]
            # From step 0 the whole run happens again.
            self.events = [
                e for e in self.events if last and e.get("step", 0) <= last and e["event"] != "end"
            ]
        self.events.append(event)


def read_events(folder: Path) -> list[Event]:
    """The events so far of the run in ``folder``, as ``EventReader`` gives them; maybe none."""
    reader = EventReader(folder)
    reader.update()
    return reader.events


def recent_loss(losses: Iterable[float | None]) -> float | None:
    """Mean of the last ``RECENT_STEPS`` losses of steps, those left out that are not finite."""
    recent = [loss for loss in list(losses)[-RECENT_STEPS:] if loss is not None]
    finite = [loss for loss in recent if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else None


def _drop_open_line(path: Path) -> None:
    """Take away what a crash left of a line, so that every line is JSON when the run goes on."""
    if path.is_file():
        written = path.read_bytes()
        if not written.endswith(b"\n"):
            os.truncate(path, written.rfind(b"\n") + 1)
