"""SentencePiece-style tokenizers in GGUF: what is read from tokenizer.json, and the tokens."""

import json

import pytest
from exporting_models import ROWS, change_json, make_base, some_tokens
from gguf import GGUFReader
from test_llama_cpp import nasty_texts
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf import check_gguf_base, write_gguf
from dora_mlx.exporting.gguf.tokenization import PROBES, probes_for
from dora_mlx.exporting.gguf.vocabulary import Difference, read_vocabulary
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.verify import llama_cpp_is_installed, run_llama_cpp

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


@pytest.fixture(scope="module", params=LAYOUTS)
def exported(request, tmp_path_factory):
    """Layout, tokenizer folder and GGUF file."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_pieces(folder / "tokenizer", request.param)
    model = make_base(folder / "base", tokenizer=tokenizer)
    file = folder / "m.gguf"
    write_gguf(MergedWeights(model), folder / "base", file)
    return request.param, tokenizer, file


def test_keys(exported):
    layout, tokenizer, file = exported
    fields = {k: f.contents() for k, f in GGUFReader(file).fields.items()}
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"]
    types = dict(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    assert fields["tokenizer.ggml.model"] == "llama"
    assert "tokenizer.ggml.merges" not in fields
    assert fields["tokenizer.ggml.add_space_prefix"] == LAYOUTS[layout][2]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert [types[t] for t in ("<unk>", "<s>", "<0x0A>", "<|user|>")] == [2, 3, 6, 3]
    assert types[tokens[-1]] == 5
    # A merge's rank, and the first where two merges make the same piece.
    for rank, pair in list(enumerate(content["model"]["merges"]))[:20]:
        assert scores["".join(pair)] >= -rank
    assert scores["".join(content["model"]["merges"][0])] == 0
    assert ("Phi-3" in fields["general.name"]) == (layout == "phi3")
    if layout == "gemma":
        assert types["\n\n"] == types["<unused1>"] == 4


@pytest.mark.llama_cpp
@pytest.mark.skipif(not llama_cpp_is_installed(), reason="no llama_cpp")
def test_llama_cpp_tokenizes_the_same(exported):
    layout, folder, file = exported
    vocabulary = read_vocabulary(folder, ROWS)
    assert (Difference.FIRST_SPACE in vocabulary.differences) == (layout == "mistral")
    texts = [*PROBES, *nasty_texts(300, seed=2), "<|user|>\n hi<|end|>\n<|assistant|>", " a", ""]
    texts = probes_for(vocabulary, texts)
    [(_, tokens)] = run_llama_cpp([file], some_tokens(1, 8), texts)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for key, added in (("plain", False), ("with_special", True)):
        wrong = [
            (text, ids, tokenizer.encode(text, add_special_tokens=added).ids)
            for text, ids in zip(texts, tokens[key], strict=True)
            if ids != tokenizer.encode(text, add_special_tokens=added).ids
        ]
        assert wrong == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, "cannot change and split text"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cannot change and split text"),
        ({"normalizer": None}, "cannot change and split text"),
    ],
)
def test_layouts_that_are_refused(tmp_path, changes, message):
    train_pieces(tmp_path / "tokenizer", "llama")
    make_base(tmp_path / "base", tokenizer=tmp_path / "tokenizer")
    change_json(tmp_path / "base" / "tokenizer.json", **changes)
    with pytest.raises(UserError, match=message):
        check_gguf_base(tmp_path / "base")


def test_every_byte_is_a_token(tmp_path):
    train_pieces(tmp_path / "tokenizer", "llama")
    make_base(tmp_path / "base", tokenizer=tmp_path / "tokenizer")
    path = tmp_path / "base" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    model["vocab"]["<0x7x>"] = model["vocab"].pop("<0x7F>")
    change_json(path, model=model)
    with pytest.raises(UserError, match=r"lacks 1 of the 256 byte tokens \(<0x7F>"):
        check_gguf_base(tmp_path / "base")
