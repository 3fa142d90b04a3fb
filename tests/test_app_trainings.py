"""Trainings as processes: one at a time, found again, stopped and resumed, whatever dies."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import app
from app.run_watch import RunWatch
from app.trainings import Trainings
from dora_mlx import TrainConfig, UserError, read_events

SHORT = TrainConfig(steps=3, steps_per_eval=3, steps_per_save=1, num_layers=1, warmup_steps=0)
ENDLESS = TrainConfig(steps=100_000, steps_per_save=2, num_layers=1)
PATIENCE_S = 120


def wait_for(condition):
    """Until something is true; only a machine that hangs lets the time run out."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# Ends what is being trained when its input ends, which it does however this process dies.
GUARD = """
import os, signal, sys
from pathlib import Path
from dora_mlx import lock_holder
sys.stdin.read()
process = lock_holder(Path(sys.argv[1]))
if process is not None:
    os.kill(process, signal.SIGKILL)
"""


@pytest.fixture
def trainings(tmp_path):
    """Trainings that end with the test, also with one that is cut off: they outlive a parent."""
    runs_dir = tmp_path / "runs"
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, runs_dir / ".app" / "training.lock"],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(app.__file__).parent.parent)},
    )
    yield Trainings(runs_dir)
    guard.communicate()
    assert guard.returncode == 0


def start_at_once(place, barrier, results):
    barrier.wait()
    try:
        Trainings(place).start(ENDLESS, f"run-{os.getpid()}")
        results.put("started")
    except UserError as error:
        results.put(str(error))


def test_of_six_that_start_at_once_one_does(trainings):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(6), context.Queue()
    arguments = (trainings.runs_dir, barrier, results)
    users = [context.Process(target=start_at_once, args=arguments) for _ in range(6)]
    for user in users:
        user.start()
    said = sorted(results.get(timeout=PATIENCE_S) for _ in users)
    for user in users:
        user.join()
    assert said[-1] == "started"
    assert all("one training at a time" in text for text in said[:-1])
    wait_for(lambda: trainings.status().started)
    assert len([path for path in trainings.runs_dir.iterdir() if path.name != ".app"]) == 1
    # Another server, or this one after a restart, finds it and refuses a second one.
    found = Trainings(trainings.runs_dir)
    assert found.status().alive
    with pytest.raises(UserError, match="is being trained"):
        found.start(SHORT, "other")


def test_killed_training_is_seen_as_such_and_resumed_where_it_was(trainings):
    trainings.start(ENDLESS, "one")
    watch = RunWatch(trainings)
    folder = trainings.runs_dir / "one"
    assert watch.look("one").is_preparing

    def saved():
        return [event for event in read_events(folder) if event["event"] == "checkpoint"]

    wait_for(saved)
    os.kill(int((folder / "lock").read_text()), signal.SIGKILL)
    wait_for(lambda: not trainings.status().alive)
    assert watch.look("one").summary.status == "ended"
    kept = saved()[-1]["step"]
    trainings.resume("one")
    wait_for(lambda: watch.look("one").summary.status == "training")
    trainings.stop("one")
    wait_for(lambda: not trainings.status().alive)
    look = watch.look("one")
    assert look.summary.status == "stopped"
    assert look.summary.step >= kept
    (begin,) = [e for e in look.events if e["event"] == "start" and e["resumed_from"] is not None]
    assert begin["resumed_from"] >= kept


def test_training_that_cannot_start_says_why_and_leaves_nothing(trainings, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n')
    trainings.start(TrainConfig(data=str(bad)), "one")
    wait_for(lambda: not trainings.status().alive)
    look = RunWatch(trainings).look("one")
    assert look.summary is None
    assert "line 1" in look.activity.error
    assert "Traceback" not in trainings.log()
    assert not (trainings.runs_dir / "one").exists()
    # A run that was renamed or deleted leaves a record like this one.
    trainings.forget("another")
    assert trainings.status().run == "one"
    trainings.forget("one")
    assert trainings.status() is None


def test_training_that_is_prepared_can_be_cancelled(trainings):
    trainings.start(ENDLESS, "one")
    trainings.cancel()
    wait_for(lambda: not trainings.status().alive)
    assert not (trainings.runs_dir / "one").exists()


def test_names_that_are_taken_or_gone(trainings):
    (trainings.runs_dir / "taken").mkdir(parents=True)
    with pytest.raises(UserError, match="There is a run taken already"):
        trainings.start(SHORT, "taken")
    for call in (trainings.resume, trainings.stop, trainings.pause, trainings.unpause):
        with pytest.raises(UserError, match="There is no run"):
            call("../taken")
    assert trainings.status() is None
