"""Names to folders: aliases, paths, the Hugging Face cache and every way a download fails.

The Hub is a server on this machine that answers as the real one does, so that the exceptions
are those that huggingface_hub really raises.
"""

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants

from dora_mlx import registry, skeleton
from dora_mlx.errors import UserError
from dora_mlx.registry import (
    ModelShape,
    list_models,
    models_dir,
    resolve,
    samples_dir,
)

REPO = "mlx-community/Qwen3-0.6B-4bit"
COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
}


class Hub(BaseHTTPRequestHandler):
    """The routes of the Hub that a download uses; ``status`` and ``code`` make it refuse."""

    status, code = 200, ""

    def do_GET(self):
        if self.status != 200:
            return self.answer(b"{}", self.status, {"X-Error-Code": self.code})
        if "/tree/" in self.path:
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
                for name, data in FILES.items()
            ]
            return self.answer(json.dumps(files).encode())
        if self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": REPO, "sha": COMMIT, "siblings": siblings}
            return self.answer(json.dumps(info).encode())
        data = FILES[self.path.rpartition("/")[2]]
        return self.answer(data, 200, {"ETag": f'"{oid(data)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, body, status=200, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def oid(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(cache, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    set_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def closed_network(cache, monkeypatch):
    # The top-level domain .invalid is reserved: it never resolves, here or anywhere.
    set_endpoint(monkeypatch, "https://hub.invalid")


def set_endpoint(monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def put_in_cache(cache, repo=REPO, files=FILES):
    """The layout that every version of huggingface_hub writes."""
    storage = cache / ("models--" + repo.replace("/", "--"))
    snapshot = storage / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    for name, data in files.items():
        (snapshot / name).write_bytes(data)
    return snapshot


def message_of(name):
    with pytest.raises(UserError) as caught:
        resolve(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the list ---------------------------------------------------------------------------------


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


def test_starter_and_folders_need_no_network(closed_network, tmp_path, monkeypatch):
    assert resolve("starter") == models_dir() / "starter"
    assert resolve("Starter") == models_dir() / "starter"
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(f"./{tmp_path.name}").samefile(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "no config.json"),
        ({"config.json": b"{"}, "config.json is broken"),
        ({"config.json": b"\xff"}, "config.json is broken"),
        ({"config.json": b"[]"}, "no model_type"),
        ({"config.json": b'{"model_type": "llama"}'}, "no weights"),
        ({"config.json": FILES["config.json"], "model.safetensors": b""}, "no tokenizer"),
        (
            {
                "config.json": FILES["config.json"],
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


# --- the Hub ----------------------------------------------------------------------------------


def test_cached_model_asks_no_network(cache, monkeypatch):
    snapshot = put_in_cache(cache)

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert resolve("qwen3-0.6b-4bit") == snapshot
    assert resolve(REPO) == snapshot


def test_download_takes_weights_and_no_code(hub):
    folder = resolve("qwen3-0.6b-4bit")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_interrupted_download_is_completed(hub, cache):
    put_in_cache(cache, files={"config.json": FILES["config.json"]})
    assert (resolve(REPO) / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "GatedRepo", "accept its licence"),
        (403, "GatedRepo", "hf auth login"),
        (401, "RepoNotFound", "or it is private"),
        (404, "RepoNotFound", "check the spelling"),
        (401, "", "refuses your access token"),
        (429, "", "wait a minute"),
        (500, "", "cannot be reached"),
    ],
)
def test_refusals(hub, monkeypatch, status, code, expected):
    monkeypatch.setattr(Hub, "status", status)
    monkeypatch.setattr(Hub, "code", code)
    message = message_of(REPO)
    assert REPO in message
    assert expected in message


def test_closed_network_names_what_is_ready(closed_network, cache):
    put_in_cache(cache, "mlx-community/Qwen3-1.7B-4bit")
    started = time.monotonic()
    message = message_of("mistral-7b-4bit")
    assert time.monotonic() - started < 20
    assert "mlx-community/Mistral-7B-Instruct-v0.3-4bit is not downloaded" in message
    assert "--model starter or qwen3-1.7b-4bit" in message


def test_a_network_that_swallows_packets_is_given_up(cache, monkeypatch):
    # huggingface_hub waits for ever on its own first request.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        set_endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(registry, "FIRST_ANSWER_SECONDS", 0.3)
        started = time.monotonic()
        assert "cannot be reached (timed out)" in message_of(REPO)
        assert time.monotonic() - started < 10


def test_offline_mode(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.close_session()
    assert "--model starter" in message_of(REPO)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "The disk is full"),
        (RuntimeError("IO Error: No space left on device (os error 28)"), "The disk is full"),
        (RuntimeError("CAS service error: request failed"), "CAS service error"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "cannot be written"),
        (OSError("Consistency check failed"), "Consistency check failed"),
    ],
)
def test_failures_while_downloading(hub, monkeypatch, error, expected):
    original = huggingface_hub.snapshot_download

    def fail(repo, *, local_files_only=False, **options):
        if local_files_only:
            return original(repo, local_files_only=True, **options)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert expected in message_of(REPO)


def test_impossible_hub_name(closed_network):
    assert "not a possible Hub name" in message_of("owner/name--with..dots")


def test_downloaded_folder_without_a_model(hub, monkeypatch):
    # A GGUF-only repository has a config.json but nothing that MLX loads.
    monkeypatch.delitem(FILES, "model.safetensors")
    assert "no weights" in message_of(REPO)


# --- what is known before a download ----------------------------------------------------------

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "rope_theta": 10000.0,
    "quantization": {"group_size": 64, "bits": 4},
}


def test_two_small_files_of_the_hub_are_enough_for_a_plan(hub, cache, monkeypatch):
    names = {"model.layers.0.self_attn.q_proj.scales": "model.safetensors"}
    monkeypatch.setitem(FILES, "config.json", json.dumps(TINY).encode())
    index = json.dumps({"weight_map": names}).encode()
    monkeypatch.setitem(FILES, "model.safetensors.index.json", index)
    skeleton._from_hub.cache_clear()
    facts = skeleton.find_facts(REPO)
    assert (facts.source, facts.weights) == ("hub", frozenset(names))
    layers = skeleton.build_skeleton(facts).layers
    # Only what the index names is quantized.
    assert "scales" in layers[0].self_attn.q_proj
    assert "scales" not in layers[1].self_attn.q_proj
    assert not list(cache.rglob("*.safetensors"))
    skeleton._from_hub.cache_clear()


def test_without_a_network_the_registry_knows_the_sizes(closed_network):
    facts = skeleton.find_facts("qwen3-0.6b-4bit")
    assert facts.source == "registry"
    assert facts.config["hidden_size"] == 1024
    with pytest.raises(UserError, match="cannot be reached"):
        skeleton.find_facts("owner/unknown")
