"""From records to tokens, with a mask that says which of them are learned."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

LongExamples = Literal["truncate", "truncate-prompt", "drop", "split"]


@dataclass(frozen=True)
class Example:
    """One tokenized conversation.

    ``tokens`` ``[length]`` int32; ``trained`` ``[length]`` bool: whether the token is a target of
    the loss. The first token never is.
    """

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)


class Examples(Sequence[Example]):
    """Examples as parts of flat arrays, which may be mapped from files.

    ``tokens`` ``[total]`` int32 and ``trained`` ``[total]`` bool hold them end to end; ``begins``,
    ``lengths`` and ``targets`` (trained tokens), each ``[count]``, say where each one is.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        trained: npt.NDArray[np.bool_],
        begins: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int32],
        targets: npt.NDArray[np.int32],
    ):
        self._tokens = tokens
        self._trained = trained
        self._begins = begins
        self.lengths = lengths
        self.targets = targets

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin = int(self._begins[index])
        part = slice(begin, begin + int(self.lengths[index]))
        return Example(self._tokens[part], self._trained[part])

    def select(self, chosen: npt.NDArray[np.bool_]) -> "Examples":
        """Those examples for which ``chosen`` ``[count]`` holds, without copying tokens."""
        arrays = self._begins[chosen], self.lengths[chosen], self.targets[chosen]
        return Examples(self._tokens, self._trained, *arrays)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """The same examples in flat arrays."""
        held = list(examples)
        lengths = np.array([len(example) for example in held], np.int32)
        return cls(
            np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in held)]),
            np.concatenate([np.zeros(0, np.bool_), *(example.trained for example in held)]),
            np.cumsum(lengths, dtype=np.int64) - lengths,
            lengths,
            np.array([example.trained.sum() for example in held], np.int32),
        )


@dataclass(frozen=True)
class ExampleSet:
    """Examples in file order, and what happened on the way to them.

    ``counts`` says how many records were treated in some way: ``cut``, ``split``, ``dropped`` for
    their length, and ``without an answer`` within it (left out).
    """

    examples: Examples
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def trained_tokens(self) -> int:
        """Number of targets of the loss in all examples."""
        return int(self.examples.targets.sum(dtype=np.int64))

    @property
    def dropped(self) -> int:
        """Records that had no trained token left."""
        return self.counts.get("without an answer", 0)


def fit(
    example: Example, limit: int, treatment: LongExamples, keep_first: bool
) -> Iterator[Example]:
    """An example of more than ``limit`` tokens in the form that ``treatment`` gives it.

    ``truncate`` cuts at the end; ``truncate-prompt`` cuts the oldest tokens before the first
    trained one, and the end if that is not enough; ``split`` makes windows; ``drop`` gives
    nothing. With ``keep_first`` the first token (beginning of text) survives the cut.
    """
    tokens, trained = example.tokens, example.trained
    if len(example) <= limit:
        yield example
    elif treatment == "truncate":
        yield Example(tokens[:limit], trained[:limit])
    elif treatment == "split":
        for start in range(0, len(tokens) - 1, limit - 1):
            # Windows share a token: the last of one is what predicts the first of the next.
            part = slice(start, start + limit)
            target = trained[part].copy()
            target[0] = False
            yield Example(tokens[part], target)
    elif treatment == "truncate-prompt":
        first = int(keep_first)
        prompt = int(trained.argmax()) if trained.any() else len(tokens)
        # One token of the prompt stays, to predict the first trained one from.
        cut = first + min(len(tokens) - limit, max(0, prompt - 1 - first))
        kept = np.r_[0:first, cut : len(tokens)][:limit]
        yield Example(tokens[kept], trained[kept])
