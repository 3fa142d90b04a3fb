"""A look at data before a training: what is wrong with it, and what of it would be learned."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from dora_mlx.config import TrainConfig
from dora_mlx.data.examples import Example
from dora_mlx.data.preparation import PreparedData, prepare, training_source
from dora_mlx.data.records import Source, find_data
from dora_mlx.data.report import Report
from dora_mlx.data.rows import read_rows
from dora_mlx.data.statistics import LengthStatistics, length_bars, length_statistics
from dora_mlx.loading import load_tokenizer
from dora_mlx.registry import resolve

_ROWS_FOR_COLUMNS = 20


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens of an example that make up whole characters.

    ``trained``: it is a target of the loss; ``special``: it is no text but a mark of the
    template, such as the end of a turn.
    """

    text: str
    tokens: int
    trained: bool
    special: bool


@dataclass(frozen=True)
class DataOverview:
    """What a training with these options would find in its data; lengths are tokens.

    Attributes:
        reports: What is wrong, for each source; ``Report.problems`` have their lines.
        train: Numbers about the examples to train on.
        valid: Numbers about those to validate on.
        bars: The lengths of all examples: (shortest, longest, how many) for each range.
        counts: How many examples were ``cut``, ``split``, ``dropped`` or ``without an answer``.
        columns: Names of the columns of the first rows, for a mapping.
    """

    reports: tuple[Report, ...]
    train: LengthStatistics
    valid: LengthStatistics
    bars: tuple[tuple[int, int, int], ...]
    counts: dict[str, int]
    columns: tuple[str, ...]

    @property
    def bad_rows(self) -> int:
        """Rows that cannot be used; a training stops at them unless it may skip them."""
        return sum(report.bad_rows for report in self.reports)


class DataLook:
    """Prepared data with its tokenizer: the overview at once, and any example when asked for.

    Args:
        config: The options of the training. Bad rows are left out here and reported.

    Attributes:
        overview: The ``DataOverview`` of all examples.

    Raises:
        UserError: If there is no data, or it cannot be read at all.
    """

    def __init__(self, config: TrainConfig):
        self._tokenizer = load_tokenizer(resolve(config.model))
        source = training_source(config)
        columns = _columns(source)
        self._data: PreparedData = prepare(
            replace(config, skip_bad_rows=True), source, self._tokenizer
        )
        train, valid = self._data.train, self._data.valid
        lengths = np.concatenate([train.examples.lengths, valid.examples.lengths])
        self.overview = DataOverview(
            tuple(self._data.reports),
            length_statistics(train),
            length_statistics(valid),
            tuple(length_bars(lengths)),
            {
                how: train.counts.get(how, 0) + valid.counts.get(how, 0)
                for how in {**train.counts, **valid.counts}
            },
            columns,
        )

    def example(self, number: int) -> list[TokenSpan]:
        """The spans of a training example, counted from 0.

        Raises:
            IndexError: If there are not so many.
        """
        return list(_spans(self._data.train.examples[number], self._tokenizer))


def _columns(source: Source) -> tuple[str, ...]:
    rows = (row.value for row in islice(read_rows(find_data(source).train), _ROWS_FOR_COLUMNS))
    names: dict[str, None] = {}
    for value in rows:
        if isinstance(value, dict):
            names |= dict.fromkeys(str(name) for name in value)
    return tuple(names)


def _spans(example: Example, tokenizer: Any) -> Iterator[TokenSpan]:
    # Marks of turns are not special in every tokenizer, but always added to it.
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    tokens: list[int] = example.tokens.tolist()
    trained: list[bool] = example.trained.tolist()
    begin, context = 0, 0
    for end in range(1, len(tokens) + 1):
        # Decoded behind the token before it: alone, some tokenizers drop its leading space.
        before = tokenizer.decode(tokens[context:begin])
        text = tokenizer.decode(tokens[context:end])[len(before) :]
        if text.endswith("\ufffd") and end < len(tokens) and trained[end] == trained[begin]:
            continue
        yield TokenSpan(text, end - begin, trained[begin], tokens[begin] in special)
        begin, context = end, begin
