"""``python -m dora_mlx.merge``: several adapters on one base model as one merged model."""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from dora_mlx.command_line import add_adapter_flags, parser_for, run_command
from dora_mlx.errors import UserError
from dora_mlx.export import add_export_flags, default_export_path, print_export
from dora_mlx.exporting.formats import find_format
from dora_mlx.run_folder import RunFolder, find_run

if TYPE_CHECKING:
    from dora_mlx.adapters.swapping import SwappableModel
    from dora_mlx.exporting.combine import Recipe
    from dora_mlx.exporting.job import ExportProgress
    from dora_mlx.exporting.report import ExportReport

DESCRIPTION = """\
Merge several adapters on the same base model into one model, and export it.

What each adapter changes in the weights is computed exactly, in float32, and combined:

  linear   the weighted sum of the changes (task arithmetic)
  ties     of every adapter only the largest changes; where signs disagree, the side with more
           weight wins, and the mean of its changes counts (TIES)
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.merge --run pirate cook --format safetensors
  python -m dora_mlx.merge --run pirate cook --weights 0.7 0.3 --format gguf
  python -m dora_mlx.merge --run pirate cook --method ties --density 0.3 --format mlx
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and merge; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _merge(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = parser_for("merge", DESCRIPTION, EXAMPLES)
    add_adapter_flags(parser)
    parser.add_argument(
        "--method",
        choices=("linear", "ties"),
        default="linear",
        help="How the changes are combined. Default: linear.",
    )
    parser.add_argument(
        "--weights",
        metavar="X",
        nargs="+",
        type=float,
        help="What the changes of each adapter are multiplied by, in the order of the adapters; "
        "negative ones take away. Default: one divided by their number, or 1 each for ties.",
    )
    parser.add_argument(
        "--density",
        metavar="X",
        type=float,
        default=0.2,
        help="Share of each weight's changes that ties keeps. Default: 0.2.",
    )
    add_export_flags(parser)
    return parser


def _merge(arguments: argparse.Namespace) -> int:
    # What is wrong with the flags is said before anything is imported.
    find_format(arguments.format).quant(arguments.quant)
    runs = [find_run(name, arguments.runs_dir) for name in arguments.run]
    _check_given(arguments, [*(run.path for run in runs), *arguments.adapter])
    from dora_mlx.adapters.swapping import load_swappable
    from dora_mlx.exporting.combine import Recipe

    adapters = load_swappable(runs, arguments.model, arguments.adapter, arguments.checkpoint)
    count = len(adapters.names)
    equal = 1.0 if arguments.method == "ties" else 1 / count
    weights = tuple(arguments.weights or [equal] * count)
    recipe = Recipe(arguments.method, weights, arguments.density)
    return print_export(lambda progress: _write(adapters, recipe, runs, arguments, progress))


def _check_given(arguments: argparse.Namespace, folders: list[Path]) -> None:
    """Refuse adapters and numbers that cannot be meant; all problems in one message."""
    problems = []
    if not folders:
        problems.append("name the adapters to merge by --run or --adapter")
    times = Counter(folder.resolve() for folder in folders)
    problems += [f"{folder.name} is named twice" for folder, number in times.items() if number > 1]
    weights = arguments.weights
    if weights is not None and len(weights) != len(folders):
        problems.append(f"--weights has {len(weights)} numbers for {len(folders)} adapters")
    if not all(math.isfinite(weight) for weight in weights or []):
        problems.append("--weights have to be finite numbers")
    if not 0 < arguments.density <= 1:
        problems.append(f"--density must be above 0 and at most 1 but is {arguments.density:g}")
    if problems:
        raise UserError("; ".join(problems) + ".")


def _write(
    adapters: "SwappableModel",
    recipe: "Recipe",
    runs: list[RunFolder],
    arguments: argparse.Namespace,
    progress: "ExportProgress",
) -> "ExportReport":
    """Merge, write, read back and compare, as every export."""
    from dora_mlx.exporting.combine import put_combined
    from dora_mlx.exporting.job import Job, run_job
    from dora_mlx.exporting.judgement import Reference
    from dora_mlx.exporting.logits import logits_of
    from dora_mlx.exporting.merge import MergedWeights
    from dora_mlx.exporting.prompts import fallback_prompts, prompts_of_run
    from dora_mlx.exporting.writer import ExportSource
    from dora_mlx.loading import load_base

    export_format = find_format(arguments.format)
    quant = export_format.quant(arguments.quant)
    base = adapters.base
    name = "+".join(Path(one).name for one in adapters.names)
    lazy = load_base(base.path, lazy=True)
    job = Job(
        ExportSource(lazy, MergedWeights(lazy.model)),
        export_format,
        quant,
        arguments.output or default_export_path(name, export_format, quant),
        name,
        arguments.model or runs[0].read_config()["options"]["model"],
        arguments.overwrite,
        arguments.strict,
    )
    job.prepare()
    progress("checking", 0, 0)
    if runs:
        prompts = prompts_of_run(runs[0].read_config(), base.tokenizer, base.vocabulary)
    else:
        prompts = fallback_prompts(base.tokenizer, "the adapters come without their data")
    layers = [adapters.layers(one) for one in adapters.names]
    adapters.use(None)
    before, _ = logits_of(base.model, prompts.tokens)
    put_combined(base.model, layers, recipe)
    after, computed_in = logits_of(base.model, prompts.tokens)
    reference = Reference(prompts, before, after, computed_in)
    return run_job(job.with_model(base.model), reference, progress)


if __name__ == "__main__":
    sys.exit(main())
