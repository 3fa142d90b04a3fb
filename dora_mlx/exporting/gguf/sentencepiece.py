"""SentencePiece-style BPE with byte fallback, as llama.cpp's ``llama`` tokenizer runs it.

Here spaces are the character U+2581, there is no splitter before the merges, and a character that
is no token becomes its bytes. llama.cpp merges by the score of the token that results; the order
of the merges gives those scores back.
"""

from enum import Enum
from typing import Any

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.tokens import steps_of

_SPACE = "\u2581"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
# A piece that no merge makes comes after all that one does.
_UNMERGED = -1e6


class SpacePrefix(Enum):
    """Where a tokenizer puts a space in front of text that has none."""

    NEVER = "never"
    # At the start of a text, and after every special token.
    ALWAYS = "always"
    # At the start of a text alone. In a chat every text follows a special token.
    FIRST = "first"


def read_scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """A score for every token: minus the rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks[token]) if token in ranks else _UNMERGED for token in tokens]


def read_space_prefix(tokenizer: dict[str, Any]) -> SpacePrefix:
    """Where the tokenizer of a ``tokenizer.json`` puts a space.

    Raises:
        UserError: When it changes or splits text in a way that llama.cpp has no switch for.
    """
    normalizers = steps_of(tokenizer, "normalizer")
    splitters = steps_of(tokenizer, "pre_tokenizer")
    replaces = [part for part in normalizers if part == _REPLACE]
    prepends = [part for part in normalizers if part == {"type": "Prepend", "prepend": _SPACE}]
    spaces = [part for part in splitters if _is_metaspace(part)]
    # Gemma splits at spaces, of which its normalizer has left none.
    idle = [part for part in splitters if replaces and part.get("pattern") == {"String": " "}]
    known = len(replaces) + len(prepends) + len(spaces) + len(idle)
    if known != len(normalizers) + len(splitters) or len(replaces) + len(spaces) != 1:
        raise UserError(
            "llama.cpp cannot change and split text as this tokenizer does (normalizer "
            f"{tokenizer.get('normalizer')}, pre_tokenizer {tokenizer.get('pre_tokenizer')}), so "
            "it cannot be exported to GGUF yet. Export safetensors instead."
        )
    if spaces:
        return SpacePrefix(spaces[0].get("prepend_scheme", "always"))
    return SpacePrefix.ALWAYS if prepends else SpacePrefix.NEVER


def check_bytes(tokens: list[str]) -> None:
    """Make sure that every byte is a token: llama.cpp aborts at one that is not.

    Raises:
        UserError: Naming one that is missing.
    """
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - set(tokens)
    if missing:
        raise UserError(
            f"tokenizer.json lacks {len(missing)} of the 256 byte tokens ({min(missing)} for "
            "one), which llama.cpp cannot do without. Repair the tokenizer."
        )


def _is_metaspace(part: dict[str, Any]) -> bool:
    return part["type"] == "Metaspace" and part["replacement"] == _SPACE and not part.get("split")
