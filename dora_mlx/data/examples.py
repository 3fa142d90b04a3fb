"""From a conversation to tokens, with a mask that says which of them are learned."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dora_mlx.data.records import Record
from dora_mlx.errors import UserError


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


@dataclass(frozen=True)
class ExampleSet:
    """Examples in file order, and what happened on the way to them.

    ``truncated`` examples were cut at the end; ``dropped`` ones had no trained token left.
    """

    examples: list[Example]
    truncated: int
    dropped: int

    @property
    def trained_tokens(self) -> int:
        """Number of targets of the loss in all examples."""
        return sum(int(example.trained.sum()) for example in self.examples)


def make_examples(
    records: Iterable[Record], tokenizer: Any, max_seq_length: int, mask_prompt: bool = True
) -> ExampleSet:
    """Render every record with the chat template and mark what is learned.

    With ``mask_prompt`` that is every assistant turn with its end-of-turn token and nothing else.

    Raises:
        UserError: If the tokenizer has no chat template, or the template rejects a record.
    """
    if not tokenizer.has_chat_template:
        raise UserError(
            "The model's tokenizer has no chat template, so a conversation has no defined form. "
            "Choose an instruction-tuned model."
        )
    examples: list[Example] = []
    truncated = dropped = 0
    for record in records:
        tokens = _template(tokenizer, list(record.messages), record)
        if mask_prompt:
            trained = _assistant_mask(record, tokens, tokenizer)
        else:
            trained = np.arange(len(tokens)) > 0
        truncated += len(tokens) > max_seq_length
        trained = trained[:max_seq_length]
        if trained.any():
            examples.append(Example(np.array(tokens[:max_seq_length], np.int32), trained))
        else:
            dropped += 1
    return ExampleSet(examples, truncated, dropped)


def _assistant_mask(record: Record, tokens: list[int], tokenizer: Any) -> npt.NDArray[np.bool_]:
    """Whether each token of a rendered conversation belongs to an assistant turn.

    The conversation up to an assistant turn, with the template's generation prompt, is what the
    model will see in use. Where it is a prefix of the whole, the turn is what follows it.
    """
    messages = list(record.messages)
    trained = np.zeros(len(tokens), dtype=np.bool_)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _template(tokenizer, messages[:index], record, add_generation_prompt=True)
        turn = _template(tokenizer, messages[: index + 1], record)
        if tokens[: len(prompt)] != prompt or tokens[: len(turn)] != turn:
            raise UserError(
                f"{record.path}, line {record.line}: the model's chat template rewrites earlier "
                "turns, so the assistant's tokens cannot be told apart. Use --no-mask-prompt, or "
                "conversations of one turn."
            )
        trained[len(prompt) : _end_of_turn(turn, len(prompt), tokenizer.eos_token_ids)] = True
    return trained


def _end_of_turn(tokens: list[int], start: int, eos_token_ids: set[int]) -> int:
    """Where a turn that begins at ``start`` ends: behind its end-of-turn token if it has one.

    Templates put a line break behind that token, which the model never has to produce.
    """
    for position in range(len(tokens) - 1, start - 1, -1):
        if tokens[position] in eos_token_ids:
            return position + 1
    return len(tokens)


def _template(
    tokenizer: Any, messages: list[dict[str, str]], record: Record, **options: bool
) -> list[int]:
    from jinja2.exceptions import TemplateError

    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, **options))
    except TemplateError as error:
        raise UserError(
            f"{record.path}, line {record.line}: the model's chat template refuses this "
            f"conversation: {error}."
        ) from error
