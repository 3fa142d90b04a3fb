"""GGUF files in the real llama.cpp: the same logits and the same tokens, and mistakes noticed."""

import json

import pytest
from exporting_models import (
    LLAMA3_SCALING,
    ROWS,
    STARTER,
    adapt,
    change_json,
    make_base,
    quantize,
    some_tokens,
    verify_gguf,
)
from gguf import GGUFReader
from mlx_lm.utils import load_model
from tokenizers import Tokenizer
from trained_tokenizers import SPLITTERS, crossing_tokenizer, nasty_texts, train

from dora_mlx.exporting.gguf import write_gguf
from dora_mlx.exporting.gguf.tokenization import PROBES, as_llama_cpp, check_gguf_tokens
from dora_mlx.exporting.gguf.vocabulary import read_vocabulary
from dora_mlx.exporting.logits import VerificationError
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.verify import llama_cpp_is_installed, run_llama_cpp

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(
        not llama_cpp_is_installed(), reason="no llama_cpp; .ci/llama-cpp-wheel builds it"
    ),
]


SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "head_dim": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_scaling": LLAMA3_SCALING},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_the_same(tmp_path, shape):
    model = adapt(quantize(make_base(tmp_path / "base", **SHAPES[shape])))
    for dtype, limit in (("f32", 1e-5), ("f16", 5e-3)):
        file = tmp_path / f"{dtype}.gguf"
        write_gguf(MergedWeights(model), tmp_path / "base", file, dtype)
        _, report = verify_gguf(file, model, tmp_path / "base", dtype, some_tokens())
        assert report.relative_rms < limit
        assert report.top1_agreement > 0.95
        assert report.kl < limit


def test_llama_cpp_computes_the_same_for_the_starter(tmp_path):
    model, _ = load_model(STARTER)
    adapt(model)
    write_gguf(MergedWeights(model), STARTER, tmp_path / "m.gguf")
    _, report = verify_gguf(tmp_path / "m.gguf", model, STARTER, "f16", some_tokens())
    assert report.relative_rms < 3e-3
    assert report.top1_agreement > 0.95


@pytest.mark.parametrize("mistake", ["permutation", "rope base", "rope factors"])
def test_verification_notices_a_wrong_model(tmp_path, monkeypatch, mistake):
    """The comparison has to fail for the mistakes that load without a word."""
    model = make_base(tmp_path / "base", rope_scaling=LLAMA3_SCALING)
    arch = "dora_mlx.exporting.gguf.tensors."
    if mistake == "permutation":
        monkeypatch.setattr(arch + "permute_heads", lambda tensor, heads: tensor)
    elif mistake == "rope base":
        change_json(tmp_path / "base" / "config.json", rope_theta=10000.0)
    else:
        monkeypatch.setattr("dora_mlx.exporting.gguf.write.rope_tensors", lambda numbers: {})
    write_gguf(MergedWeights(model), tmp_path / "base", tmp_path / "m.gguf")
    with pytest.raises(VerificationError, match="computes something else"):
        verify_gguf(tmp_path / "m.gguf", model, tmp_path / "base", "f16", some_tokens())


def test_spaces_beside_a_token_that_drops_them_are_the_only_difference(tmp_path):
    folder = train(tmp_path / "tokenizer", "gpt-2")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added[1] |= {"lstrip": True, "rstrip": True}
    change_json(folder / "tokenizer.json", added_tokens=added)
    model = make_base(tmp_path / "base", tokenizer=folder)
    write_gguf(MergedWeights(model), tmp_path / "base", tmp_path / "m.gguf")
    texts = [*PROBES, f"some text  {added[1]['content']}  and more"]
    [(_, tokens)] = run_llama_cpp([tmp_path / "m.gguf"], some_tokens(1, 8), texts)
    tokenizer = as_llama_cpp(folder, read_vocabulary(folder, ROWS))
    check_gguf_tokens(tokens, texts, tokenizer, tmp_path / "m.gguf")
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with pytest.raises(VerificationError, match="some text"):
        check_gguf_tokens(tokens, texts, own, tmp_path / "m.gguf")


# Those whose difference shows in any vocabulary.
APART = ("gpt-2", "smollm", "llama-bpe", "qwen2")


@pytest.mark.parametrize("name", [*SPLITTERS, "qwen2-nfc"])
def test_llama_cpp_tokenizes_the_same(tmp_path, name):
    folder = train(tmp_path / "tokenizer", name)
    model = make_base(tmp_path / "base", tokenizer=folder)
    write_gguf(MergedWeights(model), tmp_path / "base", tmp_path / "m.gguf")
    texts = [*PROBES, *nasty_texts(500, seed=2), "<|im_start|>user\nhi 12<|im_end|>\n", ""]
    [(_, tokens)] = run_llama_cpp([tmp_path / "m.gguf"], some_tokens(1, 8), texts)
    pre = GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents()
    assert pre == name.removesuffix("-nfc")
    tokenizer = as_llama_cpp(folder, read_vocabulary(folder, ROWS))
    check_gguf_tokens(tokens, texts, tokenizer, tmp_path / "m.gguf")
    # Where nothing is known to differ, that is the tokenizer itself.
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    different = [t for t in texts if own.encode(t).ids != tokenizer.encode(t).ids]
    assert bool(different) == (name in ("tekken", "gpt-4o", "qwen2-nfc"))


@pytest.mark.parametrize("name", APART)
def test_verification_notices_a_wrong_pretokenizer(tmp_path, name):
    folder = crossing_tokenizer(tmp_path / "tokenizer", *SPLITTERS[name])
    model = make_base(tmp_path / "base", tokenizer=folder)
    files = []
    for other in [name, *(other for other in APART if other != name)]:
        files.append(tmp_path / f"{other}.gguf")
        write_gguf(MergedWeights(model), tmp_path / "base", files[-1], pre=other)
    right, *wrong = run_llama_cpp(files, some_tokens(1, 8), PROBES)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    check_gguf_tokens(right[1], PROBES, tokenizer, files[0])
    for (_, tokens), file in zip(wrong, files[1:], strict=True):
        with pytest.raises(VerificationError, match=r"llama.cpp tokenizes"):
            check_gguf_tokens(tokens, PROBES, tokenizer, file)


def test_bos_is_added_as_the_tokenizer_adds_it(tmp_path):
    make = tmp_path / "base"
    model = make_base(make)
    sequence, special = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"id": "<|im_start|>", "type_id": 0},
    )
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": special}, sequence],
        "pair": [{"SpecialToken": special}, sequence],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}
        },
    }
    change_json(make / "tokenizer.json", post_processor=template)
    change_json(make / "tokenizer_config.json", add_bos_token=None)
    write_gguf(MergedWeights(model), make, tmp_path / "m.gguf")
    reading, _ = verify_gguf(tmp_path / "m.gguf", model, make, "f16", some_tokens())
    assert reading.program == "llama.cpp"
    [(_, tokens)] = run_llama_cpp([tmp_path / "m.gguf"], some_tokens(1, 8), ["hi"])
    assert tokens["with_special"][0] == [1, *tokens["plain"][0]]


def test_a_file_that_llama_cpp_refuses_is_reported_with_its_reason(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(VerificationError, match=r"cannot use .*m\.gguf"):
        run_llama_cpp([tmp_path / "m.gguf"], some_tokens(1, 8), [])
