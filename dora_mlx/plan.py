"""``python -m dora_mlx.plan``: what a training will need in memory, before anything is loaded."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dora_mlx.command_line import add_option_flags, given_options, parser_for, run_command
from dora_mlx.config import TrainConfig, flag_of

if TYPE_CHECKING:
    from dora_mlx.training.memory_figures import MemoryPlan

DESCRIPTION = """\
Say whether a training fits into this machine's memory, and what to change if it does not.

Takes the options of `dora-mlx train`. No weights are read or downloaded: of a model that is not
on this machine two small files of the Hub are enough, without a network what `dora-mlx models`
knows of it, or a folder with a copy of its config.json. With --data (and a model that is here) the
longest examples of the file count, else --max-seq-length does. GB are 10^9 bytes.
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.plan --model mistral-7b-4bit --data chat.jsonl
  python -m dora_mlx.plan --model qwen3-8b-4bit --max-seq-length 1024 --mac 16
  python -m dora_mlx.plan --model qwen3-8b-4bit --fit
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and print the plan; returns the exit code: 1 if the run does not fit."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _plan(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    command = parser_for("plan", DESCRIPTION, EXAMPLES)
    plan = command.add_argument_group("the plan")
    plan.add_argument("--json", action="store_true", help="Print the plan as JSON; sizes in bytes.")
    plan.add_argument(
        "--fit",
        action="store_true",
        help="Choose checkpointing, batch size and length so that it fits, as train --fit does.",
    )
    plan.add_argument(
        "--mac",
        metavar="GB",
        type=float,
        help="Plan for a Mac with this much memory instead of for this machine.",
    )
    add_option_flags(command)
    return command


def _plan(arguments: argparse.Namespace) -> int:
    config = TrainConfig.from_dict(given_options(arguments), where="options")
    # Everything behind this line needs MLX, whose import takes seconds: help does without.
    from dora_mlx.training.memory_plan import Machine, fit_to_memory, plan_memory

    machine = None if arguments.mac is None else Machine.mac(arguments.mac)
    chosen: dict[str, Any] = {}
    if arguments.fit:
        fitted = fit_to_memory(config, machine=machine, thorough=True)
        plan, chosen = fitted.plan, fitted.changes
    else:
        plan = plan_memory(config, machine=machine, thorough=True)
    if arguments.json:
        print(json.dumps({**asdict(plan), "chosen": chosen}, indent=2))
    else:
        print("\n".join(_lines(plan, chosen)))
    return 1 if plan.verdict == "does not fit" else 0


def _lines(plan: "MemoryPlan", chosen: dict[str, Any]) -> Iterator[str]:
    """The plan for people."""
    from dora_mlx.training.memory_plan import gigabytes

    if chosen:
        flags = (f"{flag_of(name)} {value}" for name, value in chosen.items())
        yield f"chosen to fit: {' '.join(flags).replace(' True', '')}\n"
    for part, size in plan.parts.items():
        yield f"{part:<14} {gigabytes(size):>9}"
    step = f"a step of {plan.rows} x {plan.width} tokens"
    if plan.grad_checkpoint:
        step += " with gradient checkpointing"
    yield f"{'peak':<14} {gigabytes(plan.peak):>9}   {step}"
    yield f"{'limit':<14} {gigabytes(plan.limit):>9}"
    yield f"\nverdict: {plan.verdict}"
    yield from (f"  {sentence}" for sentence in plan.advice)


if __name__ == "__main__":
    sys.exit(main())
