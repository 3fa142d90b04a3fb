"""Kill a training at random moments, resume it each time, and compare with an undisturbed one.

    python -m benchmarks.soak [--kills N] [--seed N] [--folder DIR]

Ends with code 0 if both runs have the same losses and the same last checkpoint, bit for bit.
"""

import argparse
import filecmp
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dora_mlx.run_folder import RunFolder
from dora_mlx.training.events import EVENTS_FILE, Event, read_events

# At most so many events pass before a kill; the run must not end before the last one.
MOST_EVENTS = 8
STEPS_PER_KILL = 6
# Dropout, accumulation, validation and checkpoints at steps that do not coincide.
# fmt: off
OPTIONS = [
    "--num-layers", "2", "--batch-size", "2", "--grad-accumulation-steps", "2",
    "--dropout", "0.1", "--weight-decay", "0.1", "--learning-rate", "1e-3",
    "--steps-per-save", "3", "--steps-per-eval", "7",
]
# fmt: on


def main() -> int:
    """Run both trainings and print what they came to; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="How often to kill. Default: 20.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the moments. Default: 0.")
    parser.add_argument("--folder", type=Path, help="Keep the runs here. Default: nowhere.")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        return soak(arguments.folder, arguments.kills, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        return soak(Path(folder), arguments.kills, arguments.seed)


def soak(runs_dir: Path, kills: int, seed: int) -> int:
    """Train twice in ``runs_dir``, once with ``kills`` kills; 0 if both came to the same."""
    options = ["--steps", str(STEPS_PER_KILL * kills), *OPTIONS]
    quiet, killed = RunFolder(runs_dir / "quiet"), RunFolder(runs_dir / "killed")
    _finish(_train(quiet, options))
    moments = random.Random(seed)
    for number in range(kills):
        process = _train(killed, options)
        _wait(process, killed, moments)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the run ended before kill {number + 1}")
        half_written = list(killed.path.rglob(".*partial*"))
        print(
            f"kill {number + 1}: {_last_step(killed)} steps done"
            + (", in the middle of writing a file" if half_written else ""),
            flush=True,
        )
    _finish(_train(killed, options))
    differences = _differences(quiet, killed)
    print("\n".join(differences) or f"{kills} kills changed nothing, bit for bit.")
    return 1 if differences else 0


def _train(run: RunFolder, options: list[str]) -> "subprocess.Popen[str]":
    known = run.config_file.exists()
    # A run that was killed before it had its configuration is begun again.
    flags = ["--resume", run.name] if known else ["--run", run.name, "--overwrite", *options]
    return subprocess.Popen(
        [sys.executable, "-m", "dora_mlx.train", "--runs-dir", str(run.path.parent), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def _wait(process: "subprocess.Popen[str]", run: RunFolder, moments: random.Random) -> None:
    """Wait for a random moment: in the start, or after some events and a part of a step."""
    events = moments.randint(0, MOST_EVENTS)
    began = time.monotonic()
    before = _lines(run)
    while process.poll() is None and _lines(run) < before + events:
        time.sleep(0.01)
    # With no event to wait for it is somewhere in the start.
    step = (time.monotonic() - began) / events if events else 3.0
    time.sleep(moments.uniform(0, min(step, 3.0)))


def _lines(run: RunFolder) -> int:
    file = run.path / EVENTS_FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _finish(process: "subprocess.Popen[str]") -> None:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the training failed:\n{output}")


def _last_step(run: RunFolder) -> int:
    return max((event["step"] for event in _events(run, "step")), default=0)


def _events(run: RunFolder, kind: str) -> list[Event]:
    return [event for event in read_events(run.path) if event["event"] == kind]


def _differences(one: RunFolder, other: RunFolder) -> list[str]:
    found = []
    for kind in ("step", "validation"):
        losses = [[(e["step"], e["loss"]) for e in _events(run, kind)] for run in (one, other)]
        if losses[0] != losses[1]:
            found.append(f"the losses of {kind} events differ: {losses}")
    files = [
        [path.relative_to(run.path) for path in sorted(run.path.rglob("*.safetensors"))]
        for run in (one, other)
    ]
    if files[0] != files[1]:
        found.append(f"the files differ: {files}")
    found += [
        f"{file} differs"
        for file in files[0]
        if not filecmp.cmp(one.path / file, other.path / file, shallow=False)
    ]
    return found


if __name__ == "__main__":
    sys.exit(main())
