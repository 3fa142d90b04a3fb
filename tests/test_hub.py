"""Models of the Hugging Face Hub: the cache, downloads and every way they fail.

The Hub is a server on this machine that answers as the real one does, so that the exceptions
are those that huggingface_hub really raises.
"""

import errno
import hashlib
import json
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from huggingface_hub import constants
from refusals import message_of

from dora_mlx import registry, skeleton
from dora_mlx.data.records import find_data
from dora_mlx.errors import UserError
from dora_mlx.registry import (
    models_dir,
    resolve,
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


def test_starter_and_folders_need_no_network(closed_network, tmp_path, monkeypatch):
    assert resolve("starter") == models_dir() / "starter"
    assert resolve("Starter") == models_dir() / "starter"
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(f"./{tmp_path.name}").samefile(tmp_path)


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


def test_a_copied_configuration_is_enough_for_a_plan(closed_network, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    facts = skeleton.find_facts(str(tmp_path))
    assert (facts.source, facts.folder, facts.weights) == ("configuration", None, None)
    assert "scales" in skeleton.build_skeleton(facts).layers[1].self_attn.q_proj
    # To train it, the weights are needed after all.
    assert "no weights" in message_of(str(tmp_path))


def test_without_a_network_the_registry_knows_the_sizes(closed_network):
    facts = skeleton.find_facts("qwen3-0.6b-4bit")
    assert facts.source == "registry"
    assert facts.config["hidden_size"] == 1024
    with pytest.raises(UserError, match="cannot be reached"):
        skeleton.find_facts("owner/unknown")


def test_without_network_a_data_set_is_asked_for_once(closed_network, monkeypatch):
    asked = []

    def fail(*arguments, **options):
        asked.append(arguments)
        raise socket.gaierror("Name or service not known")

    pytest.importorskip("datasets")
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UserError, match=r"hub:owner/name is not downloaded and the Hub cannot be"):
        find_data("hub:owner/name")
    assert len(asked) == 1


def test_a_data_set_that_the_hub_refuses_is_refused_in_a_sentence(hub, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
    monkeypatch.setattr(hub, "status", 404)
    monkeypatch.setattr(hub, "code", "RepoNotFound")
    with pytest.raises(UserError, match=r"hub:owner/name cannot be loaded: .* doesn't exist"):
        find_data("hub:owner/name")
    with pytest.raises(UserError, match="hub:a/b/c cannot be loaded: Repo id"):
        find_data("hub:a/b/c")
