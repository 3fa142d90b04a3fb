"""Reads the listing of a data report back."""

import re


def named_lines(report):
    """The last sentence about every line that a report names, by the line's number."""
    named = {}
    for row in re.findall(r"^  lines? .*$", report, re.M):
        places = re.match(r"  lines? ([\d, to and]*\d)", row)[1]
        for span in re.split(", | and ", places):
            first, _, last = span.partition(" to ")
            named |= dict.fromkeys(range(int(first), int(last or first) + 1), row)
    return named
