"""Batches of about equal length, in an order that is a function of seed, epoch and position."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dora_mlx.data.examples import Example

# Examples are sorted by length within this many batches: little padding, still well mixed.
_BATCHES_SORTED_TOGETHER = 16
# Widths are rounded up to a multiple, so that few shapes have to be compiled.
_WIDTH_MULTIPLE = 32


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right.

    ``inputs`` and ``targets`` ``[batch, length]`` int32, shifted by one token; ``weights``
    ``[batch, length]`` float32, 1 where the target is trained and 0 elsewhere, padding included.
    """

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    @property
    def trained_tokens(self) -> int:
        """Number of targets of the loss."""
        return int(self.weights.sum())


def make_batch(examples: list[Example]) -> Batch:
    """Pad ``examples`` to one width."""
    longest = max(len(example) for example in examples) - 1
    width = -(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
    shape = len(examples), width
    inputs = np.zeros(shape, np.int32)
    targets = np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, example in enumerate(examples):
        length = len(example) - 1
        inputs[row, :length] = example.tokens[:-1]
        targets[row, :length] = example.tokens[1:]
        weights[row, :length] = example.trained[1:]
    return Batch(inputs, targets, weights)


class BatchStream:
    """An endless stream of training batches that can be entered at any position.

    Each epoch holds every example once. Batch ``position`` depends on the examples, ``seed`` and
    ``position`` alone, so a resumed run sees what an undisturbed one would have seen.
    """

    def __init__(self, examples: list[Example], batch_size: int, seed: int):
        self.examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self.batches_per_epoch = -(-len(examples) // batch_size)
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def batch(self, position: int) -> Batch:
        """Batch number ``position``, counted from 0 over all epochs."""
        epoch, index = divmod(position, self.batches_per_epoch)
        return make_batch([self.examples[i] for i in self._order(epoch)[index]])

    def _epoch_order(self, epoch: int) -> list[list[int]]:
        """Indices of the examples of every batch of an epoch."""
        random = np.random.default_rng([self._seed, epoch])
        shuffled = random.permutation(len(self.examples)).tolist()
        window = self._batch_size * _BATCHES_SORTED_TOGETHER
        order: list[list[int]] = []
        for start in range(0, len(shuffled), window):
            by_length = sorted(
                shuffled[start : start + window], key=lambda i: len(self.examples[i])
            )
            order += _chunks(by_length, self._batch_size)
        # Shuffled again: else every window would run from its shortest to its longest examples.
        return [order[i] for i in random.permutation(len(order))]


def validation_batches(examples: list[Example], batch_size: int) -> list[Batch]:
    """All ``examples`` once, by length."""
    by_length = sorted(examples, key=len)
    return [make_batch(chunk) for chunk in _chunks(by_length, batch_size)]


def _chunks(items: list, size: int) -> Iterator[list]:  # type: ignore[type-arg]
    for start in range(0, len(items), size):
        yield items[start : start + size]
