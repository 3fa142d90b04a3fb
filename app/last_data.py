"""What was chosen last on the tab Data, so that a reload or a restart comes back to it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def remember(file: Path, values: Sequence[Any]) -> None:
    """Keep the values of the tab's controls."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    partial.replace(file)


def recall(file: Path, count: int) -> list[Any] | None:
    """The values that were kept, if there are as many as the tab has controls now."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, list) and len(values) == count else None
