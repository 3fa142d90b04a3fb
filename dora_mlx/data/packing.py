"""Which examples share a row: as few rows as the lengths allow, found quickly."""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

# Rows with room left that are looked at; more fill rows better and take longer.
_OPEN_ROWS = 256


def pack(lengths: npt.NDArray[np.integer], window: int, seed: int) -> list[list[int]]:
    """Indices of the examples of every row; ``lengths`` ``[count]`` are at most ``window``.

    Best fit in a shuffled order: every example goes to the fullest open row that has room. A
    function of its arguments alone.
    """
    order = np.random.default_rng([seed, len(lengths)]).permutation(len(lengths)).tolist()
    rows: list[list[int]] = []
    # (room left, row), by room: the first entry with enough room is the best fit.
    open_rows: list[tuple[int, int]] = []
    for index in order:
        length = int(lengths[index])
        place = bisect_left(open_rows, (length, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            rows[row].append(index)
        else:
            room, row = window, len(rows)
            rows.append([index])
        if room > length:
            insort(open_rows, (room - length, row))
        if len(open_rows) > _OPEN_ROWS:
            # The one with the least room is the one that the fewest examples fit into.
            open_rows.pop(0)
    return rows
