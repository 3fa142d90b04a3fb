"""Read data files: records with their place, and a report of everything that is wrong."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_mlx.data.conversation import (
    BadRowError,
    Message,
    check_characters,
    check_order,
    kind_of,
    odd_character,
)
from dora_mlx.data.forms import (
    FORMS,
    detect_form,
    messages_of,
    parse_columns,
    renamed,
    tools_of,
    unknown_form,
)
from dora_mlx.data.report import Report
from dora_mlx.data.rows import HUB, KINDS, read_rows, unit_of
from dora_mlx.errors import UserError

SPLITS = ("train", "valid", "test")
Source = Path | str


@dataclass(frozen=True)
class Record:
    """One conversation, or one plain text, and where it came from.

    ``messages`` is a list of ``{"role": ..., "content": ...}``, empty for plain ``text``; an
    assistant message with ``weight`` 0 is context only. ``line`` counts from 1.
    """

    messages: tuple[Message, ...]
    path: Source
    line: int
    text: str | None = None
    tools: tuple[Any, ...] | None = None

    def digest(self) -> bytes:
        """A hash of the content alone, the same wherever the record stands."""
        return _digest(self.text if self.text is not None else self.messages, self.tools)


def _digest(*content: Any) -> bytes:
    # The messages alone where there are no tools: the split of older runs must not change.
    hashed = content[0] if len(content) == 1 or content[1] is None else list(content)
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class DataFiles:
    """The sources that a ``--data`` argument stands for; no ``valid`` means split ``train``."""

    train: Source
    valid: Source | None
    test: Source | None = None

    def all(self) -> list[Source]:
        """The sources that there are, training first."""
        return [source for source in (self.train, self.valid, self.test) if source is not None]


def find_data(data: Source, valid_data: Source | None = None) -> DataFiles:
    """The sources behind a file, a folder of splits, or a Hub data set ``hub:owner/name``.

    Raises:
        UserError: If there is nothing at ``data``, or it has no training split.
    """
    valid = None if valid_data is None else find_data(valid_data).train
    if str(data).startswith(HUB):
        from dora_mlx.data.hub import hub_splits

        splits: dict[str, Any] = dict(hub_splits(str(data)))
    elif not Path(data).exists():
        raise UserError(
            f"There is no data at {data}. "
            f"Give a file ({', '.join(KINDS)}, each also with .gz) or a folder of them."
        )
    elif Path(data).is_dir():
        splits = {name: _split_file(Path(data), name) for name in SPLITS}
    else:
        splits = {"train": Path(data)}
    if splits.get("train") is None:
        kinds = ", ".join(KINDS)
        raise UserError(f"The data folder {data} has no train.jsonl (or another of {kinds}).")
    return DataFiles(splits["train"], valid or splits.get("valid"), splits.get("test"))


def _split_file(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder, whatever its kind."""
    names = (split, "validation", "val") if split == "valid" else (split,)
    found = sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and any(path.name in (name + kind, f"{name}{kind}.gz") for name in names for kind in KINDS)
    )
    if len(found) > 1:
        listed = ", ".join(path.name for path in found)
        raise UserError(f"The data folder {folder} has several {split} files ({listed}): keep one.")
    return found[0] if found else None


class RecordReader:
    """The good records of a source, one after the other; the rest goes to ``report``.

    Memory: one row, and about 100 bytes for each row to find duplicates.
    """

    def __init__(self, source: Source, form: str = "auto", columns: tuple[str, ...] = ()):
        self.source = source
        self.form: str | None = None if form == "auto" else form
        self._given = self.form is not None
        self._columns = parse_columns(columns)
        self._unseen = set(self._columns)
        self.report = Report(source, unit_of(source))
        self._seen: dict[bytes, int] = {}
        self._prompts: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[Record]:
        report = self.report
        last = 0
        for row in read_rows(self.source):
            report.rows += 1
            if report.unit == "line" and row.line > last + 1 and last and self.form != "text":
                self._blank_lines(last, row.line)
            last = row.line
            if row.fault is not None:
                report.error(row.line, [row.fault], row.column)
                continue
            try:
                record = self._record(row.value, row.line)
            except BadRowError as error:
                report.error(row.line, error.problems)
                continue
            self._warn(record)
            yield record
        if self.form is not None:
            for name in sorted(self._unseen):
                known = self._columns[name]
                report.notice(f"no row has the column {name!r} of --columns {known}={name}")
        if not report.rows:
            raise UserError(
                f"{self.source} is empty: it needs at least one conversation, one a line."
            )

    def _blank_lines(self, before: int, line: int) -> None:
        """Note blank lines between two JSONL rows."""
        if not str(self.source).lower().removesuffix(".gz").endswith(("jsonl", "ndjson")):
            return
        for number in range(before + 1, min(line, before + 4)):
            self.report.warning(number, "a blank line, which is skipped", "blank lines")

    def _record(self, value: Any, line: int) -> Record:
        if not isinstance(value, dict):
            raise BadRowError(f"expected a JSON object but found {kind_of(value)}")
        self._unseen.difference_update(value)
        row, value = value, renamed(value, self._columns)
        if self.form is None:
            self.form = detect_form(value)
            if self.form is None:
                raise unknown_form(row, self._columns)
        messages = messages_of(value, self._form_of(value, self.form))
        check_characters(value)
        if self.form == "text":
            text = value[FORMS["text"][0][0]]
            if not isinstance(text, str):
                raise BadRowError(f"'text' is {kind_of(text)}, not text")
            if not text.strip():
                raise BadRowError("'text' is empty")
            return Record((), self.source, line, text)
        check_order(messages)
        tools = tools_of(value)
        return Record(
            tuple(messages), self.source, line, tools=None if tools is None else tuple(tools)
        )

    def _form_of(self, value: dict[str, Any], form: str) -> str:
        """The file's form, or for a row of another chat form (files were joined) that one."""
        other = detect_form(value)
        joined = not self._given and other is not None and "text" not in (other, form)
        missing = any(name not in value for name in FORMS[form][0])
        return other if other is not None and joined and missing else form

    def _warn(self, record: Record) -> None:
        """Note what is odd about a record that is good enough."""
        report, line = self.report, record.line
        messages = list(record.messages)
        if record.text is not None:
            messages = [{"role": "user", "content": record.text}]
        if sentence := odd_character(messages):
            report.warning(line, sentence, "control characters")
        if record.messages and messages[-1]["role"] != "assistant":
            sentence = f"the last message is the {messages[-1]['role']}'s, so it is not learned"
            report.warning(line, sentence, "unanswered last messages")
        # Half a hash tells rows apart well enough, at half the memory.
        first = self._seen.setdefault(record.digest()[:16], line)
        if first != line:
            report.warning(line, f"a duplicate of {report.unit} {first}", "duplicates")
        elif record.messages:
            answer = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
            first = self._prompts.setdefault(_digest(messages[:answer])[:16], line)
            if first != line:
                sentence = f"the question of {report.unit} {first} with another answer"
                report.warning(line, sentence, "questions with several answers")


class Split:
    """Which side a record is on, by a rule that depends on its content and a seed alone.

    The same record lands on the same side whatever else is in the file, and duplicates land
    together.
    """

    def __init__(self, fraction: float, seed: int):
        self._threshold = int(fraction * 2**64)
        self._salt = seed.to_bytes(8, "little", signed=False)

    def is_valid(self, digest: bytes) -> bool:
        """Whether the record with this digest is for validation."""
        draw = hashlib.sha256(self._salt + digest).digest()[:8]
        return int.from_bytes(draw, "little") < self._threshold
