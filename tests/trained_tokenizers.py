"""Small tokenizers of every kind that GGUF export knows, trained here, and texts to try them on."""

import json
import random
from pathlib import Path

from exporting_models import change_json
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from dora_mlx.exporting.gguf import pretokenizer


def crossing_tokenizer(folder, pre_tokenizer, ignore_merges=False):
    """A vocabulary whose merges cross every boundary, so that only the splitter keeps them apart.

    A vocabulary trained behind its own splitter has no such merges and hides a wrong one.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2040,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(nasty_texts(300, seed=1), trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    change_json(folder / "tokenizer.json", pre_tokenizer=pre_tokenizer)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return folder


WORDS = (
    "a b the Don't you'LL it's 'S 're ' '' x1 12 123 1234 3.14 ½ ² Ⅷ ٣ \n \n\n \r\n \t"
    " . , ... !? -- /* */ _ __init__ <| |> ( ) {} é Ünï мир 你好 한 हि ไทย 👩\u200d👩\u200d👧 🤷🏽"
    " e\u0301 ﬁ"
)


def nasty_texts(count, seed):
    pieces = WORDS.split(" ")
    pieces += [
        " ",
        "  ",
        "   ",
        "\n\n\n",
        "\t\t",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\x00\x1f",
    ]
    draw = random.Random(seed)
    return ["".join(draw.choices(pieces, k=draw.randint(1, 25))) for _ in range(count)]


def byte_level(use_regex):
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex, behavior="Isolated", invert=False):
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}
    return sequence(step, byte_level(False))


SPLITTERS = {
    "gpt-2": (byte_level(True), False),
    "smollm": (sequence(DIGITS, byte_level(True)), False),
    "llama-bpe": (split(pretokenizer._LLAMA3), True),
    "dbrx": (split(pretokenizer._LLAMA3, "Removed", True), False),
    "qwen2": (split(pretokenizer._QWEN2), False),
    "qwen35": (split(pretokenizer._QWEN35), False),
    "tekken": (split(pretokenizer._TEKKEN), True),
    "gpt-4o": (split(pretokenizer._GPT4O), False),
}


PREPEND = {"type": "Prepend", "prepend": "\u2581"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
BOTH = {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}
METASPACE = {
    "type": "Metaspace",
    "replacement": "\u2581",
    "prepend_scheme": "first",
    "split": False,
}
AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
# normalizer, pre_tokenizer, and whether a space is put in front.
LAYOUTS = {
    "llama": (BOTH, None, True),
    "mistral": (None, METASPACE, False),
    "gemma": (REPLACE, {**AT_SPACES, "invert": False}, False),
    "phi3": (BOTH, None, True),
}
ROLES = ("<|user|>", "<|assistant|>", "<|end|>")


def train_pieces(folder, layout):
    """A small BPE over pieces in one of the layouts that checkpoints have."""
    normalizer, splitter, _ = LAYOUTS[layout]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1900, special_tokens=special, show_progress=False)
    # llama.cpp holds no token with the character NUL.
    texts = [text.replace("\0", "") for text in nasty_texts(300, seed=1)]
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:4]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    rstrip = layout == "phi3"
    tokenizer.add_special_tokens([AddedToken(t, rstrip=rstrip, normalized=False) for t in ROLES])
    if layout == "gemma":
        tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<unused1>")])
    tokenizer.decoder = decoders.ByteFallback()
    content = json.loads(tokenizer.to_str())
    content["normalizer"], content["pre_tokenizer"] = normalizer, splitter
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    if layout == "phi3":
        for token in content["added_tokens"]:
            if token["content"] == "</s>":
                token["rstrip"] = True
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    return folder


def train(folder: Path, kind: str) -> Path:
    """A tokenizer of one of ``SPLITTERS`` or ``LAYOUTS``, or Qwen's, which composes."""
    if kind in LAYOUTS:
        return train_pieces(folder, kind)
    composes = kind == "qwen2-nfc"
    crossing_tokenizer(folder, *SPLITTERS["qwen2" if composes else kind])
    if composes:
        change_json(folder / "tokenizer.json", normalizer={"type": "NFC"})
    return folder
