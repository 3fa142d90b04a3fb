"""Loading: what arrives, every refusal of a damaged folder, and the fingerprint."""

import json
import struct
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from model_folders import BASE, build, refusal, save, write_config

from dora_mlx.errors import UserError
from dora_mlx.loading import fingerprint, load_base


def test_quantized_16_bit_model_becomes_float32_exactly(model_folder, monkeypatch):
    model, config = build("llama", rope_theta=BASE)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4, class_predicate=divisible)
    save(model_folder, model, {**config, "quantization": {"group_size": 32, "bits": 4}})
    loaded = load_base(model_folder).model
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


def test_result_carries_everything(model_folder):
    model, config = build("llama", rope_theta=BASE, eos_token_id=0)
    save(model_folder, model, config)
    loaded = load_base(model_folder)
    assert loaded.path == model_folder
    assert loaded.tokenizer.eos_token_ids == {0}
    # No template is no error here: plain text can be trained without one.
    assert not loaded.tokenizer.has_chat_template
    # The temporary check must not stay behind on the model.
    assert "load_weights" not in vars(loaded.model)


def test_everything_that_does_not_fit_is_named_at_once(model_folder):
    model, config = build("llama", rope_theta=BASE)
    weights = dict(tree_flatten(model.parameters()))
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.7.mlp.up_proj.weight"] = mx.zeros((2, 2))
    weights["model.norm.weight"] = mx.zeros((33,))
    mx.save_safetensors(str(model_folder / "model.safetensors"), weights)
    write_config(model_folder, config)
    message = refusal(model_folder)
    assert "missing 1 tensors (model.layers.1.mlp.up_proj.weight)" in message
    assert "unexpected 1 tensors (model.layers.7.mlp.up_proj.weight)" in message
    assert "model.norm.weight (33,) for (32,)" in message


def test_a_long_list_of_missing_tensors_is_cut(model_folder):
    model, config = build("llama", rope_theta=BASE)
    save(model_folder, model, {**config, "num_hidden_layers": 9})
    assert "and 55 more" in refusal(model_folder)


def test_truncated_weights(model_folder):
    model, config = build("llama", rope_theta=BASE)
    file = save(model_folder, model, config) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    assert f"cut short: {len(content) - 5} of {len(content)} bytes" in refusal(model_folder)


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
def test_unreadable_weights(content, model_folder):
    _, config = build("llama", rope_theta=BASE)
    write_config(model_folder, config)
    (model_folder / "model.safetensors").write_bytes(content)
    assert "not a readable safetensors file" in refusal(model_folder)


def test_no_weights_and_no_configuration(model_folder):
    assert "no config.json" in refusal(model_folder)
    write_config(model_folder, {"model_type": "llama"})
    assert "no weights" in refusal(model_folder)
    (model_folder / "config.json").write_text("{")
    assert "config.json is broken" in refusal(model_folder)
    (model_folder / "config.json").write_text("[]")
    assert "expected a JSON object" in refusal(model_folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "resnet"}, "mlx-lm has no architecture 'resnet'"),
        ({"model_file": "evil.py"}, "its own code (evil.py)"),
        ({"hidden_size": None}, "does not fit mlx-lm's llama"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "RoPE type spiral"),
    ],
)
def test_configurations_that_mlx_lm_cannot_build(change, expected, model_folder):
    model, config = build("llama", rope_theta=BASE)
    changed = {name: value for name, value in {**config, **change}.items() if value is not None}
    save(model_folder, model, changed)
    assert expected in refusal(model_folder)


def test_configuration_without_a_type(model_folder):
    model, config = build("llama", rope_theta=BASE)
    del config["model_type"]
    save(model_folder, model, config)
    assert "names no model_type" in refusal(model_folder)


def test_broken_or_missing_tokenizer(model_folder):
    model, config = build("llama", rope_theta=BASE)
    save(model_folder, model, config)
    (model_folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json is broken" in refusal(model_folder)
    (model_folder / "tokenizer.json").unlink()
    assert "The tokenizer in" in refusal(model_folder)


# --- fingerprint ------------------------------------------------------------------------------


def test_fingerprint_follows_weights_and_configuration(model_folder):
    model, config = build("llama", rope_theta=BASE)
    save(model_folder, model, config)
    first = fingerprint(model_folder)
    assert len(first) == 64
    save(model_folder, model, config)
    (model_folder / "README.md").write_text("not part of it")
    assert fingerprint(model_folder) == first
    model.model.norm.weight = model.model.norm.weight + 1e-3
    save(model_folder, model, config)
    second = fingerprint(model_folder)
    assert second != first
    write_config(model_folder, {**config, "rope_theta": 1e6})
    assert fingerprint(model_folder) not in {first, second}


def test_fingerprint_reads_little_of_a_large_file(model_folder):
    # 4 GB with a hole: reading all of it would take seconds.
    write_config(model_folder, {"model_type": "llama"})
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 32], "data_offsets": [0, 1 << 32]}})
    file = model_folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with open(file, "r+b") as stream:
        stream.truncate(8 + len(header) + (1 << 32))
        before = fingerprint(model_folder)
        stream.seek(-1, 2)
        stream.write(b"x")
        stream.flush()
        assert fingerprint(model_folder) != before


def test_fingerprint_of_a_truncated_file(model_folder):
    model, config = build("llama", rope_theta=BASE)
    file = save(model_folder, model, config) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short"):
        fingerprint(model_folder)


def test_import_stays_light():
    code = "import sys, dora_mlx.loading; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"mlx.core", "mlx_lm", "transformers"} & set(loaded)
