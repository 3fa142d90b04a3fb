"""A chat template in Jinja as one in Go's template language, for Ollama.

Most chat templates write the same text in front of and behind every message of a role. Those
pieces are read off rendered conversations, put together again for others, and compared. A template
that does more than that (tools, dates, thoughts that are dropped later) is not translated.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

Message = dict[str, str]


class _NotRegularError(Exception):
    """A rendered conversation is not made of pieces around messages."""


@dataclass(frozen=True)
class ChatPieces:
    """What a chat template writes around messages.

    Attributes:
        start: In front of everything, without the token that every text begins with.
        system: Before and after a system prompt. In a template that puts it into the first user
            message, nothing and what separates the two.
        user: Before and after a user's message.
        assistant: Before and after an answer.
        ask: Behind it all, for the next answer.
        in_user: Whether the system prompt goes into the first user message.
        default_system: The system prompt where none is given.
    """

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str
    in_user: bool = False
    default_system: str | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, with the question for the next answer at its end."""
        system = [m["content"] for m in messages if m["role"] == "system"]
        prompt = system[0] if system else self.default_system
        text = self.start
        if prompt is not None and self.system is not None and not self.in_user:
            text += self.system[0] + prompt + self.system[1]
            prompt = None
        for message in messages:
            if message["role"] == "user":
                inside = f"{prompt}{self.system[1]}" if prompt and self.system else ""
                text += self.user[0] + inside + message["content"] + self.user[1]
                prompt = None
            elif message["role"] == "assistant":
                text += self.assistant[0] + message["content"] + self.assistant[1]
        return text + self.ask

    def go_template(self) -> str:
        """The same in Go's template language, as Ollama fills it: ``.System``, ``.Messages``."""
        return "".join(self._go())

    def _go(self) -> Iterator[str]:
        yield _literal(self.start)
        if self.in_user:
            yield "{{- $system := .System }}"
        elif self.system is not None:
            before, after = map(_literal, self.system)
            prompt = f"{before}{{{{ .System }}}}{after}"
            always = self.default_system is not None
            yield prompt if always else f"{{{{- if .System }}}}{prompt}{{{{- end }}}}"
        before, after = map(_literal, self.user)
        inside = ""
        if self.in_user and self.system is not None:
            inside = (
                f"{{{{- if $system }}}}{{{{ $system }}}}{_literal(self.system[1])}"
                '{{- $system = "" }}{{- end }}'
            )
        yield "{{- range .Messages }}"
        yield f'{{{{- if eq .Role "user" }}}}{before}{inside}{{{{ .Content }}}}{after}'
        before, after = map(_literal, self.assistant)
        yield f'{{{{- else if eq .Role "assistant" }}}}{before}{{{{ .Content }}}}{after}'
        yield "{{- end }}{{- end }}"
        yield _literal(self.ask)


def find_pieces(tokenizer: Any, bos: str, eos: str) -> ChatPieces | None:
    """The pieces of a tokenizer's chat template, or ``None`` where it is not made of such.

    Args:
        tokenizer: With ``apply_chat_template``.
        bos: Text of the token that the program puts in front of every text, or nothing.
        eos: Text of the token that ends a text; some templates end a conversation with it.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return None

    def render(messages: Sequence[Message], ask: bool = True) -> str:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )
        return str(text).removeprefix(bos)

    try:
        pieces = _read(render, eos)
        for messages in _conversations(pieces.system is not None):
            if pieces.render(messages) != render(messages):
                return None
    except (_NotRegularError, TemplateError):
        return None
    return pieces


def _read(render: Any, eos: str) -> ChatPieces:
    tail = eos if render(_talk("u1"), False).endswith(eos) else ""

    def ended(messages: Sequence[Message]) -> str:
        return str(render(messages, False)).removesuffix(tail)

    ask_first, answered, again = (
        ended(_talk(*words)) for words in (("u1",), ("u1", "a1"), ("u1", "a1", "u2"))
    )
    head, after_user = _split(ask_first, "u1")
    _, rest = _split(again, "u1")
    between, rest = _split(rest, "a1")
    middle, _ = _split(rest, "u2")
    _, after_assistant = _split(answered, "a1")
    before_user = _without(middle, after_assistant, front=True)
    before_assistant = _without(between, after_user, front=True)
    start = _without(head, before_user, front=False)
    ask = _without(render(_talk("u1")), ask_first, front=True)
    user, assistant = (before_user, after_user), (before_assistant, after_assistant)
    try:
        with_system = ended([_message("system", "s1"), _message("user", "u1")])
    except TemplateError:
        return ChatPieces(start, None, user, assistant, ask)
    front, rest = _split(with_system, "s1")
    gap, _ = _split(rest, "u1")
    if not gap.endswith(before_user):
        opening = _without(front, before_user, front=False)
        return ChatPieces(opening, ("", gap), user, assistant, ask, in_user=True)
    system = front, gap[: len(gap) - len(before_user)]
    if start.startswith(front) and start.endswith(system[1]) and len(start) > len(front):
        default = start[len(front) : len(start) - len(system[1])]
        return ChatPieces("", system, user, assistant, ask, default_system=default)
    return ChatPieces(start, (_without(front, start, front=True), system[1]), user, assistant, ask)


def _conversations(with_system: bool) -> Iterator[list[Message]]:
    words = ("How are you?", "Fine.", "And now\nwhat?", "This: {x}", "a  b")
    for length in (1, 3, 5):
        yield _talk(*words[:length])
        if with_system:
            yield [_message("system", "Be brief.\nBe kind."), *_talk(*words[:length])]


def _talk(*words: str) -> list[Message]:
    roles = ("user", "assistant") * len(words)
    return [_message(role, word) for role, word in zip(roles, words, strict=False)]


def _message(role: str, content: str) -> Message:
    # A word that no template has.
    return {"role": role, "content": _MARKS.get(content, content)}


_MARKS = {word: f"\u27e6{word}\u27e7" for word in ("u1", "a1", "u2", "s1")}


def _split(text: str, word: str) -> tuple[str, str]:
    parts = text.split(_MARKS[word])
    if len(parts) != 2:
        raise _NotRegularError(f"{word} is there {len(parts) - 1} times")
    return parts[0], parts[1]


def _without(text: str, part: str, front: bool) -> str:
    if not (text.startswith(part) if front else text.endswith(part)):
        raise _NotRegularError(f"{part!r} is not at the {'start' if front else 'end'} of {text!r}")
    return text.removeprefix(part) if front else text.removesuffix(part)


def _literal(text: str) -> str:
    """``text`` as an action that writes it, safe from what trims spaces or ends a template."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
