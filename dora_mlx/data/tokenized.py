"""A tokenized source on the disk or in memory: flat arrays, one entry per example or record."""

import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dora_mlx.data.examples import Example, Examples, ExampleSet
from dora_mlx.data.records import Record
from dora_mlx.data.report import Report

# What can have happened to a record; an index into this is what is written.
TREATMENTS = (None, "cut", "split", "dropped", "without an answer")
_KINDS: dict[str, Any] = {
    "tokens": np.int32,
    "trained": np.bool_,
    "lengths": np.int32,
    "targets": np.int32,
    "owners": np.int64,
    "digests": np.uint8,
    "lines": np.int64,
    "treated": np.uint8,
}
_META = "meta.json"
_CHECKED_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class TokenizedSource:
    """The examples of one source, and the records that they came from.

    ``owners`` ``[examples]`` is the record of each example; ``digests`` ``[records, 32]`` and
    ``lines`` ``[records]`` say what and where it was, ``treated`` how it was shortened. ``kept``
    says that it was tokenized on an earlier occasion.
    """

    examples: Examples
    owners: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    lines: npt.NDArray[np.int64]
    treated: npt.NDArray[np.uint8]
    report: Report
    kept: bool = False

    def part(self, records: npt.NDArray[np.bool_]) -> ExampleSet:
        """The examples of those records for which ``records`` ``[records]`` holds."""
        counts = Counter(TREATMENTS[code] for code in self.treated[records].tolist() if code)
        chosen = records[self.owners]
        return ExampleSet(self.examples.select(chosen), {k: n for k, n in counts.items() if k})

    def all(self) -> ExampleSet:
        """All examples."""
        return self.part(np.ones(len(self.digests), np.bool_))


class SourceWriter:
    """Writes a ``TokenizedSource`` record by record, to files in ``folder`` or to memory."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._streams: dict[str, IO[bytes]] = {
            name: io.BytesIO() if folder is None else open(folder / name, "wb")  # noqa: SIM115
            for name in _KINDS
        }
        self._records = 0

    def append(self, record: Record, examples: Iterable[Example], treated: str | None) -> None:
        """Write one record with its examples."""
        for example in examples:
            self._write("tokens", example.tokens)
            self._write("trained", example.trained)
            self._write("lengths", len(example))
            self._write("targets", int(example.trained.sum()))
            self._write("owners", self._records)
        self._write("digests", np.frombuffer(record.digest(), np.uint8))
        self._write("lines", record.line)
        self._write("treated", TREATMENTS.index(treated))
        self._records += 1

    def finish(self, report: Report) -> TokenizedSource:
        """What was written; in a folder it is complete from here on."""
        if self._folder is not None:
            self.close()
            checks = {name: _checksum(self._folder / name) for name in _KINDS}
            meta = {"report": report.to_dict(), "checksums": checks}
            (self._folder / _META).write_text(json.dumps(meta), encoding="utf-8")
            return read_source(self._folder)
        arrays = {
            name: np.frombuffer(stream.getvalue(), _KINDS[name])
            for name, stream in self._streams.items()
            if isinstance(stream, io.BytesIO)
        }
        return _source(arrays, report)

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams.values():
            stream.close()

    def _write(self, name: str, values: Any) -> None:
        self._streams[name].write(np.asarray(values, _KINDS[name]).tobytes())


def read_source(folder: Path) -> TokenizedSource:
    """What a ``SourceWriter`` left in a folder; tokens are mapped, not read into memory.

    Raises:
        OSError, ValueError, KeyError, TypeError: If anything is missing or not as it was written.
    """
    meta = json.loads((folder / _META).read_text(encoding="utf-8"))
    arrays = {}
    for name, kind in _KINDS.items():
        path = folder / name
        if _checksum(path) != meta["checksums"][name]:
            raise ValueError(f"{name} is not as it was written")
        # An empty file cannot be mapped.
        empty = path.stat().st_size == 0
        arrays[name] = np.zeros(0, kind) if empty else np.memmap(path, kind, mode="r")
    return _source(arrays, Report.from_dict(meta["report"]))


def _source(arrays: dict[str, npt.NDArray[Any]], report: Report) -> TokenizedSource:
    small = {name: np.asarray(arrays[name]) for name in _KINDS if name not in ("tokens", "trained")}
    lengths = small["lengths"]
    begins = np.cumsum(lengths, dtype=np.int64) - lengths
    examples = Examples(arrays["tokens"], arrays["trained"], begins, lengths, small["targets"])
    digests = small["digests"].reshape(-1, 32)
    return TokenizedSource(
        examples, small["owners"], digests, small["lines"], small["treated"], report
    )


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    value = size = 0
    with open(path, "rb") as file:
        while block := file.read(_CHECKED_AT_ONCE):
            value = zlib.crc32(block, value)
            size += len(block)
    return [size, value]
