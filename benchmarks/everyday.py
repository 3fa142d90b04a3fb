"""How long the commands of every day take to answer.

    python -m benchmarks.everyday [--json FILE] [--only help,check,train,app] [--repetitions N]

Each is started as a person starts it, in a process of its own: help and ``check`` until they end,
``train`` until its first step is written down, the app until it says its address. Processor time
is that of the process up to there; the time that passes depends on what else the machine does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import environment
from dora_mlx.__main__ import VERBS

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "models" / "samples" / "pirate.jsonl"
POLL_S = 0.002


@dataclass(frozen=True)
class Command:
    """A module with its arguments, run in an empty folder.

    Its answer is there when ``answer`` is in ``file``, or else when it ends.
    """

    arguments: list[str]
    answer: str | None = None
    file: str = "output"


@dataclass(frozen=True)
class Taken:
    """Medians in seconds: of the processor, and on the clock."""

    cpu_s: float
    wall_s: float


GROUPS = {
    "help": {
        f"{module} --help": Command([module, "--help"])
        for module in [*(f"dora_mlx.{verb}" for verb in VERBS), "app"]
    },
    "check": {"check of the sample": Command(["dora_mlx.check", str(SAMPLE)])},
    "train": {
        "train, to the first step": Command(
            ["dora_mlx.train", "--run", "run"], '{"event": "step"', "runs/run/events.jsonl"
        )
    },
    "app": {"app, to its address": Command(["app", "--no-browser"], "http://")},
}


def main() -> None:
    """Measure, print the table and write the numbers if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="Write the measurements to this file.")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"Default: {','.join(GROUPS)}.")
    parser.add_argument("--repetitions", type=int, default=5, help="Runs of each. Default: 5.")
    arguments = parser.parse_args()
    commands = {
        name: command
        for group in arguments.only.split(",")
        for name, command in GROUPS[group].items()
    }
    for command in commands.values():
        run(command)  # files are read from the disk only now, and compiled
    runs = [
        {name: run(command) for name, command in commands.items()}
        for _ in range(arguments.repetitions)
    ]
    results = {
        name: Taken(
            statistics.median(taken[name].cpu_s for taken in runs),
            statistics.median(taken[name].wall_s for taken in runs),
        )
        for name in commands
    }
    about = environment()
    print(about)
    print("\n| command | processor | on the clock |\n|---|---|---|")
    for name, taken in results.items():
        print(f"| {name} | {taken.cpu_s:.2f} s | {taken.wall_s:.2f} s |")
    if arguments.json:
        saved = {name: asdict(taken) for name, taken in results.items()}
        arguments.json.write_text(json.dumps({"environment": about, "results": saved}, indent=2))


def run(command: Command) -> Taken:
    """Run a command once until its answer is there.

    Raises:
        SystemExit: If it ends otherwise.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "output", "w") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", *command.arguments],
                cwd=folder,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
        while not (ended or _answered(command, folder)):
            time.sleep(POLL_S)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        passed = time.perf_counter() - began
        if not ended:
            process.kill()
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if ended and (command.answer or process.returncode):
            raise SystemExit(f"{command} failed:\n{(folder / 'output').read_text()}")
    return Taken(used.ru_utime + used.ru_stime, passed)


def _answered(command: Command, folder: Path) -> bool:
    file = folder / command.file
    return command.answer is not None and file.exists() and command.answer in file.read_text()


if __name__ == "__main__":
    main()
