"""``events.jsonl``: the one record of a run, append-only, one JSON object a line.

Every line has ``event`` (start, step, validation, checkpoint, warning, end) and ``time`` (seconds
since the epoch). The progress bar is one reader of it and the app another.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

Event = dict[str, Any]
Listener = Callable[[Event], None]

EVENTS_FILE = "events.jsonl"


class EventLog:
    """Appends events to a run's ``events.jsonl`` and passes each on to a listener.

    A line is on its way to the disk when ``write`` returns; the last line may be half-written
    after a crash, and readers skip it.
    """

    def __init__(self, folder: Path, listener: Listener | None = None):
        self._listener = listener
        path = folder / EVENTS_FILE
        _end_last_line(path)
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, event: str, **values: Any) -> None:
        """Append one event; a value that is not finite becomes null, which JSON can say."""
        line = {"event": event, "time": time.time(), **values}
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self._listener is not None:
            self._listener(line)


def read_events(folder: Path) -> list[Event]:
    """The events of the run in ``folder`` as its training went, without what a resume undid.

    A half-written line is skipped. A resumed run goes on from its checkpoint: what was recorded
    behind that step before the interruption happens again and is left out here.
    """
    path = folder / EVENTS_FILE
    events: list[Event] = []
    if not path.exists():
        return events
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict) or "event" not in event:
                continue
            if event["event"] == "start" and event.get("resumed_from") is not None:
                resumed = event["resumed_from"]
                events = [e for e in events if e.get("step", 0) <= resumed and e["event"] != "end"]
            events.append(event)
    return events


def _end_last_line(path: Path) -> None:
    """Close a line that a crash left open, so that the next event gets a line of its own."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as file:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
