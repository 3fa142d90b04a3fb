"""Rendered texts -> token ids and masks, many at a time, by the tokenizer's own fast code."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from dora_mlx.data.conversation import BadRowError
from dora_mlx.data.examples import Example, LongExamples, fit
from dora_mlx.data.records import Record
from dora_mlx.data.rendering import ChatRenderer, Rendered, TrainOn, Turn
from dora_mlx.data.report import Report
from dora_mlx.errors import UserError

# Texts given to the tokenizer at once: enough for its threads, little memory.
_TEXTS = 512
# Answers whose prompt is also tokenized alone, to see that it gives the same tokens.
_PROBED = 32


class ExampleMaker:
    """Makes examples of records for one tokenizer and one set of options.

    Bad rows (the template refuses them) and long examples are written into the reports.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_seq_length: int,
        *,
        mask_prompt: bool = True,
        train_on: TrainOn = "all",
        long_examples: LongExamples = "truncate",
    ):
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise UserError(
                "The model's tokenizer has no tokenizer.json, so it cannot say where in a text "
                "its tokens are. Choose another model, or a conversion of it with tokenizer.json."
            )
        # Some files carry a padding or a limit of their own, which would add or drop tokens.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._limit = max_seq_length
        self._long = long_examples
        self._renderer = ChatRenderer(tokenizer, train_on, mask_prompt)
        self._eos = set(tokenizer.eos_token_ids)
        self._probes_left = _PROBED

    def make(
        self, records: Iterable[Record], report: Report
    ) -> Iterator[tuple[Record, list[Example], str | None]]:
        """For every record that can be rendered: its examples, and how it was shortened.

        The last item is one of the keys of ``ExampleSet.counts``, or ``None``.
        """
        stream = iter(records)
        while chunk := list(islice(stream, _TEXTS)):
            rendered: list[Rendered] = []
            for record in chunk:
                try:
                    rendered += self._renderer.render(record)
                except BadRowError as error:
                    report.error(record.line, error.problems)
            by_record: dict[int, list[Example]] = {}
            for text, example in zip(rendered, self._tokenized(rendered, report), strict=True):
                by_record.setdefault(id(text.record), []).append(example)
            for record in chunk:
                if id(record) in by_record:
                    yield record, *self._fitted(record, by_record[id(record)], report)
        for what, number in self._renderer.fallbacks.items():
            report.notice(f"the model's chat template: {number:,} conversations {what}")

    def _tokenized(self, texts: list[Rendered], report: Report) -> Iterator[Example]:
        plain = [text.record.text is not None for text in texts]
        # A template writes its own special tokens; plain text gets those of the tokenizer.
        chats = [text.text for text, alone in zip(texts, plain, strict=True) if not alone]
        others = [text.text for text, alone in zip(texts, plain, strict=True) if alone]
        of_chats = iter(self._backend.encode_batch(chats, add_special_tokens=False))
        of_others = iter(self._backend.encode_batch(others, add_special_tokens=True))
        for text, alone in zip(texts, plain, strict=True):
            if alone:
                yield self._plain(next(of_others).ids)
                continue
            encoding = next(of_chats)
            ids = np.array(encoding.ids, np.int32)
            if text.turns is None:
                trained = np.arange(len(ids)) > 0
            else:
                trained = self._mask(text, ids, np.array(encoding.offsets).reshape(-1, 2))
                self._probe(text, encoding.ids, report)
            yield Example(ids, trained)

    def _plain(self, ids: list[int]) -> Example:
        """Plain text, all of it trained, with an end of text that teaches where to stop."""
        end = self._tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        return Example(np.array(ids, np.int32), np.arange(len(ids)) > 0)

    def _mask(
        self, text: Rendered, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Whether each token belongs to an answer; ``offsets`` ``[length, 2]`` in characters."""
        trained = np.zeros(len(ids), np.bool_)
        starts, ends = offsets[:, 0], offsets[:, 1]
        for turn in text.turns or ():
            # Empty tokens, such as SentencePiece's mark of a word, count where they stand.
            inside = (starts < turn.end) & ((ends > turn.start) | (starts >= turn.start))
            (places,) = np.nonzero(inside)
            last = self._end_of_turn(text.text, turn, ids, starts, places)
            trained[places[places <= last]] = True
        trained[:1] = False
        return trained

    def _end_of_turn(
        self,
        text: str,
        turn: Turn,
        ids: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int64],
        places: npt.NDArray[np.intp],
    ) -> int:
        """The last token of an answer: its end of turn, or what stands before white space.

        Templates put a line break behind the end of turn, which the model never has to produce.
        """
        for place in places:
            if ids[place] in self._eos and starts[place] >= turn.said:
                return int(place)
        end = turn.start + len(text[turn.start : turn.end].rstrip())
        before = places[starts[places] < end]
        return int(before[-1]) if len(before) else -1

    def _probe(self, text: Rendered, ids: list[int], report: Report) -> None:
        """Compare the tokens of a prompt alone, as in use, with those it has in the whole."""
        for turn in text.turns or ():
            if self._probes_left <= 0:
                return
            self._probes_left -= 1
            prompt = self._backend.encode(text.text[: turn.start], add_special_tokens=False).ids
            if ids[: len(prompt)] != prompt:
                report.notice(
                    "the tokenizer joins the end of the prompt and the beginning of the answer, "
                    "so the first trained token of an answer differs from the one in use"
                )

    def _fitted(
        self, record: Record, examples: list[Example], report: Report
    ) -> tuple[list[Example], str | None]:
        """Examples within the limit that have something to learn."""
        longest = max(len(example) for example in examples)
        first = self._tokenizer.bos_token_id
        kept: list[Example] = []
        for example in examples:
            keep_first = first is not None and bool(example.tokens[:1] == first)
            kept += fit(example, self._limit, self._long, keep_first)
        done = {"drop": "dropped", "split": "split"}.get(self._long, "cut")
        treated = done if longest > self._limit else None
        kept = [example for example in kept if example.trained[1:].any()]
        if not kept and treated != "dropped":
            treated = "without an answer"
        if longest > self._limit:
            outcome = "left out: no answer within it" if treated == "without an answer" else treated
            report.warning(
                record.line,
                f"{longest:,} tokens, longer than --max-seq-length {self._limit:,}: {outcome}",
                "long examples",
            )
        elif treated:
            report.warning(record.line, "there is no token to learn: left out", "empty examples")
        return kept, treated
