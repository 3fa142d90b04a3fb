"""The server as a program on the same machine uses it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from adapter_models import attach_moved, write_base

import dora_mlx
from dora_mlx import ChatModel, Sampling, serve
from dora_mlx.adapters.adapter_folder import save_adapter
from dora_mlx.adapters.swapping import SwappableModel
from dora_mlx.loading import load_base
from dora_mlx.server import AdapterServer

MESSAGES = [{"role": "user", "content": "Hello!"}]
PACKAGE = Path(dora_mlx.__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("base") / "q4", bits=4)
    for seed, name in enumerate(("one", "two")):
        model = load_base(base).model
        spec = attach_moved(model, "dora", seed=seed)
        (base.parent / name).mkdir()
        save_adapter(base.parent / name, model, spec)
    return base, base.parent / "one", base.parent / "two"


@pytest.fixture(scope="module")
def server(folders):
    base, *adapters = folders
    words = ["--model", base, "--adapter", *adapters, "--port", "0", "--max-tokens", "8"]
    log = base.parent / "server.log"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "dora_mlx.serve", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        )
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line
    yield line.split()[-1], process
    # A clean end, also with a connection open.
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "Stopped." in process.stdout.read()
    # One line for every request, and nothing of what it said.
    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("127.0.0.1 - - [")] == []


def ask(url, **body):
    request = urllib.request.Request(
        f"{url}/chat/completions",
        json.dumps({"messages": MESSAGES, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def text_of(answer):
    return json.loads(answer)["choices"][0]["message"]["content"] or ""


def test_each_name_answers_as_chat_does(server, folders):
    url, _ = server
    base, *adapters = folders
    chat = ChatModel.load(str(base))
    for folder in adapters:
        chat.add_adapter(folder.name, folder)
    sampling = Sampling(max_tokens=8)
    wanted = {n: "".join(chat.stream(MESSAGES, sampling, adapter=n)) for n in (None, "one", "two")}
    assert len(set(wanted.values())) == 3
    for name in ("two", "one", None, "two"):
        answer = text_of(ask(url, model=name or str(base)))
        assert answer == wanted[name], name
    # Who asks for nobody gets the first adapter; mlx-lm's own field chooses one as well.
    assert text_of(ask(url)) == wanted["one"]
    assert text_of(ask(url, adapters="two")) == wanted["two"]


def test_answers_come_piece_by_piece(server):
    url, _ = server
    events = [
        line.removeprefix("data: ")
        for line in ask(url, model="one", stream=True).splitlines()
        if line.startswith("data: ")
    ]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert len([piece for piece in pieces if piece]) > 2
    assert "".join(pieces) == text_of(ask(url, model="one"))


def test_list_of_models_is_what_can_be_asked_for(server, folders):
    url, _ = server
    with urllib.request.urlopen(f"{url}/models", timeout=60) as response:
        names = [model["id"] for model in json.load(response)["data"]]
    assert names == ["one", "two", str(folders[0])]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "/etc"}, "There is no model '/etc' here"),
        ({"model": "mlx-community/Some-Model"}, "There is no model"),
        ({"adapters": "/etc"}, "There is no model '/etc' here"),
        ({"draft_model": "x"}, "no draft model"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "Only text",
        ),
        ({"temperature": -1}, "temperature must be at least 0"),
        # Each of these would end mlx-lm's answering thread for good, or the process.
        ({"stop": 5}, "'stop' has to be a text"),
        ({"stop": [5]}, "'stop' has to be a text"),
        ({"logit_bias": {"99999999": 1}}, "'logit_bias' has to give tokens below"),
        ({"logit_bias": {"1": None}}, "'logit_bias' has to give"),
        ({"seed": -1}, "'seed' has to be at least 0"),
        ({"xtc_probability": 0.1, "xtc_threshold": 0.9}, "'xtc_threshold' has to be"),
        ({"stream_options": 5, "stream": True}, "'stream_options' has to be"),
        ({"messages": "Hello!"}, "'messages' has to be a list"),
        ({"messages": []}, "'messages' has to be a list"),
        ({"messages": ["Hello!"]}, "Message 1 has to be an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "Only text"),
    ],
)
def test_what_is_not_served_is_refused(server, body, message):
    url, process = server
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, **body)
    assert message in json.load(error.value)["error"]
    assert process.poll() is None


def test_an_empty_prompt_is_refused_and_top_k_may_be_too_large(server):
    url, _ = server
    assert text_of(ask(url, model="one", top_k=10**9, temperature=1.0))
    request = urllib.request.Request(f"{url}/completions", b'{"prompt": ""}')
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=60)


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b"null", b"5"])
def test_a_body_that_is_no_object_is_refused_and_not_logged(server, body):
    url, process = server
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body), timeout=60)
    assert error.value.code == 400
    assert "not a JSON object" in json.load(error.value)["error"]
    assert process.poll() is None


def test_a_request_that_is_too_much_is_not_the_last_one(folders, monkeypatch):
    server = AdapterServer(
        SwappableModel.load(str(folders[0])), "base", "127.0.0.1", 0, Sampling(max_tokens=2), []
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr("mlx_lm.server._make_sampler", lambda *_: 1 / 0)
            with pytest.raises(http.client.RemoteDisconnected):
                ask(server.url)
        assert text_of(ask(server.url))
    finally:
        server.stop()
        thread.join()


def test_web_pages_may_not_read_answers(server):
    url, _ = server
    request = urllib.request.Request(f"{url}/models", headers={"Origin": "https://example.org"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_are_let_in_only_explicitly(capsys, host):
    assert serve.main(["--model", "starter", "--host", host]) == 2
    assert "--allow-network" in capsys.readouterr().err


def test_taken_port_and_nothing_to_serve_are_sentences(capsys, folders):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ["--model", str(folders[0]), "--port", str(taken.getsockname()[1])]
        assert serve.main(flags) == 2
    assert "Choose another --port" in capsys.readouterr().err
    assert serve.main([]) == 2
    assert "--run" in capsys.readouterr().err
    assert serve.main(["--model", str(folders[0]), "--port", "99999"]) == 2
    assert "between 0 and 65535" in capsys.readouterr().err
