"""A record as the model sees it: rendered text, and where in it each answer to learn is.

Three ways, the first that holds for a conversation:

1. The template marks answers itself (``{% generation %}``).
2. Prefixes: the conversation up to an answer, with the template's generation prompt, is what the
   model will see in use. Where it is a prefix of the whole, the answer is what follows it.
3. One text for each answer, as the model would see it. For templates that show earlier turns
   differently once the conversation goes on, such as without their thoughts.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from dora_mlx.data.conversation import BadRowError, Message
from dora_mlx.data.records import Record
from dora_mlx.errors import UserError

TrainOn = Literal["all", "last"]
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Turn:
    """Where an answer is, in characters: ``start:end``, its own words ending at ``said``.

    Behind ``said`` come the end of turn and what the template puts between turns.
    """

    start: int
    said: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A text and the answers in it that are learned; ``turns`` is ``None`` where all of it is."""

    record: Record
    text: str
    turns: tuple[Turn, ...] | None


class ChatRenderer:
    """Renders records with a tokenizer's chat template.

    Attributes:
        fallbacks: How many conversations took a way other than the usual one, by what happened.
    """

    def __init__(self, tokenizer: Any, train_on: TrainOn = "all", mask_prompt: bool = True):
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._mask_prompt = mask_prompt
        # A tokenizer without one ends a text with nothing to take off.
        self._eos = getattr(tokenizer, "eos_token", None) or "\0"
        special = getattr(tokenizer, "all_special_tokens", [])
        self._special_tokens = [mark for mark in special if mark]
        self.fallbacks: Counter[str] = Counter()

    def render(self, record: Record) -> list[Rendered]:
        """One text with all answers, or one for each answer.

        Raises:
            BadRowError: If the template refuses the conversation or its answers cannot be found.
            UserError: If the tokenizer has no chat template.
        """
        if record.text is not None:
            return [Rendered(record, record.text, None)]
        if not self._tokenizer.has_chat_template:
            raise UserError(
                "The model's tokenizer has no chat template, so a conversation has no defined "
                "form. Choose an instruction-tuned model, or train on plain text."
            )
        answers = [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]
        # What comes behind the last answer is neither learned nor seen by what is.
        messages = [_without_weight(m) for m in record.messages[: answers[-1] + 1]]
        wanted = [i for i in answers if record.messages[i].get("weight", 1)]
        wanted = wanted[-1:] if self._train_on == "last" else wanted
        if not self._mask_prompt:
            return [Rendered(record, self._text(messages, record), None)]
        if not wanted:
            raise BadRowError("every answer has the weight 0, so there is nothing to learn")
        return (
            self._by_tags(record, messages, wanted)
            or self._by_prefixes(record, messages, wanted)
            or [self._alone(record, messages, answer) for answer in wanted]
        )

    def _by_tags(
        self, record: Record, messages: list[Message], wanted: list[int]
    ) -> list[Rendered] | None:
        """Answers between the template's own marks, if there is one pair for each answer."""
        template = self._tagged_template(record)
        if template is None:
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        wrapper = self._tokenizer
        options = {**wrapper.special_tokens_map, "enable_thinking": wrapper.has_thinking}
        with _template_errors():
            rendered: Any = render_jinja_template(
                [messages],
                tools=None if record.tools is None else list(record.tools),
                chat_template=template,
                return_assistant_tokens_mask=True,
                **options,
            )
        texts, spans = rendered
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        text = texts[0]
        if len(spans[0]) != len(answers):
            self.fallbacks["have other generation tags than answers"] += 1
            return None
        places = dict(zip(answers, spans[0], strict=True))
        turns = tuple(
            _turn(text, places[i][0], self._with_end_of_turn(text, places[i][1]), messages[i])
            for i in wanted
        )
        return [Rendered(record, text, turns)]

    def _with_end_of_turn(self, text: str, end: int) -> int:
        """Where an answer ends whose marks may leave out its end of turn."""
        behind = end + len(text[end:]) - len(text[end:].lstrip())
        marks = [mark for mark in self._special_tokens if text.startswith(mark, behind)]
        inside = any(text[:end].rstrip().endswith(mark) for mark in self._special_tokens)
        return behind + max(map(len, marks)) if marks and not inside else end

    def _tagged_template(self, record: Record) -> str | None:
        if getattr(self._tokenizer, "_chat_template", None) is not None:
            return None
        tools = None if record.tools is None else list(record.tools)
        template = self._tokenizer.get_chat_template(tools=tools)
        return template if _GENERATION_TAG.search(template) else None

    def _by_prefixes(
        self, record: Record, messages: list[Message], wanted: list[int]
    ) -> list[Rendered] | None:
        """Answers as what follows their prompts, if every prompt and turn begins the whole."""
        text = self._text(messages, record)
        turns = []
        for index in wanted:
            prompt = self._text(messages[:index], record, add_generation_prompt=True)
            last = index == len(messages) - 1
            closed = text if last else self._text(messages[: index + 1], record)
            if not text.startswith(closed):
                # Some templates put the end of text behind the last turn, whatever it is.
                closed = closed.removesuffix(self._eos)
            if not text.startswith(prompt) or not text.startswith(closed):
                return None
            turns.append(_turn(text, len(prompt), len(closed), messages[index]))
        return [Rendered(record, text, tuple(turns))]

    def _alone(self, record: Record, messages: list[Message], answer: int) -> Rendered:
        """One answer, at the end of the conversation that led to it."""
        prompt = self._text(messages[:answer], record, add_generation_prompt=True)
        text = self._text(messages[: answer + 1], record)
        self.fallbacks["show earlier turns differently later, so each answer is learned alone"] += 1
        start = len(prompt)
        if not text.startswith(prompt):
            # The prompt opens something, such as a thought, that this answer goes without.
            start = self._common_start(prompt, text)
            if start < len(self._closed(messages[:answer], record)):
                raise BadRowError(
                    "the model's chat template rewrites the conversation, so the assistant's "
                    "tokens cannot be told apart; use --no-mask-prompt, or another model"
                )
            self.fallbacks["have another start of the answer than in use"] += 1
        return Rendered(record, text, (_turn(text, start, len(text), messages[answer]),))

    def _common_start(self, one: str, other: str) -> int:
        """Characters that two texts share at their starts, in whole tokens of the first."""
        pairs = enumerate(zip(one, other, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
        backend = self._tokenizer.backend_tokenizer
        offsets = backend.encode(one, add_special_tokens=False).offsets
        return max((end for _, end in offsets if end <= shared), default=0)

    def _closed(self, messages: list[Message], record: Record) -> str:
        """A conversation without its last end of text, or nothing."""
        return self._text(messages, record).removesuffix(self._eos) if messages else ""

    def _text(self, messages: list[Message], record: Record, **options: bool) -> str:
        if record.tools is not None:
            options = {**options, "tools": list(record.tools)}  # type: ignore[dict-item]
        with _template_errors():
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))


class _template_errors:
    """Turns what a template raises at a conversation it cannot show into a bad row."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        from jinja2.exceptions import TemplateError

        # A template is a foreign program: it also fails with what Python's operators raise.
        failures = (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError)
        if isinstance(error, failures):
            raise BadRowError(
                f"the model's chat template refuses this conversation: {str(error).rstrip('.')}"
            ) from error


def _turn(text: str, start: int, end: int, message: Message) -> Turn:
    """An answer at ``start:end``; its words end where its content does, if it is there."""
    content = message["content"].strip()
    found = text.rfind(content, start, end) if content else -1
    return Turn(start, found + len(content) if found >= 0 else start, end)


def _without_weight(message: Message) -> Message:
    return {name: value for name, value in message.items() if name != "weight"}
