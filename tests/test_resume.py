"""Stop, kill, pause, resume: no work is lost and nothing changes by it."""

import json
import os
import shutil
import signal

import mlx.core as mx
import pytest
from training_runs import StopAfter, final_arrays, losses, quick, same_arrays

from dora_mlx import train
from dora_mlx.adapters.adapter_folder import trainable_arrays
from dora_mlx.adapters.trained import load_run
from dora_mlx.config import TrainConfig
from dora_mlx.errors import UserError
from dora_mlx.run_folder import RunFolder
from dora_mlx.training import finetune as story
from dora_mlx.training.checkpoints import load_newest_checkpoint
from dora_mlx.training.events import read_events
from dora_mlx.training.finetune import finetune


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(chat_file, tmp_path, stop):
    config = quick(chat_file, dropout=0.1, steps_per_save=2)
    whole, parts = RunFolder(tmp_path / "runs/whole"), RunFolder(tmp_path / "runs/parts")
    finetune(config, whole)
    assert finetune(config, parts, should_stop=StopAfter(stop)) == "stopped"
    assert len(losses(parts)) == stop
    saved = TrainConfig.from_file(parts.config_file)
    assert finetune(saved, parts, resume=True) == "completed"
    assert losses(parts) == losses(whole)
    assert same_arrays(final_arrays(parts), final_arrays(whole))
    # A complete run that is resumed again writes no second checkpoint of its last step.
    assert finetune(saved, parts, resume=True) == "completed"
    saves = [e["step"] for e in read_events(parts.path) if e["event"] == "checkpoint"]
    assert saves == sorted({stop, 2, config.steps})


def test_run_killed_between_checkpoints_repeats_its_steps(chat_file, tmp_path):
    config = quick(chat_file, steps_per_save=2)
    whole, parts = RunFolder(tmp_path / "runs/whole"), RunFolder(tmp_path / "runs/parts")
    finetune(config, whole)

    def die_at_step_3(event):
        if event["event"] == "step" and event["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config, parts, listener=die_at_step_3)
    with open(parts.path / "events.jsonl", "a") as file:
        file.write('{"event": "st')  # Power loss in the middle of a line.
    finetune(TrainConfig.from_file(parts.config_file), parts, resume=True)
    assert losses(parts) == losses(whole)
    assert same_arrays(final_arrays(parts), final_arrays(whole))
    lines = (parts.path / "events.jsonl").read_text().splitlines()
    assert all({"event", "time"} <= json.loads(line).keys() for line in lines)


def test_damaged_checkpoint_is_passed_over_with_a_word(chat_file, tmp_path):
    config = quick(chat_file)
    whole, parts = RunFolder(tmp_path / "runs/whole"), RunFolder(tmp_path / "runs/parts")
    finetune(config, whole)
    finetune(config, parts, should_stop=StopAfter(3))
    arrays = parts.checkpoints_dir / "step_00000003" / "optimizer.safetensors"
    data = bytearray(arrays.read_bytes())
    data[-5] ^= 255
    arrays.write_bytes(data)
    finetune(TrainConfig.from_file(parts.config_file), parts, resume=True)
    warnings = [e["message"] for e in read_events(parts.path) if e["event"] == "warning"]
    assert any("step_00000003 is damaged" in message for message in warnings)
    assert losses(parts) == losses(whole)


def test_a_run_without_an_intact_checkpoint_keeps_its_adapter(chat_file, run):
    finetune(quick(chat_file), run, should_stop=StopAfter(3))
    best = (run.path / "adapters.safetensors").read_bytes()
    for arrays in run.checkpoints_dir.glob("*/optimizer.safetensors"):
        arrays.write_bytes(b"")
    # The second try found no checkpoint any more, began anew and replaced the adapter.
    for _ in range(2):
        with pytest.raises(UserError, match="Every checkpoint of the run a is damaged"):
            finetune(TrainConfig.from_file(run.config_file), run, resume=True)
    assert (run.path / "adapters.safetensors").read_bytes() == best


DAMAGES = [
    lambda state: [],
    lambda state: {},
    lambda state: state | {"version": "one"},
    lambda state: state | {"sha256": "of all"},
    lambda state: state | {"progress": {"step": 3}},
    lambda state: state | {"progress": state["progress"] | {"more": 1}},
    lambda state: state | {"progress": state["progress"] | {"step": "3"}},
]


def test_damaged_state_is_no_other_version(chat_file, run, tmp_path):
    finetune(quick(chat_file, steps=2), run)
    for number, damage in enumerate(DAMAGES):
        copy = RunFolder(shutil.copytree(run.path, tmp_path / f"copy{number}"))
        file = rewrite_state(copy, damage)
        found, damaged = load_newest_checkpoint(copy.checkpoints_dir)
        assert (found.progress.step, damaged) == (1, [file.parent]), number


def rewrite_state(run, change):
    """Replace ``state.json`` of the newest checkpoint by what ``change`` makes of it."""
    file = run.adapter_dir("last") / "state.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return file


def test_checkpoint_of_another_version_is_called_so_and_stays(chat_file, run):
    finetune(quick(chat_file), run, should_stop=StopAfter(3))
    file = rewrite_state(run, lambda state: {"version": 2, "of": "another form"})
    with pytest.raises(UserError, match="step_00000003 was written by another version"):
        finetune(TrainConfig.from_file(run.config_file), run, resume=True)
    assert file.exists()


def test_changed_data_is_noticed_before_resuming(chat_file, run):
    finetune(quick(chat_file), run, should_stop=StopAfter(2))
    lines = chat_file.read_text().splitlines()
    chat_file.write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match="data of run a has changed"):
        finetune(TrainConfig.from_file(run.config_file), run, resume=True)


def test_two_processes_never_write_one_run(chat_file, run):
    finetune(quick(chat_file, steps=1), run)
    with run.lock(), pytest.raises(UserError, match="is being trained by process"):
        finetune(TrainConfig.from_file(run.config_file), run, resume=True)
    with run.lock(), pytest.raises(UserError, match="is being trained by process"):
        finetune(quick(chat_file), run, overwrite=True)
    assert run.config_file.exists()


def test_early_stop_keeps_the_best_and_counts_over_a_resume(chat_file, run):
    # Far too high a rate: the first validation is the best one.
    config = quick(chat_file, steps=40, learning_rate=1.0, steps_per_eval=1, patience=3)
    finetune(config, run, should_stop=StopAfter(2))
    assert finetune(TrainConfig.from_file(run.config_file), run, resume=True) == "early_stopped"
    events = read_events(run.path)
    validation = [e["loss"] for e in events if e["event"] == "validation" and e["step"] > 0]
    assert min(validation) not in validation[-3:]
    assert len(validation) < 40
    assert events[-1]["reason"] == "early_stopped"


def test_stop_file_ends_the_run_and_a_resume_goes_on(chat_file, run):
    def stop_at_2(event):
        if event["event"] == "step" and event["step"] == 2:
            run.stop_file.touch()

    assert finetune(quick(chat_file), run, listener=stop_at_2) == "stopped"
    assert len(losses(run)) == 2
    assert finetune(TrainConfig.from_file(run.config_file), run, resume=True) == "completed"


def test_pause_file_makes_the_run_wait(chat_file, run, monkeypatch):
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            run.pause_file.unlink()

    def pause_at_2(event):
        if event["event"] == "step" and event["step"] == 2:
            run.pause_file.touch()

    monkeypatch.setattr("dora_mlx.training.finetune.time.sleep", sleep)
    assert finetune(quick(chat_file), run, listener=pause_at_2) == "completed"
    assert len(waited) == 3
    assert len(losses(run)) == 4


def test_rest_after_every_pass_changes_no_loss(chat_file, tmp_path, monkeypatch):
    rests, runs = [], []
    monkeypatch.setattr("dora_mlx.training.loop.time.sleep", rests.append)
    for name, pause in (("steady", 0), ("resting", 20)):
        runs.append(RunFolder(tmp_path / name))
        options = {"steps": 2, "grad_accumulation_steps": 2, "pause_ms": pause}
        finetune(quick(chat_file, **options), runs[-1])
    assert rests == [0.02] * 4
    assert losses(runs[0]) == losses(runs[1])


def resumed(run, **changes):
    """Resume ``run`` as it was, but for ``changes``."""
    config = TrainConfig.from_dict(TrainConfig.from_file(run.config_file).to_dict() | changes)
    return finetune(config, run, resume=True)


def test_a_longer_run_goes_on_as_if_it_had_been_longer_from_the_start(chat_file, tmp_path):
    config = quick(chat_file, schedule="constant", warmup_steps=2, steps_per_eval=4)
    longer = TrainConfig.from_dict(config.to_dict() | {"steps": 8})
    whole, parts = RunFolder(tmp_path / "runs/whole"), RunFolder(tmp_path / "runs/parts")
    finetune(longer, whole)
    finetune(config, parts)
    assert resumed(parts, steps=8) == "completed"
    assert losses(parts) == losses(whole)
    assert same_arrays(final_arrays(parts), final_arrays(whole))
    # From now on it is a run of 8 steps, of which nothing is left.
    assert TrainConfig.from_file(parts.config_file).steps == 8
    before = len(losses(parts))
    assert resumed(parts) == "completed"
    assert len(losses(parts)) == before
    with pytest.raises(UserError, match="has done 8 steps already"):
        resumed(parts, steps=3)
    assert TrainConfig.from_file(parts.config_file).steps == 8


def test_resume_takes_what_may_change_only(chat_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    finetune(quick(chat_file), RunFolder(tmp_path / "runs/a"), should_stop=StopAfter(2))
    assert train.main(["--resume", "a", "--steps", "5", "--rank", "4", "--overwrite"]) == 2
    message = capsys.readouterr().err
    assert "takes no --rank, --overwrite" in message
    assert "--epochs" in message
    # 40 examples, of which some validate, in batches of 4: 9 steps an epoch.
    assert train.main(["--resume", "a", "--epochs", "1", "--steps-per-eval", "20"]) == 0
    assert len(losses(RunFolder(tmp_path / "runs/a"))) in (8, 9, 10)
    capsys.readouterr()
    assert train.main(["--resume", "a"]) == 0
    assert "nothing left to train" in capsys.readouterr().out


def test_changed_data_is_accepted_when_told_so(chat_file, run):
    finetune(quick(chat_file), run, should_stop=StopAfter(2))
    chat_file.write_text("\n".join(chat_file.read_text().splitlines()[1:]))
    config = TrainConfig.from_file(run.config_file)
    assert finetune(config, run, resume=True, accept_changes=True) == "completed"
    warnings = [e["message"] for e in read_events(run.path) if e["event"] == "warning"]
    assert any("data of run a has changed" in message for message in warnings)
    # It was accepted once and for all.
    assert resumed(run) == "completed"


def test_every_checkpoint_is_an_adapter_that_can_be_used(chat_file, run):
    finetune(quick(chat_file, keep_checkpoints=3), run)
    for checkpoint in ("last", "4", "2"):
        arrays = mx.load(str(run.adapter_dir(checkpoint) / "adapters.safetensors"))
        model = load_run(run, checkpoint).base.model
        assert same_arrays(trainable_arrays(model), arrays)
    with pytest.raises(UserError, match="There are last, 4, 3, 2"):
        load_run(run, "1")


def test_a_stop_file_of_earlier_does_not_stop_a_resumed_run(chat_file, run):
    finetune(quick(chat_file), run, should_stop=StopAfter(2))
    run.stop_file.touch()
    assert resumed(run) == "completed"


def test_signals_pause_and_go_on_and_a_paused_run_is_saved(chat_file, run, monkeypatch):
    def sleep(_):
        assert run.adapter_dir("last").name == "step_00000002"
        os.kill(os.getpid(), signal.SIGUSR2)

    def pause_at_2(event):
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("dora_mlx.training.finetune.time.sleep", sleep)
    with train.pausing(run):
        config = quick(chat_file, steps_per_save=100)
        assert finetune(config, run, listener=pause_at_2) == "completed"
    assert len(losses(run)) == 4
    warnings = [e["message"] for e in read_events(run.path) if e["event"] == "warning"]
    assert sum("paused until" in message for message in warnings) == 1


@pytest.mark.parametrize("saved", [False, True])
def test_a_full_disk_says_what_is_kept_and_how_to_go_on(tmp_path, saved):
    folder = RunFolder(tmp_path / "elsewhere" / "r")
    folder.checkpoints_dir.mkdir(parents=True)
    if saved:
        (folder.checkpoints_dir / "step_00000001").mkdir()
    with pytest.raises(UserError) as caught, story._saying_how_to_go_on(folder):
        raise OSError(28, "No space left on device", str(folder.path / "x"))
    message = str(caught.value)
    assert f"--resume r --runs-dir {tmp_path / 'elsewhere'}" in message
    assert ("last checkpoint is kept" in message) == saved
    assert ("no step was saved yet" in message) != saved
