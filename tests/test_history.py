"""The list of runs from their folders, and renaming and deleting them."""

import fcntl
import json
import os

import pytest

from dora_mlx import EventReader, RunFolder, UserError, delete_run, list_runs, rename_run


def make_run(runs_dir, name="one", events=(), steps=10):
    folder = RunFolder(runs_dir / name)
    folder.path.mkdir(parents=True)
    options = {"model": "starter", "method": "dora", "steps": steps}
    folder.write_config({"options": options})
    lines = [json.dumps({"event": kind, "time": 1.0, **values}) for kind, values in events]
    (folder.path / "events.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def steps(first, last):
    return [("step", {"step": n, "loss": 10.0 - n}) for n in range(first, last + 1)]


def only(runs_dir):
    (run,) = list_runs(runs_dir)
    return run


def test_summary_of_a_finished_run(tmp_path):
    make_run(
        tmp_path,
        events=[
            ("start", {"resumed_from": None}),
            # The base model's loss, which is no candidate for the best adapter.
            ("validation", {"step": 0, "loss": 1.0}),
            *steps(1, 5),
            ("validation", {"step": 5, "loss": 4.0}),
            *steps(6, 10),
            ("validation", {"step": 10, "loss": 6.0}),
            ("end", {"step": 10, "reason": "completed"}),
        ],
    )
    run = only(tmp_path)
    # The mean of the last ten steps, whatever lies between them.
    assert (run.step, run.loss, run.best_validation) == (10, 4.5, 4.0)
    assert run.status == "completed"
    assert not run.can_resume


def test_resume_undoes_what_came_after_its_checkpoint(tmp_path):
    validation = ("validation", {"step": 8, "loss": 1.0})
    before = [("start", {"resumed_from": None}), *steps(1, 8), validation]
    make_run(tmp_path, events=[*before, ("start", {"resumed_from": 5}), *steps(6, 7)])
    run = only(tmp_path)
    assert (run.step, run.loss, run.best_validation) == (7, 6.0, None)
    # Its process is gone without an end.
    assert run.status == "ended"
    assert run.can_resume


def test_run_without_steps_and_folders_that_are_no_runs(tmp_path):
    make_run(tmp_path, "new")
    make_run(tmp_path, ".new.replaced")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    run = only(tmp_path)
    assert (run.name, run.step, run.loss, run.status) == ("new", 0, None, "ended")
    assert list_runs(tmp_path / "none") == []


def test_lock_tells_a_run_that_is_trained(tmp_path):
    folder = make_run(tmp_path)
    with folder.lock():
        assert only(tmp_path).status == "training"
        folder.pause_file.touch()
        assert only(tmp_path).status == "paused"
        with pytest.raises(UserError, match="is being trained"):
            delete_run("one", tmp_path)
        with pytest.raises(UserError, match="is being trained"):
            rename_run("one", "two", tmp_path)
    assert only(tmp_path).status == "ended"


def test_number_of_a_process_that_is_another_by_now_is_no_training(tmp_path):
    folder = make_run(tmp_path)
    (folder.path / "lock").write_text(str(os.getpid()))
    assert folder.holder() is None
    # Asking did not leave the lock taken.
    with open(folder.path / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_rename_and_delete(tmp_path):
    make_run(tmp_path, "one")
    make_run(tmp_path, "two")
    for name in ("../three", "", ".three", "a" * 101, "a/b"):
        with pytest.raises(UserError, match="cannot be a run's name"):
            rename_run("one", name, tmp_path)
    with pytest.raises(UserError, match="There is a run two already"):
        rename_run("one", "two", tmp_path)
    rename_run("one", "three", tmp_path)
    for name in ("one", "../runs", ".."):
        with pytest.raises(UserError, match="There is no run"):
            delete_run(name, tmp_path)
    delete_run("two", tmp_path)
    assert [run.name for run in list_runs(tmp_path)] == ["three"]
    assert [path.name for path in tmp_path.iterdir()] == ["three"]


def test_reader_reads_on_and_leaves_half_a_line(tmp_path):
    folder = make_run(tmp_path, events=[("start", {"resumed_from": None})])
    reader = EventReader(folder.path)
    assert reader.update()
    assert not reader.update()
    with open(folder.path / "events.jsonl", "a") as file:
        file.write('{"event": "step", "st')
        file.flush()
        assert not reader.update()
        file.write('ep": 1}\nnot json\n[]\n')
    assert reader.update()
    assert [event["event"] for event in reader.events] == ["start", "step"]
    # Another run in its place.
    delete_run("one", tmp_path)
    assert reader.update()
    assert reader.events == []
    make_run(tmp_path, events=[*steps(1, 3)])
    assert reader.update()
    assert len(reader.events) == 3


def test_hundred_long_runs_are_listed_again_without_reading_them_again(tmp_path, monkeypatch):
    for number in range(100):
        make_run(tmp_path, f"run-{number}", steps(1, 50), steps=50)
    assert len(list_runs(tmp_path)) == 100
    reads = []
    from dora_mlx.training import history

    monkeypatch.setattr(history, "_milestones", lambda path: reads.append(path) or iter(()))
    with open(tmp_path / "run-7" / "events.jsonl", "a") as file:
        file.write("\n")
    list_runs(tmp_path)
    assert [path.parent.name for path in reads] == ["run-7"]
