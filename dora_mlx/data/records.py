"""Read chat files: one conversation a line, every problem with its line number."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_mlx.errors import UserError

ROLES = ("system", "user", "assistant")
SPLITS = ("train", "valid", "test")
_PROBLEMS_SHOWN = 12


@dataclass(frozen=True)
class Record:
    """One conversation and where it came from.

    ``messages`` is a list of ``{"role": ..., "content": ...}``; ``line`` counts from 1.
    """

    messages: tuple[dict[str, str], ...]
    path: Path
    line: int

    def digest(self) -> bytes:
        """A hash of the content alone, the same wherever the record stands."""
        return hashlib.sha256(json.dumps(self.messages, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class DataFiles:
    """The files that a ``--data`` argument stands for; no ``valid`` means split ``train``."""

    train: Path
    valid: Path | None


def find_data(data: Path, valid_data: Path | None = None) -> DataFiles:
    """The training and validation files behind a file or a folder.

    Raises:
        UserError: If there is nothing at ``data``, or a folder has no ``train.jsonl``.
    """
    for path in (data, valid_data):
        if path is not None and not path.exists():
            raise UserError(f"There is no data at {path}. Give a JSONL file or a folder of them.")
    if not data.is_dir():
        return DataFiles(data, valid_data)
    train = data / "train.jsonl"
    if not train.is_file():
        raise UserError(f"The data folder {data} has no train.jsonl.")
    valid = data / "valid.jsonl"
    return DataFiles(train, valid_data or (valid if valid.is_file() else None))


def read_records(path: Path) -> list[Record]:
    """All conversations of a JSONL file.

    A line holds ``{"messages": [{"role": ..., "content": ...}, ...]}`` or
    ``{"prompt": ..., "completion": ...}``; blank lines are skipped.

    Raises:
        UserError: If the file cannot be read or is empty; or one report of every bad line.
    """
    records: list[Record] = []
    problems: list[str] = []
    for number, text in enumerate(_lines(path), start=1):
        if not text.strip():
            continue
        try:
            records.append(Record(_messages(_parse(text)), path, number))
        except _BadRecordError as problem:
            problems.append(f"line {number}: {problem}")
    if problems:
        shown = "\n  ".join(problems[:_PROBLEMS_SHOWN])
        more = len(problems) - _PROBLEMS_SHOWN
        rest = f"\n  and {more} more" if more > 0 else ""
        lines = "1 bad line" if len(problems) == 1 else f"{len(problems)} bad lines"
        raise UserError(f"{path} has {lines}; mend or remove them:\n  {shown}{rest}")
    if not records:
        raise UserError(f"{path} is empty: it needs at least one conversation, one a line.")
    return records


class _BadRecordError(Exception):
    """What is wrong with one line."""


def _lines(path: Path) -> list[str]:
    try:
        # Split at newlines only: str.splitlines also splits at U+2028, which JSON allows.
        return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8 JSONL."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadRecordError(f"broken JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise _BadRecordError("the JSON is nested too deeply") from error
    if not isinstance(value, dict):
        raise _BadRecordError(f"expected a JSON object but found {_kind(value)}")
    return value


def _messages(value: dict[str, Any]) -> tuple[dict[str, str], ...]:
    """The conversation in a record, checked."""
    if "messages" in value:
        turns = value["messages"]
    elif "prompt" in value and "completion" in value:
        turns = [
            {"role": "user", "content": value["prompt"]},
            {"role": "assistant", "content": value["completion"]},
        ]
    else:
        raise _BadRecordError("neither 'messages' nor 'prompt' and 'completion' are there")
    if not isinstance(turns, list) or not turns:
        raise _BadRecordError("'messages' must be a list with at least one message")
    messages = tuple(_message(turn, number) for number, turn in enumerate(turns, start=1))
    _check_order([message["role"] for message in messages])
    return messages


def _message(turn: Any, number: int) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise _BadRecordError(f"message {number} is {_kind(turn)}, not an object")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        roles = ", ".join(ROLES)
        raise _BadRecordError(f"message {number} has the role {role!r}; it must be one of {roles}")
    if not isinstance(content, str):
        raise _BadRecordError(f"the content of message {number} is {_kind(content)}, not text")
    if not content.strip():
        raise _BadRecordError(f"message {number} ({role}) is empty")
    return {"role": role, "content": content}


def _check_order(roles: list[str]) -> None:
    if "system" in roles[1:]:
        raise _BadRecordError("a system message may only come first")
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        raise _BadRecordError("there is no assistant message, so nothing to learn from")
    for number, role in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if role != expected:
            place = number + 1 + (roles[0] == "system")
            raise _BadRecordError(
                f"message {place} is from the {role}, but it is the {expected}'s turn"
            )


def _kind(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    if value is None:
        return "missing or null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def split_records(
    records: list[Record], fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Training and validation records, by a rule that depends on content and seed alone.

    The same record lands on the same side whatever else is in the file, and duplicates land
    together.
    """
    threshold = int(fraction * 2**64)
    salt = seed.to_bytes(8, "little", signed=False)
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        draw = hashlib.sha256(salt + record.digest()).digest()[:8]
        sides[int.from_bytes(draw, "little") < threshold].append(record)
    return sides
