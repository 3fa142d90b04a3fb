"""Whether llama.cpp cuts text into the same tokens as the tokenizer that a file was made from."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from dora_mlx.exporting.gguf.tokens import steps_of
from dora_mlx.exporting.gguf.vocabulary import Difference, Vocabulary
from dora_mlx.exporting.logits import VerificationError
from dora_mlx.model_config import read_json

# Contractions, runs of digits and spaces, line ends, scripts, joined emoji, special tokens.
PROBES = (
    "Hello, world! It's 2024-05-17, 12:34:56.789 -- you'll SEE they'VE done it",
    "  two  spaces\tand\ttabs \n\n\n new lines \r\n and trailing   ",
    "naïve café Ünïcödé Ωmega Привет мир 你好世界 こんにちは 한국어 עברית العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🤷🏽‍♀️ e\u0301 \u00a0\u2003\u3000 ﬁ ½ ² Ⅷ ١٢٣ \U0001d7d8\U0001d7d9 \u200b\ufeff",
    "def f(x):\n    return {'a': [1, 22, 333], \"b\": x**2 != 3.14e-10}  # done\n",
    "https://example.org/a_b?c=1&d=%20#x !!!??? ... ''' \"\"\" ``` <|>|< 's 'S 't'T",
    "0 00 000 1234567890 1,000,000 3rd 4x4 a1b2c3 v1.2.3",
)


_MARKS = r"[^\r\n\p{L}\p{N}]?"
# A letter that is no small one of ASCII, and one that is no capital of ASCII.
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_ENDING = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What llama.cpp splits by where it cannot tell letters as the tokenizer does.
_LETTERS = {
    "tekken": rf"{_MARKS}{_UPPER}*{_LOWER}+|{_MARKS}{_UPPER}+{_LOWER}*|\p{{N}}{_REST}",
    "gpt-4o": (
        rf"{_MARKS}{_UPPER}*{_LOWER}+{_ENDING}|{_MARKS}{_UPPER}+{_LOWER}*{_ENDING}"
        rf"|\p{{N}}{{1,3}}{_REST}"
    ),
}


def as_llama_cpp(base_dir: Path, vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer in ``base_dir`` with what llama.cpp is known to do otherwise, and no more."""
    content = read_json(base_dir / "tokenizer.json")
    differences = vocabulary.differences
    if Difference.COMPOSITION in differences:
        content["normalizer"] = None
    if Difference.LETTERS in differences:
        split = {"pattern": {"Regex": _LETTERS[vocabulary.pretokenizer]}, "invert": False}
        split |= {"type": "Split", "behavior": "Isolated"}
        (*_, to_bytes) = steps_of(content, "pre_tokenizer")
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, to_bytes]}
    if Difference.FIRST_SPACE in differences:
        for step in steps_of(content, "pre_tokenizer"):
            step["prepend_scheme"] = "never"
    if Difference.STRIPPING in differences:
        for token in content["added_tokens"]:
            token["lstrip"] = token["rstrip"] = False
    return Tokenizer.from_str(json.dumps(content))


def check_gguf_tokens(
    tokens: dict[str, list[list[int]]], texts: Sequence[str], tokenizer: Tokenizer, file: Path
) -> None:
    """Compare llama.cpp's tokens of ``texts`` with those of ``tokenizer``.

    Raises:
        VerificationError: Naming the text that differs.
    """
    for key, added in (("plain", False), ("with_special", True)):
        for text, ids in zip(texts, tokens[key], strict=True):
            wanted = tokenizer.encode(text, add_special_tokens=added).ids
            if ids != wanted:
                raise VerificationError(
                    f"llama.cpp tokenizes {text!r} with {file} as {ids}, and it is {wanted}"
                )
