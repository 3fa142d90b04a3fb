"""The forms that chat data come in, and how each becomes messages or text.

A file has one form, found from the columns of its first row that has a known one. Names that
are not known are mapped by ``--columns``: ``prompt=question completion=answer``.
"""

import difflib
import json
from collections.abc import Callable
from typing import Any

from dora_mlx.data.conversation import BadRowError, Message, check_messages, kind_of
from dora_mlx.errors import UserError

Value = dict[str, Any]


def _of_messages(value: Value) -> list[Message]:
    return check_messages(_listed(value["messages"]))


def _of_sharegpt(value: Value) -> list[Message]:
    messages = check_messages(_listed(value["conversations"]), "conversations")
    return _with_system(value, messages)


def _of_prompt_completion(value: Value) -> list[Message]:
    """Two texts, or two lists of messages; assistant turns of the prompt are context only."""
    prompt, completion = _listed(value["prompt"]), _listed(value["completion"])
    if isinstance(prompt, list) and isinstance(completion, list):
        context = check_messages(prompt, "prompt")
        for message in context:
            if message["role"] == "assistant":
                message["weight"] = 0
        return context + check_messages(completion, "completion")
    return _with_system(value, _pair(("prompt", prompt), ("completion", completion)))


def _of_alpaca(value: Value) -> list[Message]:
    extra = value.get("input")
    problems = []
    if extra is not None and not isinstance(extra, str):
        problems.append(f"'input' is {kind_of(extra)}, not text")
    instruction = value["instruction"]
    question = f"{instruction}\n\n{extra}" if isinstance(extra, str) and extra else instruction
    if isinstance(extra, str) and not isinstance(instruction, str):
        question = instruction
    if problems:
        raise BadRowError(*problems)
    return _with_system(value, _pair(("instruction", question), ("output", value["output"])))


# Columns that make up a form, by precedence, and the reader of its rows.
FORMS: dict[str, tuple[tuple[str, ...], Callable[[Value], list[Message]]]] = {
    "messages": (("messages",), _of_messages),
    "sharegpt": (("conversations",), _of_sharegpt),
    "prompt-completion": (("prompt", "completion"), _of_prompt_completion),
    "alpaca": (("instruction", "output"), _of_alpaca),
    "text": (("text",), lambda value: []),
}
_KNOWN_COLUMNS = sorted({name for names, _ in FORMS.values() for name in names} | {
    "input", "system", "tools"
})  # fmt: skip
_KNOWN_FORMS = (
    "neither 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and 'output', "
    "nor 'text'"
)


def parse_columns(columns: tuple[str, ...]) -> dict[str, str]:
    """``("prompt=question",)`` -> ``{"question": "prompt"}``: names in the file to known ones.

    Raises:
        UserError: If an entry has no ``=`` or names no known column.
    """
    mapped: dict[str, str] = {}
    for entry in columns:
        known, equals, name = entry.partition("=")
        if not equals or not name or known not in _KNOWN_COLUMNS:
            if known and name in _KNOWN_COLUMNS:
                raise UserError(
                    f"--columns {entry} cannot be used. Did you mean {name}={known}? "
                    "The known name comes first."
                )
            raise UserError(
                f"--columns {entry} cannot be used: write KNOWN=NAME, where KNOWN is one of "
                f"{', '.join(_KNOWN_COLUMNS)} and NAME a column of the file."
            )
        mapped[name] = known
    return mapped


def renamed(value: Value, columns: dict[str, str]) -> Value:
    """A row under the known names; a mapped column takes the place of one of that name."""
    if not columns:
        return value
    rest = {name: item for name, item in value.items() if name not in columns.values()}
    return {columns.get(name, name): item for name, item in rest.items()} | {
        known: value[name] for name, known in columns.items() if name in value
    }


def detect_form(value: Value) -> str | None:
    """The first form whose columns a row has."""
    for form, (names, _) in FORMS.items():
        if all(name in value for name in names):
            return form
    return None


def messages_of(value: Value, form: str) -> list[Message]:
    """The messages in a row of a form; none for plain text.

    Raises:
        BadRowError: If columns are missing or hold something else.
    """
    names, read = FORMS[form]
    missing = [repr(name) for name in names if name not in value]
    if missing:
        found = ", ".join(repr(name) for name in value) or "none"
        raise BadRowError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; "
            f"the columns are {found if len(found) < 200 else found[:197] + '...'}"
        )
    return read(value)


def unknown_form(value: Value, columns: dict[str, str]) -> BadRowError:
    """The error for a row as in the file, before any of a known form, that is of none."""
    names = ", ".join(repr(name) for name in list(value)[:8]) or "none"
    absent = [f"no column {name!r}{_nearest(name, value)}" for name in columns if name not in value]
    if absent:
        return BadRowError(f"there is {' and '.join(absent)}; the columns are {names}")
    hint = ""
    if len(value) >= 2 and all(isinstance(item, str) for item in value.values()):
        first, second = value if len(value) == 2 else ("NAME", "NAME")
        hint = f"; name yours with --columns prompt={first} completion={second}"
    return BadRowError(f"{_KNOWN_FORMS} is there, the columns are {names}{hint}")


def _nearest(name: str, value: Value) -> str:
    nearest = difflib.get_close_matches(name, list(value), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _pair(question: tuple[str, Any], answer: tuple[str, Any]) -> list[Message]:
    problems = []
    for name, text in (question, answer):
        if not isinstance(text, str):
            problems.append(f"'{name}' is {kind_of(text)}, not text")
        elif not text.strip():
            problems.append(f"'{name}' is empty")
    if problems:
        raise BadRowError(*problems)
    return [
        {"role": "user", "content": question[1]},
        {"role": "assistant", "content": answer[1]},
    ]


def _with_system(value: Value, messages: list[Message]) -> list[Message]:
    system = value.get("system")
    if not system:
        return messages
    if not isinstance(system, str):
        raise BadRowError(f"'system' is {kind_of(system)}, not text")
    return [{"role": "system", "content": system}, *messages]


def tools_of(value: Value) -> list[Any] | None:
    """The ``tools`` of a row, for the chat template.

    Raises:
        BadRowError: If they are no list of objects.
    """
    tools = _listed(value.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError("'tools' must be a list of objects")
    return tools


def _listed(value: Any) -> Any:
    """A list that a table holds as JSON text; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(parsed, list) and all(isinstance(item, dict) for item in parsed):
            return parsed
    return value
