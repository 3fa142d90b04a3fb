"""Rows of a file of any kind, one at a time: a value with its line, or what is wrong there."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dora_mlx.data.json_array import json_values
from dora_mlx.data.opening import (
    LONGEST_LINE,
    damaged_text,
    has_parquet_magic,
    lines_of,
    open_text,
    seekable,
    suffix_of,
)
from dora_mlx.errors import UserError

_PARQUET_ROWS = 1024
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
HUB = "hub:"


@dataclass(frozen=True)
class Row:
    """One row: ``value``, or ``fault`` and maybe the ``column`` where it is.

    ``line`` counts from 1: the first line of the row, or its number in files without lines.
    """

    line: int
    value: Any = None
    fault: str | None = None
    column: int | None = None


def unit_of(source: Path | str) -> str:
    """What ``Row.line`` counts in a source."""
    return "row" if isinstance(source, str) or has_parquet_magic(source) else "line"


def read_rows(source: Path | str) -> Iterator[Row]:
    """The rows of a file, or of a split of a Hub data set (``hub:owner/name#split``).

    Holds one row (JSONL, CSV, text), one value (JSON array) or one batch (Parquet) in memory.

    Raises:
        UserError: If the file cannot be read at all.
    """
    if isinstance(source, str):
        from dora_mlx.data.hub import hub_rows

        yield from (Row(number, value) for number, value in hub_rows(source))
        return
    suffix = suffix_of(source)
    if has_parquet_magic(source):
        yield from _parquet_rows(source)
        return
    if suffix == ".parquet":
        raise UserError(f"{source} is not a Parquet file: it does not begin as one does.")
    with open_text(source) as text:
        if suffix in (".csv", ".tsv"):
            yield from _table_rows(text, source)
        elif suffix == ".txt":
            yield from _paragraphs(text)
        else:
            yield from _json_rows(text, suffix, source)


def _json_rows(text: TextIO, suffix: str, source: Path) -> Iterator[Row]:
    """Rows of JSON: lines, unless the file holds an array or one object over several lines."""
    first, skipped = _first_line(text)
    start = first.strip()
    if suffix not in KINDS and not start.startswith(("{", "[")) and start:
        raise UserError(
            f"{source} is of no known kind: name it after what it holds "
            f"({', '.join(KINDS)}, each also with .gz)."
        )
    as_array = start.startswith("[") and (
        start == "[" or start.endswith(",") or suffix not in (".jsonl", ".ndjson")
    )
    pretty = start == "{" or (suffix == ".json" and start.startswith("{") and not _complete(start))
    if as_array or pretty:
        for value in json_values(text, first, skipped + 1):
            yield _parsed(value.text, value.line, value.column, value.fault)
        return
    number = skipped
    for number, (line, fault) in enumerate(lines_of(text, first), start=skipped + 1):
        if fault:
            yield Row(number, fault=fault)
        elif line.strip():
            yield _parsed(line, number)


def _first_line(text: TextIO) -> tuple[str, int]:
    """The first line that is not blank, and how many came before it."""
    skipped = 0
    while line := text.readline(LONGEST_LINE):
        if line.strip():
            return line, skipped
        skipped += 1
    return "", skipped


def _complete(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, line: int, column: int = 1, fault: str | None = None) -> Row:
    """A row of one JSON value that begins at ``line`` and ``column``."""
    if fault:
        return Row(line, fault=fault, column=column)
    if (place := damaged_text(text)) is not None:
        return Row(line, fault="not UTF-8 text", column=column + place)
    try:
        return Row(line, json.loads(text))
    except json.JSONDecodeError as error:
        on_first = error.lineno == 1
        return Row(
            line + error.lineno - 1,
            fault=f"broken JSON: {error.msg}",
            column=error.colno + (column - 1 if on_first else 0),
        )
    except RecursionError:
        return Row(line, fault="the JSON is nested too deeply")
    except ValueError as error:
        # A number of thousands of digits.
        return Row(line, fault=f"the JSON cannot be read: {error}")


def _table_rows(text: TextIO, source: Path) -> Iterator[Row]:
    """Rows of CSV or TSV as dictionaries; the first row names the columns."""
    csv.field_size_limit(LONGEST_LINE)
    header_line, skipped = _first_line(text)
    counts = {mark: header_line.count(mark) for mark in ("\t", ";", ",")}
    delimiter = "\t" if suffix_of(source) == ".tsv" else max(counts, key=lambda m: counts[m])
    faults: list[str] = []

    def lines() -> Iterator[str]:
        for line, fault in lines_of(text, header_line):
            if fault or damaged_text(line) is not None:
                faults.append(fault or "not UTF-8 text")
            # A quoted cell may go on in the next line.
            yield line + "\n"

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = skipped + reader.line_num + 1
        faults.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(start, fault=f"broken table: {error}")
            if reader.line_num < start - skipped:
                # A quote that never closes: the reader would say so again and again.
                return
            continue
        if faults:
            yield Row(start, fault=faults[0])
        elif header is None:
            header = [cell.strip() for cell in cells]
        elif any(cell.strip() for cell in cells):
            yield _table_row(start, header, cells)


def _table_row(line: int, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        columns = "1 column" if len(cells) == 1 else f"{len(cells)} columns"
        fault = f"{columns} where the header names {len(header)}"
        return Row(line, fault=fault)
    return Row(line, dict(zip(header, cells, strict=True)))


def _paragraphs(text: TextIO) -> Iterator[Row]:
    """Paragraphs of plain text, which blank lines set apart."""
    paragraph: list[str] = []
    start = 1
    fault: str | None = None
    number = 0
    for number, (line, wrong) in enumerate(lines_of(text), start=1):
        if line.strip() or wrong:
            start = start if paragraph else number
            paragraph.append(line)
            if wrong or damaged_text(line) is not None:
                fault = wrong or "not UTF-8 text"
        elif paragraph:
            yield _paragraph(start, paragraph, fault)
            paragraph, fault = [], None
    if paragraph:
        yield _paragraph(start, paragraph, fault)


def _paragraph(line: int, lines: list[str], fault: str | None) -> Row:
    return Row(line, fault=fault) if fault else Row(line, {"text": "\n".join(lines)})


def _parquet_rows(source: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"Reading {source} needs pyarrow: pip install 'dora-mlx[parquet]'."
        ) from error
    number = 0
    with seekable(source) as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=_PARQUET_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, _without_nulls(value))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{source} is a damaged Parquet file: {first}.") from error


def _without_nulls(value: Any) -> Any:
    """A value without absent fields: a column has every field that any row has."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
