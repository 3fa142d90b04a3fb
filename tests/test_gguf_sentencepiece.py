"""SentencePiece-style tokenizers in GGUF: what is read from tokenizer.json, and the tokens."""

import json

import pytest
from exporting_models import ROWS, change_json, make_base, some_tokens
from gguf import GGUFReader
from trained_tokenizers import LAYOUTS, nasty_texts, train_pieces

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf import check_gguf_base, write_gguf
from dora_mlx.exporting.gguf.tokenization import PROBES, as_llama_cpp, check_gguf_tokens
from dora_mlx.exporting.gguf.vocabulary import Difference, read_vocabulary
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.verify import llama_cpp_is_installed, run_llama_cpp


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
    [(_, tokens)] = run_llama_cpp([file], some_tokens(1, 8), texts)
    check_gguf_tokens(tokens, texts, as_llama_cpp(folder, vocabulary), file)


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
