"""The tokens of a ``tokenizer.json``: their texts, types and merges."""

import re
from collections.abc import Iterator
from typing import Any

from gguf import TokenType

from dora_mlx.errors import UserError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_STRIPPING = ("lstrip", "rstrip", "single_word")
# Added tokens of Phi-3 after which llama.cpp keeps spaces; it removes them after all others.
_PHI3_KEEPING = {"<unk>", "<s>", "<|endoftext|>"}
# The parts of a tokenizer.json that may be sequences, and what holds their steps then.
_CHILDREN = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
}


def steps_of(tokenizer: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The steps of ``normalizer``, ``pre_tokenizer`` or ``post_processor``, in order."""

    def flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
        if step is None:
            return []
        if step["type"] != "Sequence":
            return [step]
        return [inner for child in step[_CHILDREN[part]] for inner in flat(child)]

    return flat(tokenizer.get(part))


def read_tokens(tokenizer: dict[str, Any], rows: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Token texts and types, padded to ``rows`` with unused tokens.

    Args:
        tokenizer: The parsed file.
        rows: Rows of the embedding.
        pieces: Whether the texts are SentencePiece's, some of which stand for bytes.

    Raises:
        UserError: When there are more tokens than rows, or two of the same text.
    """
    unknown = tokenizer["model"].get("unk_token") if pieces else None
    entries = [
        (index, text, _type(text, pieces)) for text, index in tokenizer["model"]["vocab"].items()
    ]
    for token in tokenizer.get("added_tokens", ()):
        kind = TokenType.UNKNOWN if token["content"] == unknown else _added_type(token)
        text = token["content"]
        if pieces and kind == TokenType.USER_DEFINED:
            # llama.cpp looks for these before it writes spaces as U+2581.
            text = text.replace("\u2581", " ")
        entries.append((token["id"], text, kind))
    by_id: dict[int, tuple[str, TokenType]] = {}
    for index, text, kind in entries:
        if index >= rows:
            raise UserError(
                f"Token {index} ({text!r}) is beyond the {rows} rows of the embedding. "
                "Use the tokenizer this model was trained with."
            )
        by_id[index] = (text, kind)
    texts = {text for text, _ in by_id.values()}
    if len(texts) != len(by_id):
        # llama.cpp aborts the whole process on these.
        raise UserError("Two tokens of tokenizer.json have the same text. Repair the tokenizer.")
    if any("\0" in text for text in texts):
        raise UserError(
            "A token of tokenizer.json holds the character NUL, at which llama.cpp ends its text. "
            "Export safetensors instead."
        )
    for index in range(rows):
        if index not in by_id:
            by_id[index] = (_unused_name(index, texts), TokenType.UNUSED)
    return [by_id[i][0] for i in range(rows)], [int(by_id[i][1]) for i in range(rows)]


def read_merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs that are merged, from either of the two forms of ``tokenizer.json``."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if not pairs or any(len(pair) != 2 or " " in pair[0] + pair[1] for pair in pairs):
        raise UserError("The merges of tokenizer.json are missing or hold spaces.")
    return [(first, second) for first, second in pairs]


def is_phi3(tokenizer: dict[str, Any]) -> bool:
    """Whether exactly those tokens swallow the spaces after them that llama.cpp's Phi-3 does."""
    added = tokenizer.get("added_tokens", ())
    stripping = {token["content"] for token in added if token.get("rstrip")}
    expected = {token["content"] for token in added} - _PHI3_KEEPING
    return stripping == expected and "</s>" in stripping


def stripping_tokens(tokenizer: dict[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """``(text, whether it is special, flag)`` of tokens that swallow their surroundings."""
    for token in tokenizer.get("added_tokens", ()):
        for flag in _STRIPPING:
            if token.get(flag):
                yield token["content"], bool(token.get("special")), flag


def _type(text: str, pieces: bool) -> TokenType:
    return TokenType.BYTE if pieces and _BYTE.fullmatch(text) else TokenType.NORMAL


def _added_type(token: dict[str, Any]) -> TokenType:
    text = token["content"]
    looks_special = text.startswith("<|") and text.endswith("|>")
    return TokenType.CONTROL if token.get("special") or looks_special else TokenType.USER_DEFINED


def _unused_name(index: int, taken: set[str]) -> str:
    name = f"[PAD{index}]"
    while name in taken:
        name = f"[{name}]"
    return name
