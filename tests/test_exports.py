"""Exports as a person makes them: every format from one run, what the report says, and uploads."""

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from exporting_models import STARTER
from gguf_models import CASES, make_model
from mlx_lm.utils import save_model

import dora_mlx
from dora_mlx import export, train
from dora_mlx.config import TrainConfig
from dora_mlx.exporting.formats import EXPORT_FORMATS, find_format
from dora_mlx.exporting.job import TrainingLostError
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.finetune import finetune

# Few steps: an update small enough for 4 bits to round it away.
QUICK = ["--steps", "6", "--num-layers", "2", "--steps-per-eval", "6", "--steps-per-save", "6"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def run(place):
    """A run of the starter model on data of its own."""
    data = place / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ((f"What is {n}?", f"Arr, {n} be {n}, matey.") for n in range(40))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", str(data), "--run", "r", "--runs-dir", str(place / "runs"), *QUICK]
    assert train.main(flags) == 0
    return RunFolder(place / "runs" / "r")


@pytest.mark.parametrize("name", [one.name for one in EXPORT_FORMATS])
def test_every_format_is_written_read_back_and_measured(run, tmp_path, name):
    export_format = find_format(name)
    output = tmp_path / f"out{export_format.suffix}"
    phases = []
    report = export.export_run(
        run,
        name,
        output,
        quant=export_format.keeps,
        strict=True,
        progress=lambda phase, done, total: phases.append((phase, done, total)),
    )
    assert report.keeps_training
    assert report.kept_change == pytest.approx(1, abs=0.02)
    assert report.prompts_from.startswith("the run's validation data")
    assert report.prompts >= 10 or "Few examples: this is a rough check." in report.verdict
    assert report.exported.loss == pytest.approx(report.trained.loss, abs=0.02)
    assert report.base.loss > report.trained.loss
    assert report.exported.difference.top1_agreement > 0.9
    assert [phases[0][0], phases[-1][0]] == ["reading", "checking"]
    written = [(done, total) for phase, done, total in phases if phase == "writing"]
    assert written[-1][0] == written[-1][1] > 0
    needed = export.export_size(run, name, export_format.keeps, output).needed
    assert needed == pytest.approx(report.size_bytes, abs=1_500_000)
    assert dora_mlx.read_export_report(output) == report


def test_rounding_that_undoes_the_training_is_said_and_what_keeps_it_does(run, tmp_path, capsys):
    flags = ["--run", run.name, "--runs-dir", str(run.path.parent), "--strict"]
    output = tmp_path / "out"
    lossy = ["--format", "mlx", "--quant", "4bit", "--output", str(output)]
    assert export.main([*flags, *lossy]) == 1
    said = capsys.readouterr()
    assert "has undone much of the training: only" in said.err
    assert "has undone much" not in said.out
    assert "Nothing was kept (--strict)" in said.err
    assert not list(tmp_path.iterdir())
    advice = said.err.split("This keeps it: ")[1].split(". Nothing")[0].split()
    assert export.main([*flags, *advice, "--output", str(output)]) == 0
    assert "The training is in the export" in capsys.readouterr().out
    # Without --strict it is kept, and says the same.
    assert export.main([*flags[:-1], *lossy, "--overwrite"]) == 0
    assert "has undone much" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert "has undone much of the training" in card
    assert str(tmp_path) not in card + (output / "export_report.json").read_text()


def test_what_the_page_of_exports_shows_works(run, tmp_path, capsys, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    shutil.copytree(run.path, tmp_path / "runs" / "first")
    page = (STARTER.parents[1] / "docs" / "export.md").read_text()
    commands = re.search(r"```sh\n(.*?)```", page, re.S)[1].splitlines()
    assert len(commands) == 4
    for command in commands:
        _, _, module, *flags = shlex.split(command)
        assert module == "dora_mlx.export"
        assert export.main(flags) == 0, command
    said = capsys.readouterr().out
    assert "  llama-cli -m exports/first.gguf" in said
    assert "Uploaded to me/first." in said
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(snippet, {})
    size, verdict = capsys.readouterr().out.strip().splitlines()[-2:]
    assert size.startswith("ExportSize(")
    assert verdict.startswith(("True (", "False ("))


def test_next_commands_name_what_was_written(run, tmp_path):
    output = tmp_path / "my models" / "pirate"
    report = replace(export.export_run(run, "mlx", output), format="ollama", run="A+b")
    assert report.next_commands() == [
        f"ollama create a-b -f '{output}'/Modelfile",
        "ollama run a-b",
    ]
    # The embedded model has no name that mlx-lm knows; a model of the Hub has.
    adapter = replace(report, format="mlx-adapter")
    assert adapter.next_commands() == []
    known = replace(adapter, training=replace(adapter.training, base="me/base"))
    assert known.next_commands() == [f"mlx_lm.chat --model me/base --adapter-path '{output}'"]


def test_a_strict_refusal_keeps_the_export_that_was_there(run, tmp_path):
    output = tmp_path / "out"
    export.export_run(run, "mlx", output, quant="none")
    before = (output / "config.json").stat().st_ino
    with pytest.raises(TrainingLostError) as caught:
        export.export_run(run, "mlx", output, quant="4bit", overwrite=True, strict=True)
    assert not caught.value.report.keeps_training
    assert caught.value.report.kept_gain < 0.8
    assert (output / "config.json").stat().st_ino == before


def test_a_language_model_inside_another_model_is_trained_and_exported(chat_file, tmp_path):
    base = tmp_path / "base"
    save_model(base, make_model(base, **CASES["gemma3"]), donate_model=False)
    place = RunFolder(tmp_path / "runs" / "r")
    finetune(TrainConfig(model=str(base), data=str(chat_file), steps=1, batch_size=2), place)
    report = export.export_run(place, "gguf", tmp_path / "m.gguf", quant="f32")
    assert report.kept_change == pytest.approx(1, abs=0.02)


def test_without_the_data_a_prompt_of_our_own_does_and_is_named(run, tmp_path):
    copied = shutil.copytree(run.path, tmp_path / "moved")
    config = json.loads((copied / "config.json").read_text())
    config["options"]["data"] = "/nowhere/private/chat.jsonl"
    (copied / "config.json").write_text(json.dumps(config))
    report = export.export_run(RunFolder(copied), "mlx", tmp_path / "out", quant="none")
    assert report.prompts == 1
    assert report.prompts_from.startswith("one prompt of our own, because the run's data is gone")
    assert "nowhere" not in report.prompts_from
    assert report.trained.loss is None
    assert report.kept_gain is None
    assert report.keeps_training


def test_a_killed_export_leaves_nothing_that_looks_finished(run, tmp_path):
    # At half of the bytes, by SIGKILL: no code of ours runs after that.
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from dora_mlx.export import export_run\nfrom dora_mlx.run_folder import RunFolder\n"
        "def kill(phase, done, total):\n"
        "    if phase == 'writing' and done > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export_run(RunFolder(Path(sys.argv[1])), 'safetensors', Path(sys.argv[2]), progress=kill)"
    )
    output = tmp_path / "out"
    child = subprocess.run([sys.executable, "-c", code, str(run.path), str(output)], check=False)
    assert child.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    export.export_run(run, "mlx-adapter", output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files asks for; keeps what it was given."""

    requests: list = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers.get("Authorization"), body))
        answer = {"url": f"http://{self.headers['Host']}/me/pirate", "name": "me/pirate"}
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self._answer(403, {"error": "no"})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
            }
        elif "/commit/" in self.path:
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": answer["url"]}
        return self._answer(200, answer)

    def do_GET(self):
        self._answer(404, {"error": "not here"})

    def _answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    Hub.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def push(run, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    flags = ["--run", run.name, "--runs-dir", str(run.path.parent), "--format", "peft"]

    def push(token, repo="me/pirate"):
        monkeypatch.setenv("HF_TOKEN", token)
        return export.main([*flags, "--output", str(tmp_path / "out"), "--push", repo])

    return push


def test_push_uploads_the_export_with_a_page_and_nothing_of_the_data(run, push, tmp_path, capsys):
    assert push("hf_right") == 0
    assert "Uploaded to me/pirate." in capsys.readouterr().out
    created = next(json.loads(b) for path, _, b in Hub.requests if path == "/api/repos/create")
    assert created["name"] == "pirate"
    assert created.get("visibility", created.get("private")) in ("private", True)
    lines = next(body for path, _, body in Hub.requests if "/commit/" in path).splitlines()
    files = {
        entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
        for entry in map(json.loads, lines)
        if entry["key"] == "file"
    }
    assert files.keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "export_report.json",
    }
    page = files["README.md"].decode()
    for fact in ("license: apache-2.0", "starter", "DoRA", "rank 8", "examples", "KL (nats)"):
        assert fact in page
    everything = b"".join(body for _, _, body in Hub.requests)
    for private in (str(tmp_path), str(run.path.parent), str(STARTER), "chat.jsonl", "matey"):
        assert private.encode() not in everything
        assert private not in page
        assert private not in files["adapter_config.json"].decode()


@pytest.mark.parametrize(
    ("token", "repo", "said", "kept"),
    [
        ("", "me/pirate", "You are not signed in", False),
        ("hf_right", "pirate", "'pirate' is no name on the Hub", False),
        ("hf_wrong", "me/pirate", "The export is in", True),
    ],
)
def test_an_upload_that_cannot_be_is_one_sentence(push, tmp_path, capsys, token, repo, said, kept):
    assert push(token, repo) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "out").exists() == kept
