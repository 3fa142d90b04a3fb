"""Whether llama.cpp cuts text into the same tokens as the tokenizer that a file was made from."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from dora_mlx.exporting.gguf.vocabulary import Difference, Vocabulary
from dora_mlx.exporting.logits import VerificationError

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


def probes_for(vocabulary: Vocabulary, texts: Sequence[str] = PROBES) -> list[str]:
    """``texts`` without what llama.cpp is known to tokenize otherwise."""
    if Difference.COMPOSITION in vocabulary.differences:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    if Difference.LETTERS in vocabulary.differences:
        texts = ["".join(filter(_is_plain, text)) for text in texts]
    if Difference.FIRST_SPACE in vocabulary.differences:
        texts = [vocabulary.tokens[vocabulary.bos] + text for text in texts]
    return list(texts)


def _is_plain(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] != "M" and (character.isascii() or category not in ("Lu", "Lt"))


def check_gguf_tokens(
    tokens: dict[str, list[list[int]]], texts: list[str], base_dir: Path, file: Path
) -> None:
    """Compare llama.cpp's tokens of ``texts`` with those of the tokenizer in ``base_dir``.

    Raises:
        VerificationError: Naming the text that differs.
    """
    tokenizer = Tokenizer.from_file(str(base_dir / "tokenizer.json"))
    for key, added in (("plain", False), ("with_special", True)):
        for text, ids in zip(texts, tokens[key], strict=True):
            wanted = tokenizer.encode(text, add_special_tokens=added).ids
            if ids != wanted:
                raise VerificationError(
                    f"llama.cpp tokenizes {text!r} with {file} as {ids}, and it is {wanted}"
                )
