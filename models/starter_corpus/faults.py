"""A deliberately bad chat file, one fault a line, for trying the checks of data files."""

import json
from typing import Any

GOOD_CHAT = [
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "The capital of Italy is Rome."},
]
QUESTION, ANSWER = GOOD_CHAT


def _line(messages: Any) -> str:
    return json.dumps({"messages": messages}, ensure_ascii=False)


def _chat(question: Any, answer: Any) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _line(turns)


GOOD_LINE = _line(GOOD_CHAT)
SYSTEM = {"role": "system", "content": "Be kind."}

# (what is wrong, the line); the last six lines do not stop the file from being read.
FAULTS: list[tuple[str, str]] = [
    ("none: a good line", GOOD_LINE),
    ("broken JSON: the last two brackets are missing", GOOD_LINE[:-2]),
    ("broken JSON: single quotes", "{'messages': []}"),
    ("broken JSON: two objects on one line", GOOD_LINE + GOOD_LINE),
    ("a list instead of an object", json.dumps(GOOD_CHAT)),
    ("neither messages nor prompt and completion", '{"question": "Hello!", "answer": "Hi!"}'),
    ("messages is an empty list", _line([])),
    ("messages is text", _line("Hello!")),
    ("a message without a role", _line([{"content": "Hello!"}, ANSWER])),
    ("the unknown role bot", _line([QUESTION, {"role": "bot", "content": "Rome."}])),
    ("a message without content", _line([QUESTION, {"role": "assistant"}])),
    ("empty content", _chat("What is the capital of Italy?", "")),
    ("content of nothing but spaces", _chat("What is the capital of Italy?", "   ")),
    ("the content is a number", _chat("What is 2 plus 3?", 5)),
    ("the content is null", _chat(None, "The capital of Italy is Rome.")),
    ("no assistant message", _line([QUESTION])),
    ("two user messages in a row", _line([QUESTION, QUESTION, ANSWER])),
    ("the assistant speaks first", _line([ANSWER, QUESTION, ANSWER])),
    ("a system message in the middle", _line([QUESTION, SYSTEM, ANSWER])),
    ("only a system message", _line([SYSTEM])),
    ("a blank line, which is skipped", ""),
    ("a duplicate of line 1", GOOD_LINE),
    ("the question of line 1 with another answer", _chat(QUESTION["content"], "It is Milan.")),
    ("a control character in the answer", _chat("Ring the bell.", "Ding\u0007 dong\u0000.")),
    ("an answer of about 6000 words", _chat("Count on and on.", "and one more " * 2000 + "done.")),
    ("the last message is the user's, so it is not learned", _line([*GOOD_CHAT, QUESTION])),
]
