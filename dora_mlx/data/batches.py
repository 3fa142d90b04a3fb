"""Batches in an order that is a function of seed, epoch and position.

Either one example a row, padded, with rows of about equal length together; or packed: several
examples end to end in a row, whose attention must not cross from one to the next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dora_mlx.data.examples import Example, Examples
from dora_mlx.data.packing import pack

# Examples are sorted by length within this many batches: little padding, still well mixed.
_BATCHES_SORTED_TOGETHER = 16
# Widths are rounded up to a multiple: few shapes of buffers, and products of good sizes.
_WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    ``inputs`` and ``targets`` ``[batch, length]`` int32, shifted by one token; ``weights``
    ``[batch, length]`` float32, 1 where the target is trained and 0 elsewhere, padding included.
    ``segments`` ``[batch, length]`` int32 of a packed batch: the number of the example, within
    its row, that a position belongs to; -1 for padding. ``None`` if every row is one example.
    """

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    segments: npt.NDArray[np.int32] | None = None

    @property
    def trained_tokens(self) -> int:
        """Number of targets of the loss."""
        return int(self.weights.sum())


def make_batch(examples: list[Example]) -> Batch:
    """Pad ``examples`` to one width, one a row."""
    batch = make_packed_batch([[example] for example in examples])
    return Batch(batch.inputs, batch.targets, batch.weights)


def make_packed_batch(rows: list[list[Example]]) -> Batch:
    """Put the examples of every row end to end and pad the rows to one width."""
    # The last token of an example is a target only.
    longest = max(sum(len(example) - 1 for example in row) for row in rows)
    width = padded_width(longest)
    shape = len(rows), width
    inputs = np.zeros(shape, np.int32)
    targets = np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    segments = np.full(shape, -1, np.int32)
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples):
            part = slice(start, start + len(example) - 1)
            inputs[row, part] = example.tokens[:-1]
            targets[row, part] = example.tokens[1:]
            weights[row, part] = example.trained[1:]
            segments[row, part] = segment
            start = part.stop
    return Batch(inputs, targets, weights, segments)


def padded_width(length: int) -> int:
    """Width of a batch whose longest row has ``length`` tokens."""
    return -(-length // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


class BatchStream:
    """An endless stream of training batches that can be entered at any position.

    Each epoch holds every example once. Batch ``position`` depends on the examples, ``seed`` and
    ``position`` alone, so a resumed run sees what an undisturbed one would have seen.

    Args:
        examples: What is trained on.
        batch_size: Rows of a batch.
        seed: Of the order.
        window: Pack examples into rows of up to this many tokens; ``None``: one example a row.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, seed: int, window: int | None = None
    ):
        self.examples = examples if isinstance(examples, Examples) else Examples.of(examples)
        self._batch_size = batch_size
        self._seed = seed
        self._packed = window is not None
        # Packed once for all epochs: the batches of an epoch must be a fixed number for the
        # position to say which epoch it is in, and what shares a row does not touch the loss.
        self._rows: list[list[int]] = (
            [[index] for index in range(len(self.examples))]
            if window is None
            else pack(self.examples.lengths - 1, window - 1, seed)
        )
        self.batches_per_epoch = -(-len(self._rows) // batch_size)
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def rows(self) -> int:
        """Rows of an epoch: examples, or windows of packed ones."""
        return len(self._rows)

    def batch(self, position: int) -> Batch:
        """Batch number ``position``, counted from 0 over all epochs."""
        epoch, index = divmod(position, self.batches_per_epoch)
        rows = [[self.examples[i] for i in self._rows[row]] for row in self._order(epoch)[index]]
        return make_packed_batch(rows) if self._packed else make_batch([row[0] for row in rows])

    def fill(self) -> float:
        """Share of the positions of an epoch's batches that hold a token, 0 to 1."""
        used = int((self.examples.lengths - 1).sum(dtype=np.int64))
        held = 0
        for batch in self._order(0):
            longest = max(self._row_length(row) for row in batch)
            held += len(batch) * padded_width(longest)
        return used / max(1, held)

    def _row_length(self, row: int) -> int:
        return int(sum(self.examples.lengths[i] - 1 for i in self._rows[row]))

    def _epoch_order(self, epoch: int) -> list[list[int]]:
        """Indices of the rows of every batch of an epoch."""
        random = np.random.default_rng([self._seed, epoch])
        shuffled = random.permutation(len(self._rows)).tolist()
        window = self._batch_size * _BATCHES_SORTED_TOGETHER
        order: list[list[int]] = []
        for start in range(0, len(shuffled), window):
            by_length = sorted(shuffled[start : start + window], key=self._row_length)
            order += _chunks(by_length, self._batch_size)
        # Shuffled again: else every window would run from its shortest to its longest examples.
        return [order[i] for i in random.permutation(len(order))]


def validation_batches(examples: Sequence[Example], batch_size: int) -> list[Batch]:
    """All ``examples`` once, by length."""
    by_length = sorted(examples, key=len)
    return [make_batch(chunk) for chunk in _chunks(by_length, batch_size)]


def _chunks(items: list, size: int) -> Iterator[list]:  # type: ignore[type-arg]
    for start in range(0, len(items), size):
        yield items[start : start + size]
