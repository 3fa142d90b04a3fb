"""The values of a JSON array, or of JSON objects in a row, without holding the whole file.

A value's end is found by its brackets and strings alone and the value is parsed afterwards, so a
broken value is reported with its place and does not hide the ones behind it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from dora_mlx.data.opening import LONGEST_LINE

_CHUNK = 1 << 20
# A whole string, a string without an end, or a character that gives structure.
_MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|"|[\[\]{},]', re.S)


@dataclass(frozen=True)
class JsonText:
    """The text of one value and where it begins, or what is wrong there."""

    text: str
    line: int
    column: int
    fault: str | None = None


class _Buffer:
    """Text read so far and not yet used up; ``line`` and ``column`` are where it begins."""

    def __init__(self, stream: TextIO, text: str, line: int):
        self.stream = stream
        self.text = text
        self.line = line
        self.column = 1

    def more(self) -> bool:
        chunk = self.stream.read(_CHUNK)
        self.text += chunk
        return bool(chunk)

    def drop(self, length: int) -> str:
        used, self.text = self.text[:length], self.text[length:]
        breaks = used.count("\n")
        self.line += breaks
        self.column = len(used) - used.rfind("\n") if breaks else self.column + len(used)
        return used

    def skip_space(self, also: str = "") -> str:
        """Drop white space; returns the character behind it, or "" at the end."""
        while True:
            rest = self.text.lstrip(" \t\r\n" + also)
            self.drop(len(self.text) - len(rest))
            if self.text or not self.more():
                return self.text[:1]


def json_values(stream: TextIO, first: str, line: int) -> Iterator[JsonText]:
    """The values of the array that begins in ``first``, or the objects that follow each other."""
    buffer = _Buffer(stream, first, line)
    in_array = buffer.skip_space() == "["
    if in_array:
        buffer.drop(1)
    while True:
        character = buffer.skip_space("," if in_array else "")
        start = buffer.line, buffer.column
        if not character:
            if in_array:
                yield JsonText("", *start, "the array has no end: the last ] is missing")
            return
        if character == "]" and in_array:
            buffer.drop(1)
            if buffer.skip_space():
                place = buffer.line, buffer.column
                yield JsonText("", *place, "there is more text behind the array")
            return
        length, complete = _value_length(buffer, in_array)
        if not length:
            yield JsonText("", *start, f"there is a {character} without its beginning")
            buffer.drop(1)
            continue
        text = buffer.drop(length).rstrip()
        fault = None if complete or not in_array else "the value has no end"
        yield JsonText(text, *start, fault)
        if not complete:
            return


def _value_length(buffer: _Buffer, in_array: bool) -> tuple[int, bool]:
    """Length of the value at the start of the buffer, and whether it ends."""
    position = depth = 0
    while True:
        mark = _MARK.search(buffer.text, position)
        if mark is None or mark[0] == '"':
            position = len(buffer.text) if mark is None else mark.start()
            if len(buffer.text) > LONGEST_LINE or not buffer.more():
                return len(buffer.text), False
            continue
        position = mark.end()
        if mark[0] in "[{":
            depth += 1
        elif mark[0] in "]}":
            depth -= 1
            if depth < 0 and in_array:
                return mark.start(), True
            if depth <= 0:
                return position, True
        elif depth == 0 and mark[0] == "," and in_array:
            return mark.start(), True
