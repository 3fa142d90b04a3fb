"""Runs drawn by TensorBoard, Weights & Biases and trackio, read back from what they keep."""

import importlib.util
import json
from pathlib import Path

import pytest

from dora_mlx import train
from dora_mlx.readers.reports import WRITERS, reports, run_id
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.events import read_events

QUICK = ["--num-layers", "1", "--batch-size", "2", "--steps-per-eval", "2", "--steps-per-save", "2"]


@pytest.fixture(autouse=True)
def on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def trained(chat_file, kind):
    """A run of two steps that was made longer by two, and what was recorded of it."""
    pytest.importorskip(WRITERS[kind][1])
    flags = ["--data", str(chat_file), "--run", "r", "--steps", "2", *QUICK]
    assert train.main([*flags, "--report", kind]) == 0
    assert train.main(["--resume", "r", "--steps", "4", "--report", kind]) == 0
    run = RunFolder(Path("runs/r"))
    losses = {e["step"]: e["loss"] for e in read_events(run.path) if e["event"] == "step"}
    assert len(losses) == 4
    return run, losses


def test_tensorboard_draws_every_step_also_after_a_resume(chat_file):
    run, losses = trained(chat_file, "tensorboard")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    points = {}
    for file in sorted((run.path / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            record = data[12 : 12 + length]
            assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(
                record
            )
            data = data[16 + length :]
            event = Event.FromString(record)
            for value in event.summary.value:
                points.setdefault(value.tag, {})[event.step] = value.simple_value
    assert points["train/loss"] == pytest.approx(losses)
    assert sorted(points["validation/loss"]) == [0, 2, 4]
    assert len(points) == 7


def test_trackio_keeps_every_step_in_one_run(chat_file):
    run, losses = trained(chat_file, "trackio")
    import sqlite3

    (database,) = Path("trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, step, metrics FROM metrics")
    kept = {}
    for name, step, metrics in rows:
        assert name == run_id(run)
        loss = json.loads(metrics).get("train/loss")
        kept |= {step: loss} if loss is not None else {}
    assert kept == pytest.approx(losses)


def records(data):
    """What a file of Weights & Biases holds: a leveldb log behind a header of 7 bytes."""
    parts, place = [], 7
    while place + 7 < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        # A record is whole, or ends with its last part.
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def test_wandb_keeps_every_step_offline(chat_file):
    run, losses = trained(chat_file, "wandb")
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    # As at the end of the process: its writer is another one.
    wandb.teardown()
    kept, ids = {}, set()
    for file in run.path.glob("wandb/offline-run-*/*.wandb"):
        for record in map(Record.FromString, records(file.read_bytes())):
            ids |= {record.run.run_id} - {""}
            values = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if "train/loss" in values:
                kept[record.history.step.num] = json.loads(values["train/loss"])
    assert kept == pytest.approx(losses)
    assert ids == {run_id(run)}


def test_missing_package_is_said_before_anything_starts(chat_file, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name)
    )
    flags = ["--data", str(chat_file), "--run", "r", "--steps", "2", *QUICK]
    assert train.main([*flags, "--report", "wandb"]) == 2
    assert "pip install 'dora-mlx[wandb]'" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_without_an_account_wandb_says_so_before_anything_starts(
    chat_file, capsys, monkeypatch, tmp_path
):
    wandb = pytest.importorskip("wandb")
    # What it knows of the environment is read once.
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    flags = ["--data", str(chat_file), "--run", "r", "--steps", "2", *QUICK]
    assert train.main([*flags, "--report", "wandb"]) == 2
    wandb.teardown()
    assert "WANDB_MODE=offline" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_every_writer_is_an_extra_of_the_package():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for kind, (_, package) in WRITERS.items():
        assert f'{kind} = ["{package}' in text
    with reports([], RunFolder(Path("runs/r"))) as none:
        assert none == []
