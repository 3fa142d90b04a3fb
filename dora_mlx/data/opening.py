"""Bytes on the disk -> text: compression, encoding, lines of bounded length."""

import gzip
import io
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO, cast

from dora_mlx.errors import UserError

# In characters; a longer line is no conversation, and one without an end would fill the memory.
LONGEST_LINE = 1 << 26
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_SNIFFED = 1024
# How `surrogateescape` marks bytes that are not UTF-8; decoded UTF-8 never holds these.
_DAMAGED = re.compile("[\ud800-\udfff]")


def suffix_of(path: Path) -> str:
    """The lower-case suffix that says what a file holds, ``.gz`` apart."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def damaged_text(text: str) -> int | None:
    """Where ``text`` holds a byte that was no text, or ``None``."""
    if text.isascii():
        return None
    found = _DAMAGED.search(text)
    return None if found is None else found.start()


def has_parquet_magic(path: Path) -> bool:
    """Whether a file begins as Parquet does, whatever its name."""
    with open_bytes(path) as file:
        return file.read(4) == _PARQUET


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked if it is gzip by its content.

    Raises:
        UserError: If the file cannot be opened, or its compression is damaged.
    """
    try:
        with open(path, "rb") as file:
            compressed = file.read(2) == _GZIP
            file.seek(0)
            if compressed:
                # Typed for text too, which mode "rb" never gives.
                with gzip.open(file, "rb") as unpacked:
                    yield cast(IO[bytes], unpacked)
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is a damaged gzip file ({str(error).rstrip('.')}): copy or make it again."
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A file's text: UTF-8 or UTF-16, with or without a byte order mark.

    Bytes that are not UTF-8 arrive as lone surrogates; ``damaged_text`` finds them.

    Raises:
        UserError: If the file is no text.
    """
    with open_bytes(path) as file:
        head = file.read(_SNIFFED)
        file.seek(0)
        encoding = _encoding(head)
        if encoding is None:
            raise UserError(f"{path} is not UTF-8 or UTF-16 text but a binary file.")
        errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
        # Lines end at line feeds only: a universal newline would also split at a lone return.
        yield io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="\n")


def _encoding(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if b"\0" not in head:
        return "utf-8-sig"
    # Text in UTF-16 without a mark: one byte of every pair of an ASCII character is zero.
    if head[:1] != b"\0" and not any(head[1:16:2]):
        return "utf-16-le"
    if head[:1] == b"\0" and not any(head[0:16:2]):
        return "utf-16-be"
    return None


def lines_of(text: TextIO, first: str = "") -> Iterator[tuple[str, str | None]]:
    """Lines without their ends, ``first`` before them, each with what is wrong with it."""
    line = first or text.readline(LONGEST_LINE)
    while line:
        if len(line) >= LONGEST_LINE and not line.endswith("\n"):
            while (rest := text.readline(LONGEST_LINE)) and not rest.endswith("\n"):
                pass
            yield "", f"longer than {LONGEST_LINE:,} characters"
        else:
            yield line.removesuffix("\n").removesuffix("\r"), None
        line = text.readline(LONGEST_LINE)


@contextmanager
def seekable(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes with cheap random access: a compressed one is unpacked to a temporary."""
    with open(path, "rb") as file:
        if file.read(2) != _GZIP:
            file.seek(0)
            yield file
            return
    with open_bytes(path) as unpacked, tempfile.TemporaryFile() as temporary:
        shutil.copyfileobj(unpacked, temporary)
        temporary.seek(0)
        yield temporary
