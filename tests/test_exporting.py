"""Merged weights and the Hugging Face layout: names, values, and a reload by mlx-lm."""

import json
from dataclasses import replace
from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from exporting_models import (
    STARTER,
    adapt,
    make_base,
    quantize,
    some_tokens,
    verify_safetensors,
    write_safetensors,
)
from mlx_lm.utils import load_model

from dora_mlx.errors import UserError
from dora_mlx.exporting.logits import VerificationError, check_rounding, compare_logits
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.safetensors import plain_config


def llama_names(layers: int, tied: bool, biases: bool = False) -> set[str]:
    """What Transformers' LlamaForCausalLM has, written down independently."""
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not tied:
        names.add("lm_head.weight")
    for i in range(layers):
        linear = [f"self_attn.{p}_proj" for p in "qkvo"]
        linear += [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
        names |= {f"model.layers.{i}.{name}.weight" for name in linear}
        if biases:
            names |= {f"model.layers.{i}.{name}.bias" for name in linear}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names.add(f"model.layers.{i}.{norm}.weight")
    return names


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("adapted", [False, True])
def test_names_and_shapes_are_those_of_a_plain_checkpoint(tmp_path, tied, bits, adapted):
    model = make_base(
        tmp_path, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, head_dim=32
    )
    if bits:
        quantize(model, bits)
    if adapted:
        adapt(model)
    weights = MergedWeights(model)
    shapes = weights.shapes()
    assert set(shapes) == llama_names(2, tied, biases=True)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (128, 64)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (64, 64)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (64, 96)
    for name, tensor in weights.items():
        assert tensor.dtype == mx.float32
        assert tuple(tensor.shape) == shapes[name]


def test_adapted_weight_and_base_bias_come_from_the_adapted_layer(tmp_path):
    model = adapt(quantize(make_base(tmp_path, attention_bias=True)))
    weights = MergedWeights(model)
    layer = model.layers[1].self_attn.q_proj
    base = layer.base
    name = "model.layers.1.self_attn.q_proj"
    dense = mx.dequantize(base.weight, base.scales, base.biases, base.group_size, base.bits)
    moved = dense + layer.scale * (layer.lora_a @ layer.lora_b).T
    expected = layer.magnitude[:, None] * moved / mx.linalg.norm(moved, axis=1, keepdims=True)
    assert mx.allclose(weights[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    assert mx.array_equal(weights[f"{name}.bias"], base.bias)
    assert not mx.allclose(expected, dense, atol=1e-2)


def test_a_stand_in_with_merged_weight_is_enough(tmp_path):
    # The contract is the method and the child ``base``, not the class.
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.lora_a = mx.zeros((4, 2))

        def merged_blocks(self):
            yield self.base.weight * 2

    model = make_base(tmp_path)
    attention = model.layers[0].self_attn
    before = attention.o_proj.weight
    attention.o_proj = Adapted(attention.o_proj)
    weights = MergedWeights(model)
    assert set(weights.shapes()) == llama_names(2, tied=True)
    assert mx.array_equal(weights["model.layers.0.self_attn.o_proj.weight"], before * 2)


def test_tensors_are_computed_one_at_a_time(tmp_path):
    # Peak memory of an export is the largest tensor, not the model.
    model = quantize(make_base(tmp_path, num_hidden_layers=8, hidden_size=256, head_dim=64))
    weights = MergedWeights(model)
    sizes = [4 * prod(shape) for shape in weights.shapes().values()]
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    for name in weights:
        weights[name]
    assert mx.get_peak_memory() - start < 3 * max(sizes) < sum(sizes) / 1.5


def test_shapes_compute_nothing(tmp_path):
    model = adapt(quantize(make_base(tmp_path)))
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    MergedWeights(model).shapes()
    assert mx.get_peak_memory() <= start


def test_an_unknown_packing_is_refused(tmp_path):
    # A layer of packed integers without scales would be exported as its packed values.
    model = make_base(tmp_path)
    model.layers[0].mlp.up_proj.weight = mx.zeros((24, 64), mx.uint8)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj.*uint8"):
        MergedWeights(model)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
def test_round_trip_through_mlx_lm(tmp_path, dtype, tied, bits):
    model = make_base(tmp_path / "base", tie_word_embeddings=tied)
    model = adapt(quantize(model, bits) if bits else model)
    write_safetensors(MergedWeights(model), tmp_path / "base", tmp_path / "out", dtype)
    report = verify_safetensors(tmp_path / "out", model, some_tokens())
    limit = {"bf16": 2e-2, "f16": 3e-3}[dtype]
    assert report.relative_rms < limit
    assert report.kl < limit
    assert report.max_abs_logit_difference > 0


def test_starter_keeps_its_answers(tmp_path):
    model, _ = load_model(STARTER)
    adapt(model)
    write_safetensors(MergedWeights(model), STARTER, tmp_path / "out")
    report = verify_safetensors(tmp_path / "out", model, some_tokens())
    assert report.relative_rms < 2e-2
    assert report.top1_agreement > 0.9


def test_shards_and_their_index(tmp_path):
    model = adapt(make_base(tmp_path / "base", tie_word_embeddings=False))
    weights = MergedWeights(model)
    seen = []
    write_safetensors(
        weights,
        tmp_path / "base",
        tmp_path / "out",
        progress=lambda done, total: seen.append((done, total)),
        max_shard_bytes=100_000,
    )
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    size = 2 * sum(prod(shape) for shape in weights.shapes().values())
    assert index["metadata"]["total_size"] == size
    assert index["weight_map"].keys() == weights.shapes().keys()
    for name, file in index["weight_map"].items():
        assert name in mx.load(str(tmp_path / "out" / file))
    # Embedding and head are larger than the limit: alone in a file, not split.
    assert (tmp_path / "out" / index["weight_map"]["lm_head.weight"]).stat().st_size > 100_000
    assert seen[0] == (0, size)
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)
    verify_safetensors(tmp_path / "out", model, some_tokens())


def test_one_file_has_no_index_and_every_key_transformers_expects(tmp_path):
    model = adapt(quantize(make_base(tmp_path / "base", tie_word_embeddings=False)))
    write_safetensors(MergedWeights(model), tmp_path / "base", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    tensors, metadata = mx.load(str(tmp_path / "out" / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "pt"}
    assert set(tensors) == llama_names(2, tied=False)
    # Norms too: one tensor of another type makes Transformers keep two types.
    assert {tensor.dtype for tensor in tensors.values()} == {mx.bfloat16}


def test_config_and_copied_files(tmp_path):
    base = tmp_path / "base"
    packed = {"group_size": 32, "bits": 4}
    model = make_base(base, quantization=packed, quantization_config=packed, dtype="float32")
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    (base / "LICENSE").write_text("terms")
    (base / "run_me.py").write_text("raise SystemExit")
    write_safetensors(MergedWeights(model), base, tmp_path / "out", "f16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config
    assert "quantization_config" not in config
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert not (tmp_path / "out" / "run_me.py").exists()


def test_rope_parameters_are_written_in_both_forms(tmp_path):
    # mlx-lm reads rope_theta only and falls back to 10000 without a word.
    model = make_base(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    path.write_text(json.dumps(config))
    write_safetensors(MergedWeights(model), tmp_path / "base", tmp_path / "out")
    verify_safetensors(tmp_path / "out", model, some_tokens())


@pytest.mark.parametrize("tied", [True, False])
def test_tying_is_written_where_the_base_leaves_it_open(tmp_path, tied):
    # mlx-lm takes True for it and Transformers False, and would make up the missing head.
    model = make_base(tmp_path / "base", tie_word_embeddings=tied, model_type="mistral")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    write_safetensors(MergedWeights(model), tmp_path / "base", tmp_path / "out")
    verify_safetensors(tmp_path / "out", model, some_tokens())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' cannot be exported.*llama, mistral"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"rope_parameters": {"rope_theta": 1.0}}, "remove the wrong one"),
        ({"rope_traditional": True}, "rope_traditional"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path, change, message):
    model = make_base(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        plain_config(json.loads(path.read_text()), "bfloat16")
    with pytest.raises(UserError, match=message):
        write_safetensors(MergedWeights(model), tmp_path / "base", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_base_folder_is_never_replaced(tmp_path):
    model = make_base(tmp_path / "base")
    # Replacing the base model would delete what the adapter needs.
    for output in (tmp_path / "base", tmp_path):
        with pytest.raises(UserError, match="holds the base model"):
            write_safetensors(MergedWeights(model), tmp_path / "base", output, overwrite=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [(1e5, "1e\\+05, too large for float16.*bfloat16"), (float("nan"), "NaN.*earlier checkpoint")],
)
def test_values_that_do_not_fit_stop_the_export(tmp_path, value, message):
    model = make_base(tmp_path / "base")
    model.model.norm.weight = model.model.norm.weight.at[3].add(value)
    with pytest.raises(UserError, match=message):
        write_safetensors(MergedWeights(model), tmp_path / "base", tmp_path / "out", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_verification_notices_a_missing_adapter(tmp_path):
    # The tensors are compared bit for bit: a small update hides in the rounding of the logits.
    model = make_base(tmp_path / "base")
    write_safetensors(MergedWeights(model), tmp_path / "base", tmp_path / "out")
    adapt(model)
    with pytest.raises(VerificationError, match=r"q_proj.weight .* does not hold the merged"):
        verify_safetensors(tmp_path / "out", model, some_tokens())


def test_verification_notices_a_wrong_config(tmp_path):
    model = make_base(tmp_path / "base")
    write_safetensors(MergedWeights(model), tmp_path / "base", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 100.0}))
    with pytest.raises(VerificationError, match="computes something else"):
        verify_safetensors(tmp_path / "out", model, some_tokens())


def test_verification_leaves_the_model_in_its_mode(tmp_path):
    model = make_base(tmp_path / "base")
    write_safetensors(MergedWeights(model), tmp_path / "base", tmp_path / "out")
    model.train()
    verify_safetensors(tmp_path / "out", model, some_tokens())
    assert model.training


def test_compare_logits_on_known_numbers():
    a = np.log(np.array([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]], dtype=np.float32))
    b = np.log(np.array([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]], dtype=np.float32))
    report = compare_logits(a, b)
    assert report.max_abs_logit_difference == pytest.approx(np.log(2))
    assert report.top1_agreement == 0.5
    assert report.kl == pytest.approx(0.25 * np.log(2) / 2)
    assert report.relative_rms == pytest.approx(np.log(2) / np.sqrt(3) / a.std())
    # A constant shift of all logits is no difference of the distributions.
    assert compare_logits(a, a + 1).kl == pytest.approx(0, abs=1e-6)
    for wrong in (a * np.nan, a[:, :1]):
        with pytest.raises(VerificationError):
            compare_logits(a, wrong)
    # NaN must not slip through a comparison with the limit.
    with pytest.raises(VerificationError):
        check_rounding(replace(report, relative_rms=float("nan")), mx.float32, STARTER)
