"""GGUF files: keys, tensors and refusals by GGUFReader, and the real llama.cpp on top."""

import json
import math

import gguf
import mlx.core as mx
import numpy as np
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
from gguf_models import CASES, adapt_model, make_model
from mlx_lm.utils import load_model

from dora_mlx.errors import UserError
from dora_mlx.exporting import gguf_file
from dora_mlx.exporting.gguf import check_gguf_base, vocabulary, write_gguf
from dora_mlx.exporting.gguf.hyperparameters import (
    read_hyperparameters,
    read_model_config,
    rope_tensors,
)
from dora_mlx.exporting.gguf.pretokenizer import find_pretokenizer
from dora_mlx.exporting.gguf.tensors import permute_heads, unpermute_heads
from dora_mlx.exporting.logits import VerificationError
from dora_mlx.exporting.merge import MergedWeights


def read(file):
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_keys_of_the_starter(tmp_path):
    model, _ = load_model(STARTER)
    write_gguf(MergedWeights(model), STARTER, tmp_path / "my bot.gguf")
    fields, tensors = read(tmp_path / "my bot.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "my bot",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.vocab_size": 2048,
        "llama.context_length": 512,
        "llama.embedding_length": 256,
        "llama.block_count": 6,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        # <|endoftext|>: without a key llama.cpp takes token 11, a parenthesis here.
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": (STARTER / "chat_template.jinja").read_text(),
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokenizer = json.loads((STARTER / "tokenizer.json").read_text())
    by_id = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    assert fields["tokenizer.ggml.tokens"] == by_id
    assert fields["tokenizer.ggml.token_type"] == [3, 3, 3] + [1] * 2045
    assert fields["tokenizer.ggml.merges"] == [" ".join(m) for m in tokenizer["model"]["merges"]]
    # INT32: llama.cpp refuses unsigned token types.
    types = gguf.GGUFReader(tmp_path / "my bot.gguf").fields["tokenizer.ggml.token_type"].types
    assert types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    # Tied: llama.cpp takes the embedding where there is no output.weight.
    assert "output.weight" not in tensors
    assert len(tensors) == 6 * 9 + 2


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_the_merged_weights(tmp_path, dtype, tied):
    model = adapt(quantize(make_base(tmp_path / "base", tie_word_embeddings=tied)))
    weights = MergedWeights(model)
    write_gguf(weights, tmp_path / "base", tmp_path / "m.gguf", dtype)
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["general.file_type"] == {"f16": 1, "bf16": 32, "f32": 0}[dtype]
    assert len(tensors) == len(weights)
    assert ("output.weight" in tensors) == (not tied)
    kinds = {t.tensor_type.name for n, t in tensors.items() if not n.endswith("norm.weight")}
    assert kinds == {dtype.upper()}
    norms = [tensor for name, tensor in tensors.items() if name.endswith("norm.weight")]
    assert {tensor.tensor_type.name for tensor in norms} == {"F32"}
    down = gguf.dequantize(
        tensors["blk.1.ffn_down.weight"].data, tensors["blk.1.ffn_down.weight"].tensor_type
    )
    merged = np.array(weights["model.layers.1.mlp.down_proj.weight"])
    assert down.shape == merged.shape
    np.testing.assert_allclose(
        down, merged, rtol={"f16": 1e-3, "bf16": 4e-3, "f32": 0}[dtype], atol=1e-6
    )


def neighbours(rows, heads):
    """Row by row: the pair (i, i + half) of a head becomes the pair (2 i, 2 i + 1)."""
    half = len(rows) // heads // 2
    out = np.empty_like(rows)
    for head in range(heads):
        start = head * 2 * half
        for i in range(half):
            out[start + 2 * i] = rows[start + i]
            out[start + 2 * i + 1] = rows[start + half + i]
    return out


def test_query_and_key_rows_become_neighbours(tmp_path):
    options = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
    model = make_base(tmp_path / "base", attention_bias=True, **options)
    weights = MergedWeights(model)
    write_gguf(weights, tmp_path / "base", tmp_path / "m.gguf", "f32")
    _, tensors = read(tmp_path / "m.gguf")
    for part in ("weight", "bias"):
        q, k, v = (
            np.array(weights[f"model.layers.1.self_attn.{name}_proj.{part}"]) for name in "qkv"
        )
        assert np.array_equal(tensors[f"blk.1.attn_q.{part}"].data, neighbours(q, 6))
        assert np.array_equal(tensors[f"blk.1.attn_k.{part}"].data, neighbours(k, 3))
        assert np.array_equal(tensors[f"blk.1.attn_v.{part}"].data, v)


def test_permuted_heads_on_known_numbers():
    assert permute_heads(mx.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert unpermute_heads(permute_heads(mx.arange(24), 2), 2).tolist() == list(range(24))


def test_rows_beyond_the_tokenizer_are_unused_tokens(tmp_path):
    # llama.cpp refuses a file with fewer tokens than embedding rows.
    model = make_base(tmp_path / "base")
    write_gguf(MergedWeights(model), tmp_path / "base", tmp_path / "m.gguf")
    fields, tensors = read(tmp_path / "m.gguf")
    assert len(fields["tokenizer.ggml.tokens"]) == ROWS == tensors["token_embd.weight"].shape[1]
    assert fields["tokenizer.ggml.tokens"][2048] == "[PAD2048]"
    assert fields["tokenizer.ggml.token_type"][2048:] == [5] * (ROWS - 2048)


def test_llama3_scaling_becomes_a_tensor(tmp_path):
    model = make_base(tmp_path / "base", rope_scaling=LLAMA3_SCALING)
    write_gguf(MergedWeights(model), tmp_path / "base", tmp_path / "m.gguf")
    _, tensors = read(tmp_path / "m.gguf")
    factors = tensors["rope_freqs.weight"].data
    # mlx-lm's frequencies are wavelengths / 2 pi: scaled ones over plain ones.
    plain = 5000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(
        factors, np.array(model.layers[0].self_attn.rope._freqs) / plain, rtol=1e-5
    )
    assert factors[0] == 1
    assert factors[-1] == 8
    assert any(1 < factor < 8 for factor in factors)
    assert rope_tensors(read_hyperparameters(*read_model_config(STARTER))) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "rwkv7"}, "'rwkv7' cannot be exported to GGUF yet.*llama, mistral"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_theta": None, "rms_norm_eps": None, "hidden_act": "gelu"}, "rms_norm_eps is.*gelu"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic'.*default, linear, yarn, llama3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "no original_max_position"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0}},
            "llama3 RoPE scaling has no low_freq",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"rope_traditional": True}, "rope_traditional"),
    ],
)
def test_a_config_that_cannot_be_exported(tmp_path, change, message):
    model = make_base(tmp_path / "base")
    change_json(tmp_path / "base" / "config.json", **change)
    refuses(tmp_path, model, message)


def refuses(tmp_path, model, message):
    with pytest.raises(UserError, match=message):
        check_gguf_base(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        write_gguf(MergedWeights(model), tmp_path / "base", tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


WHITESPACE = {"type": "Whitespace"}
DUPLICATE = {"id": 2050, "content": "the", "special": False}
STRIPPING = {"id": 2050, "content": "<mask>", "special": False, "lstrip": True}
TWO_BEFORE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>"}}] * 2 + [{"Sequence": {"id": "A"}}],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pre_tokenizer": WHITESPACE},
            "no pre-tokenizer .*Whitespace.*--pre NAME.*safetensors instead",
        ),
        ({"pre_tokenizer": None}, r"no pre-tokenizer .*\(none; ignore_merges False\)"),
        ({"normalizer": {"type": "NFD"}}, "sets normalizer, which llama.cpp does not follow"),
        ({"post_processor": {"type": "BertProcessing"}}, "post-processor 'BertProcessing'"),
        ({"post_processor": TWO_BEFORE}, "more than one token before or after"),
        ({"added_tokens": [DUPLICATE]}, "Two tokens of tokenizer.json have the same text"),
        ({"added_tokens": [STRIPPING]}, "lstrip of '<mask>'"),
        ({"added_tokens": [{**DUPLICATE, "id": 9999}]}, r"Token 9999 .* beyond the 2080 rows"),
    ],
)
def test_a_tokenizer_that_cannot_be_exported(tmp_path, change, message):
    model = make_base(tmp_path / "base")
    change_json(tmp_path / "base" / "tokenizer.json", **change)
    refuses(tmp_path, model, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Unigram"}, "byte-level BPE .* this one is Unigram"),
        ({"byte_fallback": True}, "lacks 256 of the 256 byte tokens"),
        ({"ignore_merges": True}, "ignore_merges True"),
        ({"merges": []}, "merges of tokenizer.json are missing"),
        ({"dropout": 0.1, "end_of_word_suffix": "</w>"}, "sets dropout, end_of_word_suffix"),
    ],
)
def test_a_tokenizer_model_that_cannot_be_exported(tmp_path, change, message):
    model = make_base(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    change_json(path, model={**json.loads(path.read_text())["model"], **change})
    refuses(tmp_path, model, message)


def test_an_unknown_token_matters_only_when_a_byte_is_missing(tmp_path):
    model = make_base(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    bpe = {**json.loads(path.read_text())["model"], "unk_token": "the"}
    change_json(path, model=bpe)
    check_gguf_base(tmp_path / "base")
    del bpe["vocab"]["!"]
    change_json(path, model=bpe)
    refuses(tmp_path, model, "sets unk_token")


def test_files_that_are_missing_or_broken(tmp_path):
    model = make_base(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{")
    refuses(tmp_path, model, "tokenizer.json is broken")
    (tmp_path / "base" / "tokenizer.json").unlink()
    refuses(tmp_path, model, "it has no tokenizer.json")


def test_an_end_of_text_is_required(tmp_path):
    model = make_base(tmp_path / "base", eos_token_id=None)
    change_json(tmp_path / "base" / "tokenizer_config.json", eos_token=None)
    refuses(tmp_path, model, "names no token that ends a text")


def test_other_stops_are_told_to_llama_cpp(tmp_path):
    make_base(tmp_path / "base")
    # 1 is <|im_start|>, which llama.cpp does not know as a stop; 0 is <|endoftext|>.
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [2, 0, 1, 9]}')
    read = vocabulary.read_vocabulary(tmp_path / "base", ROWS)
    assert (read.eos, read.eot, read.eom) == (2, 1, 9)


def test_the_tokens_that_encoding_adds(tmp_path):
    make_base(tmp_path / "base")
    sequence, special = {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|im_start|>"}}
    template = {"type": "TemplateProcessing", "single": [special, sequence]}
    processors = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    change_json(tmp_path / "base" / "tokenizer_config.json", add_bos_token=None)
    change_json(tmp_path / "base" / "tokenizer.json", post_processor=processors)
    read = vocabulary.read_vocabulary(tmp_path / "base", ROWS)
    assert (read.add_bos, read.bos, read.add_eos) == (True, 1, False)
    change_json(tmp_path / "base" / "tokenizer_config.json", add_bos_token=False)
    with pytest.raises(UserError, match=r"sets add_bos_token to False and tokenizer.json does"):
        vocabulary.read_vocabulary(tmp_path / "base", ROWS)


def test_chat_template_from_either_place(tmp_path):
    make_base(tmp_path / "base")
    change_json(tmp_path / "base" / "tokenizer_config.json", chat_template="old")
    assert "im_start" in vocabulary.read_vocabulary(tmp_path / "base", ROWS).chat_template
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert vocabulary.read_vocabulary(tmp_path / "base", ROWS).chat_template == "old"


def test_merges_in_the_older_form(tmp_path):
    make_base(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    pairs = vocabulary.read_vocabulary(tmp_path / "base", ROWS).merges
    change_json(path, model={**model, "merges": [" ".join(pair) for pair in pairs]})
    assert vocabulary.read_vocabulary(tmp_path / "base", ROWS).merges == pairs


def test_names_and_types_that_llama_cpp_cannot_take(tmp_path):
    model = make_base(tmp_path / "base")
    weights = MergedWeights(model)
    # llama.cpp gives a model of that name Phi-3's token attributes and then fails on it.
    with pytest.raises(UserError, match="without 'phi-3'"):
        write_gguf(weights, tmp_path / "base", tmp_path / "my-Phi-3.gguf")
    with pytest.raises(UserError, match="no GGUF type 'q4'; choose one of f16, bf16, f32"):
        write_gguf(weights, tmp_path / "base", tmp_path / "m.gguf", "q4")


def test_a_config_of_another_model(tmp_path):
    model = make_base(tmp_path / "base")
    change_json(tmp_path / "base" / "config.json", num_key_value_heads=4)
    with pytest.raises(UserError, match=r"k_proj.weight has 32 rows where .* 4 heads"):
        write_gguf(MergedWeights(model), tmp_path / "base", tmp_path / "m.gguf")
    change_json(tmp_path / "base" / "config.json", num_key_value_heads=2, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj.weight has no place"):
        write_gguf(MergedWeights(model), tmp_path / "base", tmp_path / "m.gguf")


def test_progress_counts_bytes(tmp_path):
    model = make_base(tmp_path / "base")
    seen = []
    write_gguf(
        MergedWeights(model),
        tmp_path / "base",
        tmp_path / "m.gguf",
        progress=lambda done, total: seen.append((done, total)),
    )
    _, tensors = read(tmp_path / "m.gguf")
    total = sum(tensor.n_bytes for tensor in tensors.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert len(seen) == len(tensors) + 1


@pytest.mark.parametrize("quant", ["f16", "q4_k_m"])
def test_experts_are_written_in_less_memory_than_they_take(tmp_path, quant):
    large = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 128}
    case = {**CASES["qwen3_moe"], **large, "num_hidden_layers": 1}
    weights = MergedWeights(adapt_model(quantize(make_model(tmp_path / "base", **case))))
    largest = 4 * max(math.prod(shape) for shape in weights.shapes().values())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write_gguf(weights, tmp_path / "base", tmp_path / "m.gguf", quant)
    assert mx.get_peak_memory() - before < 2 * largest


def test_verification_without_llama_cpp_still_compares_every_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "llama_cpp_is_installed", lambda: False)
    base = tmp_path / "base"
    model = adapt(make_base(base, rope_scaling=LLAMA3_SCALING))
    file = tmp_path / "m.gguf"
    write_gguf(MergedWeights(model), base, file)
    reading, _ = verify_gguf(file, model, base, "f16", some_tokens())
    assert reading.tensors == 2 * 9 + 2 + 1
    assert reading.program == "mlx-lm"
    with pytest.raises(VerificationError, match="is F16 in"):
        verify_gguf(file, model, base, "bf16", some_tokens())
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError, match="does not hold the merged weights"):
        verify_gguf(file, model, base, "f16", some_tokens())


def test_the_name_that_also_cleans_up_spaces():
    tokenizer = json.loads((STARTER / "tokenizer.json").read_text())
    path = STARTER / "tokenizer.json"
    assert find_pretokenizer(path, tokenizer, cleans_up_spaces=False) == "smollm"
    assert find_pretokenizer(path, tokenizer, cleans_up_spaces=True) == "starcoder"
