"""A tokenizer's files as the arrays and ids that a GGUF file holds.

Everything is read from ``tokenizer.json``, which has all tokens in every version of Transformers,
and from ``tokenizer_config.json``, ``generation_config.json`` and ``chat_template.jinja``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.pretokenizer import find_pretokenizer
from dora_mlx.model_config import read_json, read_json_if_there

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


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary; ``tokens`` and ``types`` have one entry per embedding row."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pretokenizer: str
    bos: int
    eos: int
    eot: int
    eom: int | None
    pad: int | None
    unk: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | list[dict[str, str]] | None


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
    _refuse_other_tokenizers(tokenizer)
    pretokenizer = pre or find_pretokenizer(
        tokenizer, bool(settings.get("clean_up_tokenization_spaces", False))
    )
    tokens, types = _read_tokens(tokenizer, rows)
    ids = {token: index for index, token in enumerate(tokens)}
    eos, others = _read_stops(base_dir, settings, ids, tokens)
    pad = _special_id(settings, "pad_token", ids)
    before, after = _added_by_template(tokenizer, ids)
    bos = before if before is not None else _special_id(settings, "bos_token", ids)
    for side, added in (("bos", before), ("eos", after)):
        told = settings.get(f"add_{side}_token")
        if told is not None and told != (added is not None):
            raise UserError(
                f"tokenizer_config.json sets add_{side}_token to {told} and tokenizer.json does "
                "the opposite, so programs disagree on this tokenizer. Make the two agree."
            )
    if after not in (None, eos):
        raise UserError(f"tokenizer.json ends every text with a token other than {tokens[eos]!r}.")
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=_read_merges(tokenizer["model"]),
        pretokenizer=pretokenizer,
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
    )


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add every key of the tokenizer to ``writer``."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pretokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
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
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _refuse_other_tokenizers(tokenizer: dict[str, Any]) -> None:
    model = tokenizer["model"]
    kind = model.get("type")
    if kind != "BPE" or model.get("byte_fallback"):
        name = "SentencePiece-style BPE" if kind == "BPE" else kind
        raise UserError(
            f"Only byte-level BPE tokenizers can be exported to GGUF yet, and this one is {name}. "
            "Export safetensors instead."
        )
    altered = [
        name
        for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name)
    ]
    if set(ByteLevel.alphabet()) <= set(model["vocab"]) and "unk_token" in altered:
        # No text has a byte that is not a token, so nothing ever becomes the unknown token.
        altered.remove("unk_token")
    if list(_normalizers(tokenizer.get("normalizer"))):
        altered.append("normalizer")
    altered += [
        f"{flag} of {token['content']!r}"
        for token in tokenizer.get("added_tokens", ())
        for flag in ("lstrip", "rstrip", "single_word")
        if token.get(flag)
    ]
    if altered:
        raise UserError(
            f"This tokenizer sets {', '.join(altered)}, which llama.cpp does not follow, so it "
            "cannot be exported to GGUF yet. Export safetensors instead."
        )


def _normalizers(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for child in part["normalizers"]:
        yield from _normalizers(child)


def _read_tokens(tokenizer: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Token texts and types, padded to ``rows`` with unused tokens."""
    entries = [
        (index, text, TokenType.NORMAL) for text, index in tokenizer["model"]["vocab"].items()
    ]
    entries += [
        (token["id"], token["content"], _added_type(token))
        for token in tokenizer.get("added_tokens", ())
    ]
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
    for index in range(rows):
        if index not in by_id:
            by_id[index] = (_unused_name(index, texts), TokenType.UNUSED)
    return [by_id[i][0] for i in range(rows)], [int(by_id[i][1]) for i in range(rows)]


def _added_type(token: dict[str, Any]) -> TokenType:
    text = token["content"]
    looks_special = text.startswith("<|") and text.endswith("|>")
    return TokenType.CONTROL if token.get("special") or looks_special else TokenType.USER_DEFINED


def _unused_name(index: int, taken: set[str]) -> str:
    name = f"[PAD{index}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _read_merges(model: dict[str, Any]) -> list[str]:
    """Each merge as ``first second``, from either of the two forms of ``tokenizer.json``."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if not pairs or any(len(pair) != 2 or " " in pair[0] + pair[1] for pair in pairs):
        raise UserError("The merges of tokenizer.json are missing or hold spaces.")
    return [" ".join(pair) for pair in pairs]


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


def _added_by_template(
    tokenizer: dict[str, Any], ids: dict[str, int]
) -> tuple[int | None, int | None]:
    """The tokens that encoding adds before and after a text."""
    before: int | None = None
    after: int | None = None
    for processor in _processors(tokenizer.get("post_processor")):
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


def _processors(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for child in part["processors"] for step in _processors(child)]


def _read_chat_template(
    base_dir: Path, settings: dict[str, Any]
) -> str | list[dict[str, str]] | None:
    path = base_dir / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return settings.get("chat_template")
