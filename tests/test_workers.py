"""Two processes on this machine train one run together, as one process would alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from training_runs import final_arrays, losses, quick

from dora_mlx.run_folder import RunFolder
from dora_mlx.training.events import read_events
from dora_mlx.training.finetune import finetune

ROOT = Path(__file__).parent.parent
FLAGS = {
    "batch-size": 2,
    "num-layers": 2,
    "learning-rate": 1e-3,
    "schedule": "constant",
    "warmup-steps": 1,
    "dropout": 0.1,
    "steps-per-eval": 2,
    "steps-per-save": 3,
}


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def free_ports():
    """Two ports next to each other that nobody listens to."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def train_command(*flags):
    return ["-m", "dora_mlx.train", "--runs-dir", "runs", *flags]


def new_run_flags(chat_file, steps):
    options = [part for name, value in FLAGS.items() for part in (f"--{name}", str(value))]
    return ["--data", str(chat_file), "--run", "r", "--steps", str(steps), *options]


def launch(folder, *flags):
    """Train under MLX's launcher, in ``folder``."""
    launcher = Path(sys.executable).parent / "mlx.launch"
    command = [sys.executable, launcher, "-n", "2", "--starting-port", str(free_ports())]
    command += ["--python", sys.executable, *train_command(*flags)]
    return subprocess.run(
        # Its own input has to stay open: the launcher reads it all the time.
        command, cwd=folder, env=environment(), stdin=subprocess.PIPE, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def start_apart(folders, *flags, command=None):
    """What the launcher does, with a folder of its own for every worker, as on two machines."""
    port = free_ports()
    hosts = folders[0] / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(2)]))
    return [
        subprocess.Popen(
            [sys.executable, *(command or train_command(*flags))],
            cwd=folder, env=environment(MLX_HOSTFILE=str(hosts), MLX_RANK=str(rank)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip


def test_two_workers_equal_one_with_the_same_global_batch_also_after_a_resume(chat_file, tmp_path):
    options = {name.replace("-", "_"): value for name, value in FLAGS.items()}
    alone = RunFolder(tmp_path / "alone")
    finetune(quick(chat_file, **options, steps=6, grad_accumulation_steps=2), alone)

    together = tmp_path / "first"
    together.mkdir()
    result = launch(together, *new_run_flags(chat_file, steps=4))
    assert result.returncode == 0, result.stdout + result.stderr
    run = RunFolder(together / "runs" / "r")
    assert len(losses(run)) == 4
    # The second worker neither writes nor speaks.
    assert result.stdout.count("The adapter is in") == 1

    # It has no run folder either, on a machine of its own.
    elsewhere = tmp_path / "second"
    elsewhere.mkdir()
    processes = start_apart([together, elsewhere], "--resume", "r", "--steps", "6")
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not list(elsewhere.iterdir())

    assert losses(run) == pytest.approx(losses(alone), rel=2e-5)
    validation = [
        [e["loss"] for e in read_events(folder.path) if e["event"] == "validation"]
        for folder in (run, alone)
    ]
    assert validation[0] == pytest.approx(validation[1], rel=2e-5)
    tokens = [read_events(folder.path)[-2].get("tokens") for folder in (run, alone)]
    assert tokens[0] == tokens[1]
    ours, expected = final_arrays(run), final_arrays(alone)
    for name, array in expected.items():
        if not name.startswith("optimizer."):
            # Adam turns rounding of gradients near zero into whole steps of 1e-3 now and then.
            assert mx.abs(array - ours[name]).mean().item() < 3e-5, name


TOGETHER = """
import dora_mlx, mlx.core as mx
from dora_mlx.errors import UserError
from dora_mlx.training.workers import Workers
workers = Workers()
rank = workers.rank
assert workers.sum(1.5, 2**53 - 1 if rank == 0 else 0) == [3.0, 2.0**53 - 1]
assert workers.any(rank == 1, False) == [True, False]
assert workers.share({"a": [rank, None]}) == {"a": [0, None]}
arrays = {"x": mx.array([0.1, 1e-30]) * (rank + 1), "n": [mx.array(2**40 + rank, mx.uint64)]}
shared = workers.share_arrays(arrays)
assert mx.array_equal(shared["x"], mx.array([0.1, 1e-30])) and shared["n"][0].item() == 2**40
workers.check_same("same", "model")
try:
    workers.check_same(str(rank), "data")
except UserError as error:
    print(error)
"""


def test_what_workers_tell_each_other_and_that_they_need_the_same_data(tmp_path):
    outputs = [p.communicate() for p in start_apart([tmp_path, tmp_path], command=["-c", TOGETHER])]
    for output, errors in outputs:
        assert "Worker 1 has another data than worker 0" in output, errors


def test_stop_file_of_the_leader_stops_all(chat_file, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    run = RunFolder(folders[0] / "runs" / "r")
    processes = start_apart(folders, *new_run_flags(chat_file, steps=2000))
    wait_for_step(run, processes)
    run.stop_file.touch()
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [130, 130], outputs
    assert read_events(run.path)[-1]["reason"] == "stopped"


UNTIL_LOST = """
import dora_mlx
from dora_mlx.errors import UserError
from dora_mlx.training.workers import Workers
workers = Workers()
workers.sum(1)
print("together", flush=True)
try:
    while True:
        workers.sum(1)
except UserError as error:
    print(error)
"""


def test_a_lost_worker_is_explained(tmp_path):
    leader, other = start_apart([tmp_path, tmp_path], command=["-c", UNTIL_LOST])
    assert other.stdout.readline() == "together\n"
    other.kill()
    other.communicate()
    output, errors = leader.communicate()
    assert "connection to another worker was lost" in output, errors


def wait_for_step(run, processes):
    while not any(e["event"] == "step" for e in read_events(run.path)):
        for process in processes:
            assert process.poll() is None, process.communicate()
