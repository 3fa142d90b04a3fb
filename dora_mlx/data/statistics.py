"""How long the examples of a set are, in numbers and as a picture made of text."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dora_mlx.data.examples import ExampleSet

PERCENTILES = (0, 25, 50, 75, 90, 99, 100)
_BARS = 10
_BAR_WIDTH = 40


@dataclass(frozen=True)
class LengthStatistics:
    """Numbers about a set of examples; lengths are in tokens.

    ``percentiles`` are the lengths that these shares of the examples do not exceed, by
    ``PERCENTILES``.
    """

    examples: int
    tokens: int
    trained: int
    percentiles: tuple[int, ...]

    @property
    def share_trained(self) -> float:
        """Trained tokens as a share of all, 0 to 1."""
        return self.trained / max(1, self.tokens)


def length_statistics(examples: ExampleSet) -> LengthStatistics:
    """The statistics of a set."""
    lengths = examples.examples.lengths
    ranks = np.percentile(lengths, PERCENTILES, method="higher") if len(lengths) else ()
    return LengthStatistics(
        len(lengths),
        int(lengths.sum(dtype=np.int64)),
        examples.trained_tokens,
        tuple(int(length) for length in ranks),
    )


def length_bars(lengths: npt.NDArray[np.integer]) -> list[tuple[int, int, int]]:
    """At most ten ranges of length: the shortest, the longest, and how many examples there are."""
    if not len(lengths):
        return []
    edges = np.unique(np.linspace(lengths.min(), lengths.max() + 1, _BARS + 1).astype(int))
    counts, _ = np.histogram(lengths, edges)
    return [
        (int(low), int(high) - 1, int(number))
        for low, high, number in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def histogram(lengths: npt.NDArray[np.integer]) -> list[str]:
    """One line for each of the ranges: the range, a bar, and how many there are."""
    bars = length_bars(lengths)
    most = max((number for _, _, number in bars), default=0)
    wide = len(f"{bars[-1][1] + 1:,}") if bars else 0
    ranges = [f"{low:>{wide},}" + (f" to {high:,}" if high > low else "") for low, high, _ in bars]
    widest = max(map(len, ranges), default=0)
    return [
        f"{what:<{widest}} {'#' * -(-_BAR_WIDTH * number // most):<{_BAR_WIDTH}} {number:,}"
        for what, (_, _, number) in zip(ranges, bars, strict=True)
    ]
