"""Names to folders: the list of aliases, paths, and what is said where there is no model."""

import json
import subprocess
import sys

import pytest
from refusals import message_of

from dora_mlx import registry
from dora_mlx.errors import UserError
from dora_mlx.registry import (
    ModelShape,
    list_models,
    models_dir,
    samples_dir,
)


def test_readme_alias_is_a_4_bit_mistral():
    entry = {entry.alias: entry for entry in list_models()}["mistral-7b-4bit"]
    assert entry.hub == "mlx-community/Mistral-7B-Instruct-v0.3-4bit"
    assert entry.license == "Apache-2.0"


def test_starter_comes_first_and_the_rest_is_on_the_hub():
    starter, *others = list_models()
    assert (starter.alias, starter.hub) == ("starter", None)
    assert len(others) >= 20
    hubs = [entry.hub for entry in others]
    assert len(set(hubs)) == len(hubs)
    assert all(registry.HUB_NAME.fullmatch(name) for name in hubs)
    assert all(entry.alias == entry.alias.lower() for entry in others)


@pytest.mark.parametrize("entry", list_models()[1:], ids=lambda entry: entry.alias)
def test_numbers_follow_from_the_shape(entry):
    assert entry.parameters == pytest.approx(entry.shape.parameters, rel=0.01)
    assert entry.download_gb == pytest.approx(entry.shape.parameters * 4.5 / 8e9, abs=0.05)
    assert entry.license


def test_starter_numbers_follow_from_its_folder():
    config = json.loads((models_dir() / "starter" / "config.json").read_text())
    shape = ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        mlp=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab=config["vocab_size"],
        tied=config["tie_word_embeddings"],
    )
    starter = list_models()[0]
    assert starter.shape == shape
    assert starter.parameters == pytest.approx(shape.parameters, rel=0.01)


def test_parameter_counts_are_the_published_ones():
    counts = {entry.alias: entry.shape.parameters for entry in list_models()}
    assert counts["mistral-7b-4bit"] == pytest.approx(7.248e9, rel=1e-3)
    assert counts["llama-3.2-1b-4bit"] == pytest.approx(1.236e9, rel=1e-3)
    assert counts["phi-4-mini-4bit"] == pytest.approx(3.836e9, rel=1e-3)


def test_import_stays_light():
    code = "import sys, dora_mlx.registry as r; r.list_models(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"mlx.core", "huggingface_hub", "transformers"} & set(loaded)


# --- folders ----------------------------------------------------------------------------------


def test_models_are_found_in_a_wheel_and_in_a_clone(tmp_path, monkeypatch):
    assert (models_dir() / "registry.toml").is_file()
    assert samples_dir() == models_dir() / "samples"
    package = tmp_path / "site-packages" / "dora_mlx"
    for folder in (package, package.parent / "models", package / "bundled"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(registry, "__file__", str(package / "registry.py"))
    with pytest.raises(UserError, match="Install it again"):
        models_dir()
    # Some other distribution's `models` beside the package must not be taken for ours.
    (package / "bundled" / "registry.toml").touch()
    (package.parent / "models" / "registry.toml").touch()
    assert models_dir() == package / "bundled"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no config.json"),
        ({"config.json": b"{"}, "config.json is broken"),
        ({"config.json": b"\xff"}, "config.json is broken"),
        ({"config.json": b"[]"}, "no model_type"),
        ({"config.json": b'{"model_type": "llama"}'}, "no weights"),
        ({"config.json": b'{"model_type": "llama"}', "model.safetensors": b""}, "no tokenizer"),
        (
            {
                "config.json": b'{"model_type": "llama"}',
                "model-00001-of-00002.safetensors": b"",
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"b": "model-00002-of-00002.safetensors"}}
                ).encode(),
            },
            "lacks model-00002-of-00002.safetensors",
        ),
    ],
)
def test_incomplete_folder_says_what_is_missing(files, expected, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    message = message_of(str(tmp_path))
    assert "is not a model folder" in message
    assert expected in message


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert "it is a file" in message_of(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "name", ["./nowhere", "~/nowhere/at/all", "~nobody-at-all/x/y", "/nowhere", "a/b/" + "c" * 300]
)
def test_missing_path(name):
    assert f"There is no folder {name}" in message_of(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mistral-7b", "mistral-7b-4bit"), ("qwen3-8b-4bits", "qwen3-8b-4bit"), ("olmo", "olmo-2-7b")],
)
def test_unknown_alias_names_the_nearest(name, nearest):
    message = message_of(name)
    assert nearest in message
    assert "dora-mlx models" in message


@pytest.mark.parametrize("name", ["zzzz", "", "x" * 5000, "\0"])
def test_nonsense_gets_no_suggestion(name):
    message = message_of(name)
    assert "No model is called" in message
    assert "Did you mean" not in message
