"""The turns of a conversation, checked and in one form."""

import json
import re
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# What ShareGPT calls them.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# Who may speak after whom; a tool speaks after an assistant that called one.
_FOLLOWS = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calling": ("tool", "user"),
    "tool": ("tool", "assistant"),
}
# Kept from a message besides role and content, if text: chat templates know them.
_TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content", "thinking")
# Control characters apart from tab, line feed and carriage return, and the mark of lost text.
_ODD_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRowError(Exception):
    """What is wrong with one row: one sentence for each problem."""

    def __init__(self, *problems: str):
        super().__init__("; ".join(problems))
        self.problems = list(problems)


def check_messages(turns: Any, where: str = "messages") -> list[Message]:
    """The messages of a list of turns, each in the form the chat templates know.

    Raises:
        BadRowError: With everything that is wrong with every message.
    """
    if not isinstance(turns, list) or not turns:
        what = "an empty list" if isinstance(turns, list) else kind_of(turns)
        raise BadRowError(f"'{where}' must be a list with at least one message, not {what}")
    messages: list[Message] = []
    problems: list[str] = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.append(_message(turn, number))
        except BadRowError as error:
            problems += error.problems
    if problems:
        raise BadRowError(*problems)
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError(f"message {number} is {kind_of(turn)}, not an object")
    if "role" not in turn and "from" in turn:
        role = turn["from"]
        role = SHAREGPT_ROLES.get(role) if isinstance(role, str) else None
        content, known, given = turn.get("value"), tuple(SHAREGPT_ROLES), turn["from"]
    else:
        role, content, known, given = turn.get("role"), turn.get("content"), ROLES, turn.get("role")
    problems = []
    if role not in known:
        shown = "no role" if given is None else f"the role {_short(given)}"
        problems.append(f"message {number} has {shown}; it must be one of {', '.join(known)}")
    calls = turn.get("tool_calls")
    message: Message = {"role": role, "content": None}
    try:
        message["content"] = _content(content, bool(calls), number, role)
        if calls:
            message["tool_calls"] = _tool_calls(calls, role, number)
    except BadRowError as error:
        problems += error.problems
    if problems:
        raise BadRowError(*problems)
    message |= {name: turn[name] for name in _TEXT_FIELDS if isinstance(turn.get(name), str)}
    # OpenAI's fine-tuning files say so of an answer that gives context only.
    if role == "assistant" and turn.get("weight") == 0:
        message["weight"] = 0
    return message


def _content(content: Any, has_calls: bool, number: int, role: Any) -> str:
    if content is None and has_calls:
        return ""
    if isinstance(content, list) and content:
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise BadRowError(f"the content of message {number} has parts that are not text")
        content = "".join(texts)
    if not isinstance(content, str):
        raise BadRowError(f"the content of message {number} is {kind_of(content)}, not text")
    # The result of a tool may be empty; an answer or a question may not.
    if not content.strip() and not has_calls and role != "tool":
        raise BadRowError(f"message {number} ({_short(role)}) is empty")
    return content


def _tool_calls(calls: Any, role: Any, number: int) -> list[Any]:
    """Tool calls with their arguments as objects, which is what templates expect."""
    if role != "assistant":
        raise BadRowError(f"message {number} has tool calls, but only the assistant may call")
    if not isinstance(calls, list):
        raise BadRowError(f"the tool_calls of message {number} are {kind_of(calls)}, not a list")
    parsed = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"a tool call of message {number} names no function")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise BadRowError(
                    f"the arguments of a tool call of message {number} are not JSON"
                ) from error
        function = {**function, "arguments": arguments}
        parsed.append({"type": "function", **call, "function": function})
    return parsed


def check_order(messages: list[Message]) -> None:
    """Make sure that the turns alternate and that there is one to learn.

    Raises:
        BadRowError: Naming the first message out of turn.
    """
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        raise BadRowError(f"message {number}: a system message may only come first")
    if "assistant" not in roles:
        raise BadRowError("there is no assistant message, so nothing to learn from")
    before = "start"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system":
            continue
        if role not in _FOLLOWS[before]:
            expected = " or the ".join(f"{name}'s" for name in _FOLLOWS[before])
            raise BadRowError(f"message {number} is from the {role}, but it is the {expected} turn")
        before = "calling" if message.get("tool_calls") else role


def odd_character(messages: list[Message]) -> str | None:
    """A sentence about the first control character, or ``None``."""
    for number, message in enumerate(messages, start=1):
        if found := _ODD_CHARACTER.search(message["content"]):
            return (
                f"message {number} has the control character U+{ord(found[0]):04X}"
                if found[0] != "\ufffd"
                else f"message {number} has U+FFFD, the mark of text that was lost"
            )
    return None


def check_characters(value: Any) -> None:
    """Refuse halves of surrogate pairs anywhere in a value: no tokenizer takes them.

    Raises:
        BadRowError: If there is one.
    """
    if isinstance(value, str):
        if not value.isascii() and _SURROGATE.search(value):
            raise BadRowError("half of a surrogate pair (\\ud800 to \\udfff) is no character")
    elif isinstance(value, dict):
        for name, item in value.items():
            check_characters(name)
            check_characters(item)
    elif isinstance(value, list):
        for item in value:
            check_characters(item)


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    if value is None:
        return "missing or null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", dict: "an object"}
    return names.get(type(value), "a list" if isinstance(value, list) else "another type")


def _short(value: Any) -> str:
    text = value if value in ROLES else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
