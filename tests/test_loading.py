"""Loading: the RoPE base that the built model really uses, and every refusal.

Tiny models of real mlx-lm architectures are saved once and given configurations in the form of
Transformers 4 (``rope_theta``) and of Transformers 5 (``rope_parameters``).
"""

import importlib
import json
import struct
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dora_mlx.errors import UserError
from dora_mlx.loading import fingerprint, load_base

BASE = 500_000.0  # nobody's default

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
# model type -> (module of mlx-lm, fields that are its own)
ARCHITECTURES = {
    "llama": ("llama", {}),
    "mistral": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {}),
    "smollm3": ("smollm3", {}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, **MOE}),
}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture
def folder(tmp_path, tokenizer_file):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def build(model_type, **fields):
    """A randomly initialized model of mlx-lm, and the configuration that describes it."""
    module, own = ARCHITECTURES.get(model_type, (model_type, {}))
    config = {"model_type": model_type, **COMMON, **own, **fields}
    arch = importlib.import_module(f"mlx_lm.models.{module}")
    mx.random.seed(0)
    model = arch.Model(arch.ModelArgs.from_dict(config))
    return model, config


def save(folder, model, config, **metadata):
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata)
    write_config(folder, config)
    return folder


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


def transformers_5(config, **parameters):
    """The same configuration with its RoPE base and scaling where Transformers 5 writes them."""
    config = dict(config)
    base = config.pop("rope_theta")
    parameters = parameters or {"rope_type": "default"}
    return {**config, "rope_parameters": {"rope_theta": base, **parameters}}


def rope_bases(model):
    return {module.base for _, module in model.named_modules() if isinstance(module, nn.RoPE)}


def logits(model):
    return model(mx.arange(40)[None] % 64)


def same_logits(one, other):
    return mx.allclose(logits(one), logits(other), rtol=0, atol=1e-5).item()


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load_base(folder)
    message = str(caught.value)
    assert str(folder) in message
    return message


# --- RoPE -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_both_forms_give_the_base_of_the_file(model_type, folder):
    model, config = build(model_type, rope_theta=BASE)
    for form in (config, transformers_5(config)):
        save(folder, model, form)
        loaded = load_base(folder)
        assert rope_bases(loaded.model) == {BASE}
        assert loaded.config["rope_theta"] == BASE
        assert same_logits(loaded.model, model)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "olmo2", "gemma3_text"])
def test_configurations_that_transformers_writes(model_type, folder):
    from transformers import AutoConfig

    own = GEMMA3 if model_type == "gemma3_text" else {}
    model, config = build(model_type, rope_theta=BASE, **own)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    written = AutoConfig.for_model(model_type, **fields)
    written.save_pretrained(folder)
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    loaded = load_base(folder).model
    assert BASE in rope_bases(loaded)
    assert same_logits(loaded, model)


def test_the_base_matters_in_these_tests(folder):
    # Guards the comparison above: a wrong base has to show in the logits.
    model, config = build("llama", rope_theta=BASE)
    save(folder, model, {**config, "rope_theta": 10_000.0})
    assert not same_logits(load_base(folder).model, model)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_no_base_is_refused(model_type, folder):
    model, config = build(model_type, rope_theta=BASE)
    del config["rope_theta"]
    save(folder, model, config)
    assert "gives no RoPE base" in refusal(folder)
    write_config(folder, {**config, "rope_parameters": {"rope_type": "default"}})
    assert "gives no RoPE base" in refusal(folder)


def test_contradicting_forms_are_refused(folder):
    model, config = build("llama", rope_theta=BASE)
    save(folder, model, {**transformers_5(config), "rope_theta": 10_000.0})
    assert "remove the wrong one" in refusal(folder)


def test_scaling_is_read_from_the_new_form(folder):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model, config = build("llama", rope_theta=BASE, rope_scaling=scaling)
    plain, _ = build("llama", rope_theta=BASE)
    assert not same_logits(model, plain)
    del config["rope_scaling"]
    save(folder, model, transformers_5(config, **scaling))
    assert same_logits(load_base(folder).model, model)


def test_phi_long_rope_and_partial_rotation(folder):
    # Phi-4-mini: 3 of 4 dimensions rotate; mlx-lm insists on `type`, Transformers 5 writes
    # `rope_type`.
    scaling = {"short_factor": [1.0] * 3, "long_factor": [2.0, 3.0, 4.0]}
    fields = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32}
    old = {"rope_theta": BASE, "rope_scaling": {"type": "longrope", **scaling}, **fields}
    model, config = build("phi3", **old)
    for name in ("rope_scaling", *fields):
        del config[name]
    save(folder, model, transformers_5(config, rope_type="longrope", **scaling, **fields))
    loaded = load_base(folder)
    assert same_logits(loaded.model, model)
    assert {"partial_rotary_factor", "rope_scaling"} <= loaded.config.keys()


GEMMA3 = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "tie_word_embeddings": True,
}


def gemma3_forms(config):
    """Transformers 5 gives Gemma 3 one set of RoPE parameters per kind of layer."""
    new = {name: value for name, value in config.items() if not name.startswith("rope")}
    new["rope_parameters"] = {
        "full_attention": {
            "rope_theta": config["rope_theta"],
            "rope_type": "linear",
            "factor": 8.0,
        },
        "sliding_attention": {
            "rope_theta": config["rope_local_base_freq"],
            "rope_type": "default",
        },
    }
    return config, new


def gemma3():
    return build(
        "gemma3_text",
        rope_theta=BASE,
        rope_local_base_freq=20_000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        **GEMMA3,
    )


def test_gemma3_has_two_bases(folder):
    model, config = gemma3()
    for form in gemma3_forms(config):
        save(folder, model, form)
        loaded = load_base(folder)
        assert rope_bases(loaded.model) == {BASE, 20_000.0}
        assert same_logits(loaded.model, model)
        assert loaded.vocabulary == COMMON["vocab_size"]


def test_gemma3_without_a_base_is_a_gemma3(folder):
    # The published 4B and 12B files leave it out; mlx-lm's default is the family's one value.
    model, config = build("gemma3_text", **GEMMA3)
    save(folder, model, config)
    assert rope_bases(load_base(folder).model) == {1_000_000.0, 10_000.0}


def test_bases_inside_a_multimodal_configuration(folder):
    model, text = gemma3()
    for form in gemma3_forms(text):
        outer = {"model_type": "gemma3", "vocab_size": 64, "text_config": form}
        weights = {
            f"language_model.{name}": value for name, value in tree_flatten(model.parameters())
        }
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        write_config(folder, outer)
        loaded = load_base(folder).model
        assert rope_bases(loaded) == {BASE, 20_000.0}
        assert same_logits(loaded, model)


def test_two_bases_in_an_architecture_with_one_are_refused(folder):
    model, config = build("llama", rope_theta=BASE)
    kinds = {"full_attention": BASE, "sliding_attention": 10_000.0}
    save(
        folder,
        model,
        transformers_5(config)
        | {"rope_parameters": {kind: {"rope_theta": base} for kind, base in kinds.items()}},
    )
    assert "cannot express" in refusal(folder)


def test_equal_bases_per_layer_type_are_accepted(folder):
    model, config = build("llama", rope_theta=BASE)
    kinds = {kind: {"rope_theta": BASE} for kind in ("full_attention", "sliding_attention")}
    save(folder, model, transformers_5(config) | {"rope_parameters": kinds})
    assert rope_bases(load_base(folder).model) == {BASE}


def test_experts_renamed_by_transformers_5(folder):
    model, config = build("qwen3_moe", rope_theta=BASE)
    config["num_local_experts"] = config.pop("num_experts")
    save(folder, model, config)
    loaded = load_base(folder)
    assert loaded.config["num_experts"] == 4
    assert same_logits(loaded.model, model)


# --- what arrives -----------------------------------------------------------------------------


def test_quantized_16_bit_model_becomes_float32_exactly(folder, monkeypatch):
    model, config = build("llama", rope_theta=BASE)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4, class_predicate=divisible)
    save(folder, model, {**config, "quantization": {"group_size": 32, "bits": 4}})
    loaded = load_base(folder).model
    arrived = dict(tree_flatten(loaded.parameters()))
    if mx.default_device() != mx.cpu:
        assert arrived["model.norm.weight"].dtype == mx.bfloat16
        return
    for name, value in tree_flatten(model.parameters()):
        floating = mx.issubdtype(value.dtype, mx.floating)
        assert arrived[name].dtype == (mx.float32 if floating else mx.uint32)
        assert mx.array_equal(arrived[name], value.astype(arrived[name].dtype))


def divisible(path, module):
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def test_result_carries_everything(folder):
    model, config = build("llama", rope_theta=BASE, eos_token_id=0)
    save(folder, model, config)
    loaded = load_base(folder)
    assert loaded.path == folder
    assert loaded.tokenizer.eos_token_ids == {0}
    # No template is no error here: plain text can be trained without one.
    assert not loaded.tokenizer.has_chat_template
    # The temporary check must not stay behind on the model.
    assert "load_weights" not in vars(loaded.model)


def test_everything_that_does_not_fit_is_named_at_once(folder):
    model, config = build("llama", rope_theta=BASE)
    weights = dict(tree_flatten(model.parameters()))
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.7.mlp.up_proj.weight"] = mx.zeros((2, 2))
    weights["model.norm.weight"] = mx.zeros((33,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    write_config(folder, config)
    message = refusal(folder)
    assert "missing 1 tensors (model.layers.1.mlp.up_proj.weight)" in message
    assert "unexpected 1 tensors (model.layers.7.mlp.up_proj.weight)" in message
    assert "model.norm.weight (33,) for (32,)" in message


def test_a_long_list_of_missing_tensors_is_cut(folder):
    model, config = build("llama", rope_theta=BASE)
    save(folder, model, {**config, "num_hidden_layers": 9})
    assert "and 55 more" in refusal(folder)


def test_truncated_weights(folder):
    model, config = build("llama", rope_theta=BASE)
    file = save(folder, model, config) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    assert f"cut short: {len(content) - 5} of {len(content)} bytes" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 4) + b'{"a"',
        struct.pack("<Q", 8) + b'{"a": 1}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_unreadable_weights(content, folder):
    _, config = build("llama", rope_theta=BASE)
    write_config(folder, config)
    (folder / "model.safetensors").write_bytes(content)
    assert "not a readable safetensors file" in refusal(folder)


def test_no_weights_and_no_configuration(folder):
    assert "no config.json" in refusal(folder)
    write_config(folder, {"model_type": "llama"})
    assert "no weights" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is broken" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "expected a JSON object" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "resnet"}, "mlx-lm has no architecture 'resnet'"),
        ({"model_file": "evil.py"}, "its own code (evil.py)"),
        ({"hidden_size": None}, "does not fit mlx-lm's llama"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "RoPE type spiral"),
    ],
)
def test_configurations_that_mlx_lm_cannot_build(change, expected, folder):
    model, config = build("llama", rope_theta=BASE)
    changed = {name: value for name, value in {**config, **change}.items() if value is not None}
    save(folder, model, changed)
    assert expected in refusal(folder)


def test_configuration_without_a_type(folder):
    model, config = build("llama", rope_theta=BASE)
    del config["model_type"]
    save(folder, model, config)
    assert "names no model_type" in refusal(folder)


def test_broken_or_missing_tokenizer(folder):
    model, config = build("llama", rope_theta=BASE)
    save(folder, model, config)
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json is broken" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "The tokenizer in" in refusal(folder)


# --- fingerprint ------------------------------------------------------------------------------


def test_fingerprint_follows_weights_and_configuration(folder):
    model, config = build("llama", rope_theta=BASE)
    save(folder, model, config)
    first = fingerprint(folder)
    assert len(first) == 64
    save(folder, model, config)
    (folder / "README.md").write_text("not part of it")
    assert fingerprint(folder) == first
    model.model.norm.weight = model.model.norm.weight + 1e-3
    save(folder, model, config)
    second = fingerprint(folder)
    assert second != first
    write_config(folder, {**config, "rope_theta": 1e6})
    assert fingerprint(folder) not in {first, second}


def test_fingerprint_reads_little_of_a_large_file(folder):
    # 4 GB with a hole: reading all of it would take seconds.
    write_config(folder, {"model_type": "llama"})
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 32], "data_offsets": [0, 1 << 32]}})
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with open(file, "r+b") as stream:
        stream.truncate(8 + len(header) + (1 << 32))
        before = fingerprint(folder)
        stream.seek(-1, 2)
        stream.write(b"x")
        stream.flush()
        assert fingerprint(folder) != before


def test_fingerprint_of_a_truncated_file(folder):
    model, config = build("llama", rope_theta=BASE)
    file = save(folder, model, config) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        fingerprint(folder)


def test_import_stays_light():
    code = "import sys, dora_mlx.loading; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"mlx.core", "mlx_lm", "transformers"} & set(loaded)
