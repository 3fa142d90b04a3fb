"""A tokenizer's files as the arrays and ids that a GGUF file holds.

Everything is read from ``tokenizer.json``, which has all tokens in every version of Transformers,
and from ``tokenizer_config.json``, ``generation_config.json``, ``config.json`` (which tokens end a
text) and ``chat_template.jinja``.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.pretokenizer import find_pretokenizer
from dora_mlx.exporting.gguf.sentencepiece import (
    SpacePrefix,
    check_bytes,
    read_scores,
    read_space_prefix,
)
from dora_mlx.exporting.gguf.tokens import (
    is_phi3,
    read_merges,
    read_tokens,
    steps_of,
    stripping_tokens,
)
from dora_mlx.model_config import read_json, read_json_if_there

_NFC = {"type": "NFC"}
# llama.cpp knows capital letters of ASCII alone where these ask for those of any script, and no
# marks within a word.
_PLAIN_LETTERS = ("tekken", "gpt-4o")
# llama.cpp ends a turn at tokens with these texts without being told.
_KNOWN_STOPS = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "</s>",
}


class Difference(Enum):
    """What llama.cpp tokenizes otherwise, however the file is written, told in a sentence."""

    COMPOSITION = (
        "The tokenizer composes characters (NFC) and llama.cpp does not: letters with their "
        "accents as characters of their own become other tokens there."
    )
    FIRST_SPACE = (
        "The tokenizer puts a space in front of a text that follows no special token, and in "
        "llama.cpp there is none. In a chat every text follows one."
    )
    LETTERS = (
        "llama.cpp splits words with combining marks, and some with capital letters beyond ASCII, "
        "in other places than this tokenizer."
    )
    STRIPPING = (
        "llama.cpp keeps spaces beside some special tokens, where this tokenizer drops them."
    )


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer; ``tokens`` and ``types`` have one entry per embedding row.

    ``scores`` are there for SentencePiece-style BPE alone, ``pretokenizer`` and ``merges`` for
    byte-level BPE. ``phi3`` is true for the tokenizer that llama.cpp knows by the model's name.
    """

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    scores: list[float] | None
    pretokenizer: str
    space_prefix: bool
    phi3: bool
    bos: int
    eos: int
    eot: int
    eom: int | None
    pad: int | None
    unk: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | list[dict[str, str]] | None
    differences: frozenset[Difference]


def read_vocabulary(base_dir: Path, rows: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of the tokenizer in ``base_dir``.

    Args:
        base_dir: Folder of the base model.
        rows: Rows of the embedding; llama.cpp wants exactly as many tokens.
        pre: Name of the pre-tokenizer in llama.cpp, when the person who exports knows it.

    Raises:
        UserError: When llama.cpp would not tokenize exactly as this tokenizer does.
    """
    tokenizer = read_json(base_dir / "tokenizer.json")
    settings = read_json_if_there(base_dir / "tokenizer_config.json")
    pieces = _has_pieces(tokenizer)
    differences = _refuse_other_tokenizers(tokenizer, pieces)
    tokens, types = read_tokens(tokenizer, rows, pieces)
    merges = read_merges(tokenizer["model"])
    prefix = SpacePrefix.NEVER
    pretokenizer = "default"
    if pieces:
        check_bytes(tokens)
        prefix = read_space_prefix(tokenizer)
        if prefix == SpacePrefix.FIRST:
            differences.add(Difference.FIRST_SPACE)
    else:
        cleans_up = bool(settings.get("clean_up_tokenization_spaces", False))
        pretokenizer = pre or find_pretokenizer(base_dir / "tokenizer.json", tokenizer, cleans_up)
        if pretokenizer in _PLAIN_LETTERS:
            differences.add(Difference.LETTERS)
    ids = {token: index for index, token in enumerate(tokens)}
    eos, others = _read_stops(base_dir, settings, ids, tokens)
    pad = _special_id(settings, "pad_token", ids)
    before, after = _read_added(tokenizer, settings, ids, eos)
    bos = before if before is not None else _special_id(settings, "bos_token", ids)
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=merges,
        scores=read_scores(tokens, merges) if pieces else None,
        pretokenizer=pretokenizer,
        space_prefix=prefix == SpacePrefix.ALWAYS,
        phi3=pieces and is_phi3(tokenizer),
        # llama.cpp takes token 11 where none is named, and 11 is an ordinary word.
        bos=_first_known(bos, pad, eos),
        eos=eos,
        # Without one it takes whichever known end of turn its hash table gives first.
        eot=others[0] if others else eos,
        eom=others[1] if len(others) > 1 else None,
        pad=pad,
        unk=_special_id(settings, "unk_token", ids),
        add_bos=before is not None,
        add_eos=after is not None,
        chat_template=_read_chat_template(base_dir, settings),
        differences=frozenset(differences),
    )


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add every key of the tokenizer to ``writer``."""
    writer.add_tokenizer_pre(vocabulary.pretokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(vocabulary.scores)
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_eot_token_id(vocabulary.eot)
    for add, token in (
        (writer.add_eom_token_id, vocabulary.eom),
        (writer.add_pad_token_id, vocabulary.pad),
        (writer.add_unk_token_id, vocabulary.unk),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _has_pieces(tokenizer: dict[str, Any]) -> bool:
    """Whether a BPE is SentencePiece's; the other kind is byte-level.

    Raises:
        UserError: For what is neither.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"The tokenizers that can be exported to GGUF are byte-level BPE and BPE with byte "
            f"fallback, and this one is {model.get('type')}. Export safetensors instead."
        )
    return bool(model.get("byte_fallback"))


def _refuse_other_tokenizers(tokenizer: dict[str, Any], pieces: bool) -> set[Difference]:
    """Refuse what llama.cpp would tokenize otherwise; returns what it seldom does."""
    model = tokenizer["model"]
    altered = [
        name
        for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name)
    ]
    if "unk_token" in altered and (pieces or set(ByteLevel.alphabet()) <= set(model["vocab"])):
        # No text has a byte that is not a token, so nothing ever becomes the unknown token.
        altered.remove("unk_token")
    normalizers = [] if pieces else steps_of(tokenizer, "normalizer")
    if normalizers and normalizers != [_NFC]:
        altered.append("normalizer")
    stripping = [] if pieces and is_phi3(tokenizer) else list(stripping_tokens(tokenizer))
    altered += [f"{flag} of {text!r}" for text, special, flag in stripping if not special]
    if altered:
        raise UserError(
            f"This tokenizer sets {', '.join(altered)}, which llama.cpp does not follow, so it "
            "cannot be exported to GGUF yet. Export safetensors instead."
        )
    differences = set()
    if normalizers:
        differences.add(Difference.COMPOSITION)
    if stripping:
        differences.add(Difference.STRIPPING)
    return differences


def _special_id(settings: dict[str, Any], key: str, ids: dict[str, int]) -> int | None:
    token = settings.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    if text not in ids:
        raise UserError(f"{key} of tokenizer_config.json is {text!r}, which is not a token.")
    return ids[text]


def _read_stops(
    base_dir: Path, settings: dict[str, Any], ids: dict[str, int], tokens: list[str]
) -> tuple[int, list[int]]:
    """The token that ends a text, and others that llama.cpp has to be told of."""
    stops: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = read_json_if_there(base_dir / name).get("eos_token_id")
        stops += found if isinstance(found, list) else [] if found is None else [found]
    eos = _special_id(settings, "eos_token", ids)
    if eos is None and stops:
        eos = stops[0]
    if eos is None:
        raise UserError(
            "This model names no token that ends a text. "
            "Set eos_token in the base model's tokenizer_config.json."
        )
    beyond = [index for index in [eos, *stops] if not 0 <= index < len(tokens)]
    if beyond:
        raise UserError(f"eos_token_id is {beyond[0]}, and there are {len(tokens)} tokens.")
    others = [i for i in dict.fromkeys(stops) if i != eos and tokens[i] not in _KNOWN_STOPS]
    if len(others) > 2:
        raise UserError(
            f"This model stops at {len(others) + 1} tokens of its own, and GGUF has room for 3. "
            "Shorten eos_token_id in the base model's generation_config.json."
        )
    return eos, others


def _first_known(*ids: int | None) -> int:
    return next(index for index in ids if index is not None)


def _read_added(
    tokenizer: dict[str, Any], settings: dict[str, Any], ids: dict[str, int], eos: int
) -> tuple[int | None, int | None]:
    """The tokens that encoding adds before and after a text, where all files agree on them."""
    before, after = _added_by_template(tokenizer, ids)
    for side, added in (("bos", before), ("eos", after)):
        told = settings.get(f"add_{side}_token")
        if told is not None and told != (added is not None):
            raise UserError(
                f"tokenizer_config.json sets add_{side}_token to {told} and tokenizer.json does "
                "the opposite, so programs disagree on this tokenizer. Make the two agree."
            )
    if after not in (None, eos):
        raise UserError("tokenizer.json ends every text with a token other than the end of text.")
    return before, after


def _added_by_template(
    tokenizer: dict[str, Any], ids: dict[str, int]
) -> tuple[int | None, int | None]:
    """The tokens that encoding adds before and after a text."""
    before: int | None = None
    after: int | None = None
    for processor in steps_of(tokenizer, "post_processor"):
        if processor["type"] == "ByteLevel":
            continue
        if processor["type"] != "TemplateProcessing":
            raise UserError(
                f"This tokenizer's post-processor {processor['type']!r} cannot be exported to "
                "GGUF yet. Export safetensors instead."
            )
        texts = [next(iter(item.items())) for item in processor["single"]]
        kinds = [kind for kind, _ in texts]
        place = kinds.index("Sequence")
        if place > 1 or len(kinds) - place > 2:
            raise UserError("This tokenizer adds more than one token before or after a text.")
        if place == 1:
            before = ids[texts[0][1]["id"]]
        if len(kinds) - place == 2:
            after = ids[texts[-1][1]["id"]]
    return before, after


def _read_chat_template(
    base_dir: Path, settings: dict[str, Any]
) -> str | list[dict[str, str]] | None:
    path = base_dir / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return settings.get("chat_template")
