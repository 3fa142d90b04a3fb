"""The commands as a person runs them: output, exit codes, bad input, Ctrl-C."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections import namedtuple
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path

import pytest

from dora_mlx import chat, export, train
from dora_mlx.__main__ import main as console
from dora_mlx.command_line import DEPENDENCIES, run_command
from dora_mlx.errors import UserError
from dora_mlx.readers.progress_bar import ProgressBar
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.events import read_events
from dora_mlx.training.history import summarize_run

QUICK = ["--steps", "4", "--num-layers", "2", "--steps-per-eval", "4", "--steps-per-save", "2"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(chat_file):
    assert train.main(["--data", str(chat_file), "--run", "r", *QUICK]) == 0
    return RunFolder(Path("runs/r"))


def one_sentence_error(capsys):
    """What went to stderr, which has to be one message without a traceback."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, errors
    return messages[0]


def test_train_says_what_to_try_next_and_those_commands_work(trained, capsys):
    train.main(["--run", "second", *QUICK])
    output = capsys.readouterr().out
    commands = [line.strip() for line in output.splitlines() if line.startswith("  python -m")]
    assert len(commands) == 3
    verbs = {"dora_mlx.chat": chat.main, "dora_mlx.export": export.main}
    for command in commands[1:]:
        _, _, module, *rest = command.replace('"', "").split()
        assert verbs[module](rest) == 0
    written = list(Path("exports").iterdir())
    assert {path.name for path in written} == {"second-f16.gguf", "second-f16.export_report.json"}
    log = (trained.path / "log.txt").read_text()
    assert "validation loss" in log
    # The list of runs has the same loss.
    loss = summarize_run(trained).loss
    assert f"loss {loss:.3f} (mean of the last 4 steps), validation loss" in log


def test_a_stop_before_any_validation_says_so(trained, tmp_path):
    bar = ProgressBar(RunFolder(tmp_path))
    with bar:
        for event in read_events(trained.path):
            if event["event"] != "validation" or event["step"] == 0:
                bar.show(event)
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"validation loss \d+\.\d{3} before training, none since, ", log)


def test_the_last_line_names_the_best_validation_where_it_is_not_the_last(trained, tmp_path):
    last = max(e["step"] for e in read_events(trained.path) if e["event"] == "validation")
    bar = ProgressBar(RunFolder(tmp_path))
    with bar:
        for event in read_events(trained.path):
            if event["event"] == "validation" and event["step"] == last:
                bar.show({**event, "step": last - 1, "loss": 1.25})
                event = {**event, "loss": 7.5}
            bar.show(event)
    assert f"-> 7.500, best 1.250 at step {last - 1}, " in (tmp_path / "log.txt").read_text()


def test_chat_answers_once_compares_and_converses(trained, capsys, monkeypatch):
    assert chat.main(["--run", "r", "--prompt", "Hello!", "--max-tokens", "5"]) == 0
    once = capsys.readouterr().out
    assert once.strip()
    assert chat.main(["--run", "r", "--prompt", "Hello!", "--max-tokens", "5", "--compare"]) == 0
    base, adapted = capsys.readouterr().out.splitlines()
    assert base.startswith("base:    ")
    assert adapted == f"adapted: {once.strip()}"
    lines = iter(["Hello!", "And now?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert chat.main(["--run", "r", "--max-tokens", "5"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2


def test_sampling_is_reproducible_by_seed(trained, capsys):
    def answer(seed):
        flags = ["--prompt", "Tell me a story.", "--temperature", "1.5", "--seed", str(seed)]
        assert chat.main(["--run", "r", "--max-tokens", "20", *flags]) == 0
        return capsys.readouterr().out

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


@pytest.mark.parametrize("output_format", ["safetensors", "gguf"])
def test_export_writes_verifies_and_does_not_replace(trained, capsys, output_format):
    flags = ["--run", "r", "--format", output_format, "--output", "out/model"]
    if output_format == "gguf":
        flags[-1] += ".gguf"
    assert export.main(flags) == 0
    assert "Read back" in capsys.readouterr().out
    assert export.main(flags) == 2
    assert "exists already" in one_sentence_error(capsys)
    assert export.main([*flags, "--overwrite"]) == 0
    written = {path.name for path in Path("out").iterdir()}
    assert written - {"model.export_report.json"} == {Path(flags[-1]).name}


def folder_without_model(tmp_path):
    (tmp_path / "nothing").mkdir()
    return ["--model", "nothing"]


def empty_file(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    return ["--data", "empty.jsonl"]


def bad_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": 5}\n')
    return ["--data", "bad.jsonl"]


BAD_TRAININGS = [
    (lambda _: ["--data", "missing.jsonl"], "There is no data at"),
    (empty_file, "is empty"),
    (bad_line, "1 bad line"),
    (lambda _: ["--model", "mistral-7b-4bitt"], "mistral-7b-4bit"),
    (folder_without_model, "nothing"),
    (lambda _: ["--model", "./no/such/folder"], "no/such/folder"),
    (lambda _: ["--rank", "0"], "--rank must be at least 1"),
    (lambda _: ["--target-modules", "attention"], "matches attention"),
    (lambda _: ["--max-seq-length", "8"], "has no example to train on"),
    (lambda _: ["--resume", "never"], "There is no run 'never'"),
    (lambda _: ["--run", "../escape"], "cannot be a run's name"),
    (lambda _: ["--config", "nowhere.json"], "Cannot read the configuration"),
    (lambda _: ["--runs-dir", "/proc/nowhere"], "Cannot make the run folder"),
]


@pytest.mark.parametrize(("prepare", "message"), BAD_TRAININGS)
def test_bad_training_is_one_sentence_and_leaves_nothing(tmp_path, capsys, prepare, message):
    flags = prepare(tmp_path)
    assert train.main(flags if "--resume" in flags else [*flags, *QUICK]) == 2
    assert message in one_sentence_error(capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (chat.main, ["--run", "nobody"], "There is no run 'nobody'"),
        (export.main, ["--run", "nobody", "--format", "gguf"], "There is no run 'nobody'"),
        (export.main, ["--run", "r", "--format", "gguf", "--quant", "q9"], "--quant q9"),
        (chat.main, ["--run", "r", "--max-tokens", "0"], "--max-tokens must be"),
        (chat.main, ["--run", "r", "--temperature", "-1"], "--temperature must be"),
    ],
)
def test_bad_chat_and_export_are_one_sentence(capsys, main, flags, message):
    assert main(flags) == 2
    assert message in one_sentence_error(capsys)


def test_run_without_an_adapter_yet_is_explained(trained, capsys):
    (trained.path / "adapters.safetensors").unlink()
    assert chat.main(["--run", "r", "--prompt", "Hi"]) == 2
    assert "no adapter yet" in one_sentence_error(capsys)


def test_damaged_adapter_is_explained(trained, capsys):
    adapter = trained.path / "adapters.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-100])
    assert chat.main(["--run", "r", "--prompt", "Hi"]) == 2
    assert "adapters.safetensors" in one_sentence_error(capsys)


def test_adapter_of_another_shape_lists_what_does_not_fit(trained, capsys):
    config = json.loads((trained.path / "adapter_config.json").read_text())
    config["lora_parameters"]["rank"] = 4
    (trained.path / "adapter_config.json").write_text(json.dumps(config))
    assert chat.main(["--run", "r", "--prompt", "Hi"]) == 2
    errors = capsys.readouterr().err
    assert "its scale is 2, which its alpha makes 4" in errors
    assert "model.layers.4-5.mlp.down_proj.lora_b is 8x256 and has to be 4x256" in errors
    assert len(errors.splitlines()) == 1 + 1 + 14


def test_changed_base_model_is_refused(trained, capsys):
    config = json.loads(trained.config_file.read_text())
    config["model"]["fingerprint"] = "0" * 64
    trained.config_file.write_text(json.dumps(config))
    assert chat.main(["--run", "r", "--prompt", "Hi"]) == 2
    assert "is not the one that run r was trained on" in one_sentence_error(capsys)


def test_full_disk_keeps_the_last_state_and_resume_goes_on(chat_file, capsys, monkeypatch):
    usage = namedtuple("usage", "free")
    real = os.strerror(errno.ENOSPC)
    calls = []

    def disk_usage(path):
        calls.append(path)
        # At the start, for the two files of the first checkpoint, and then no more.
        return usage(0 if len(calls) > 3 else 10**12)

    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", disk_usage)
        assert train.main(["--data", str(chat_file), "--run", "r", *QUICK]) == 2
    errors = one_sentence_error(capsys)
    assert "the disk is full" in errors
    assert "--resume r" in errors
    assert real not in errors
    run = Path("runs/r")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert not list(run.glob(".*partial*"))
    assert train.main(["--resume", "r"]) == 0
    assert [e["step"] for e in read_events(run) if e["event"] == "step"] == [1, 2, 3, 4]


def test_disk_that_fills_up_between_checkpoints_takes_no_step_away(chat_file, capsys):
    flags = ["--data", str(chat_file), "--num-layers", "1", "--rank", "1", "--steps", "24"]
    flags += ["--steps-per-eval", "24", "--steps-per-save", "4", "--batch-size", "1"]
    flags += ["--target-modules", "q_proj", "--optimizer", "sgd"]
    assert train.main([*flags, "--run", "whole"]) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The one file that grows; a limit is what a full disk is, and needs no disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_500, limits[1]))
    try:
        assert train.main([*flags, "--run", "r"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = one_sentence_error(capsys)
    assert "events.jsonl could not be written" in message
    assert "go on by --resume r" in message
    done = [e["step"] for e in read_events(Path("runs/r")) if e["event"] == "step"]
    assert 4 < done[-1] < 24
    assert train.main(["--resume", "r"]) == 0
    whole, cut = (
        [(e["step"], e["loss"]) for e in read_events(Path("runs") / run) if e["event"] == "step"]
        for run in ("whole", "r")
    )
    assert whole == cut


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_full_disk_under_the_events_says_how_to_go_on(chat_file, capsys):
    assert train.main(["--data", str(chat_file), "--run", "r", *QUICK]) == 0
    events, kept = Path("runs/r/events.jsonl"), Path("kept")
    events.rename(kept)
    # What is written to it finds no space.
    events.symlink_to("/dev/full")
    assert train.main(["--resume", "r", "--steps", "6"]) == 2
    message = one_sentence_error(capsys)
    assert "events.jsonl could not be written: the disk is full" in message
    assert "go on by --resume r" in message
    kept.rename(events)
    assert train.main(["--resume", "r", "--steps", "6"]) == 0
    steps = [e["step"] for e in read_events(Path("runs/r")) if e["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_too_small_a_disk_is_refused_before_the_run_starts(chat_file, capsys, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**6))
    assert train.main(["--data", str(chat_file), "--run", "r", *QUICK]) == 2
    assert "MB for checkpoints and has 1 MB free" in one_sentence_error(capsys)
    assert not Path("runs").exists()


def test_unknown_flag_is_one_sentence_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--learning-rat", "1e-3"])
    assert end.value.code == 2
    assert "did you mean --learning-rate?" in one_sentence_error(capsys)


def test_write_error_of_mlx_is_not_a_traceback(chat_file, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("[write] Unable to write 1302 bytes to file.")

    monkeypatch.setattr("mlx.core.save_safetensors", fail)
    assert train.main(["--data", str(chat_file), "--run", "r", *QUICK]) == 2
    assert "could not be written" in one_sentence_error(capsys)


def test_ctrl_c_stops_cleanly_and_says_how_to_resume(chat_file, tmp_path):
    flags = ["--data", str(chat_file), "--run", "r", "--steps", "2000", "--steps-per-eval", "2000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dora_mlx.train", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parent.parent)},
    )
    run = Path("runs/r")
    while not any(event["event"] == "step" for event in read_events(run)):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "--resume r" in output
    events = read_events(run)
    assert events[-1]["reason"] == "stopped"
    last = events[-1]["step"]
    assert (run / "checkpoints" / f"step_{last:08d}" / "state.json").is_file()
    # What was trained so far can be used at once.
    assert chat.main(["--run", "r", "--prompt", "Hi", "--max-tokens", "2"]) == 0


def test_console_command_hands_over_to_the_verbs(capsys):
    assert console([]) == 0
    assert "usage: dora-mlx" in capsys.readouterr().out
    assert console(["models"]) == 0
    assert "mistral-7b-4bit" in capsys.readouterr().out
    assert console(["fly"]) == 2
    assert "unknown verb 'fly'" in capsys.readouterr().err
    assert console(["chat", "--run", "nobody"]) == 2


def test_exit_codes(capsys):
    def user_error():
        raise UserError("fix this")

    def full():
        raise OSError(errno.ENOSPC, "x", "file")

    def interrupt():
        raise KeyboardInterrupt

    def bug():
        raise OSError(errno.ENOTTY, "a bug")

    assert [run_command(body) for body in (user_error, full, interrupt)] == [2, 1, 130]
    with pytest.raises(OSError, match="a bug"):
        run_command(bug)


@pytest.mark.parametrize("name", sorted(DEPENDENCIES))
def test_a_missing_dependency_is_one_sentence(name, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert run_command(lambda: import_module(name)) == 2
    assert f"{name} is missing. Run `make demo`" in one_sentence_error(capsys)


def test_dependencies_are_those_that_are_declared():
    declared = {
        re.match(r"[\w-]+", line)[0].replace("-", "_")
        for line in requires("dora-mlx")
        if "extra ==" not in line
    }
    assert declared == DEPENDENCIES


def test_a_missing_module_of_anybody_else_is_a_bug():
    with pytest.raises(ModuleNotFoundError):
        run_command(lambda: import_module("no_such_module"))
