"""The command ``python -m dora_mlx.inspect``: a table, pictures and JSON of what a run changed."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_mlx.atomic import write_text
from dora_mlx.command_line import add_runs_dir_flag, parser_for, run_command
from dora_mlx.run_folder import find_run

if TYPE_CHECKING:
    from dora_mlx.analysis.findings import Inspection, WeightChange
    from dora_mlx.analysis.inspection import Progress

DESCRIPTION = """\
Show how far every trained weight moved from the base model, in magnitude and in direction: the
analysis of the DoRA paper (arXiv 2402.09353, section 3.2).

  dM    mean over rows of the change of their length, in the units of the weight
  dD    mean over rows of 1 - cosine of the angle that they turned by, from 0 to 2
  rank  effective rank of what was added: exp of the entropy of its singular values

It looks at the best adapter and at every checkpoint that is kept, and writes a table, a heat map
and a scatter as PNG (extra `plots`), and JSON. A checkpoint is kept per --steps-per-save; train
with --keep-checkpoints 10 to see how the weights moved.
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.inspect --run demo
  python -m dora_mlx.inspect --run demo --checkpoint 100 --output demo-100
"""

_ROWS_SHOWN = 5


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and inspect; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _inspect(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = parser_for("inspect", DESCRIPTION, EXAMPLES)
    parser.add_argument("--run", metavar="NAME", required=True, help="The run to look at.")
    add_runs_dir_flag(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        type=int,
        help="Look at the checkpoint of this step only. Default: the best adapter and all of them.",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="Folder for inspection.json and the pictures. Default: RUN/inspection.",
    )
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    folder = find_run(arguments.run, arguments.runs_dir)
    # Everything behind this line needs MLX, whose import takes seconds: help does without.
    from dora_mlx.analysis import pictures
    from dora_mlx.analysis.inspection import inspect_run

    with _progress_bar() as progress:
        inspection = inspect_run(folder, arguments.checkpoint, progress)
    print("\n".join(_table(inspection)))
    output: Path = arguments.output or folder.path / "inspection"
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "inspection.json"]
    write_text(written[0], json.dumps(inspection.to_dict(), indent=1) + "\n")
    if pictures.can_draw():
        written += [output / "heat_map.png", output / "scatter.png"]
        pictures.draw_heat_map(inspection, written[1])
        pictures.draw_scatter(inspection, written[2])
    print(f"\nWrote {', '.join(map(str, written))}.")
    if not pictures.can_draw():
        print(pictures.HOW_TO_DRAW, file=sys.stderr)
    return 0


def _table(inspection: "Inspection") -> Iterator[str]:
    """Lines about every weight, the rows that changed most, and the correlation."""
    weights = inspection.weights
    width = max(20, *(len(weight.module) for weight in weights))
    yield f"block  {'module':<{width}}  {'dM':>9}  {'of length':>9}  {'dD':>9}  {'rank':>6}"
    for weight in weights:
        block = "-" if weight.block is None else weight.block
        share = weight.magnitude_change / weight.magnitude if weight.magnitude else 0
        yield (
            f"{block:>5}  {weight.module:<{width}}  {weight.magnitude_change:9.2e}  "
            f"{share:9.2%}  {weight.direction_change:9.2e}  {weight.effective_rank:6.1f}"
        )
    yield "\nRows that changed most:"
    yield from _largest_rows(weights)
    yield "\nCorrelation of dM and dD over the weights:"
    for state in inspection.states:
        name = "at the end" if state.step is None else f"at step {state.step}"
        yield f"  {name + (' (best)' if state.best else ''):<{width}}  {_signed(state.correlation)}"
    if len(inspection.states) > 1:
        yield f"  {'over all these steps':<{width}}  {_signed(inspection.correlation)}"
        for module, value in inspection.correlation_by_module.items():
            yield f"    {module:<{width - 2}}  {_signed(value)}"


def _largest_rows(weights: "tuple[WeightChange, ...]") -> Iterator[str]:
    rows = [(row, weight.name) for weight in weights for row in weight.largest_rows]
    rows.sort(key=lambda pair: -pair[0].change)
    for row, name in rows[:_ROWS_SHOWN]:
        yield (
            f"  {name} row {row.row}: moved by {row.change:.1%} of its length, "
            f"length {row.magnitude_before:.4g} -> {row.magnitude_after:.4g}, "
            f"dD {row.direction_change:.2e}"
        )


def _signed(value: float | None) -> str:
    return (
        "not defined (too few points, or one does not vary)" if value is None else f"{value:+.2f}"
    )


@contextmanager
def _progress_bar() -> "Iterator[Progress]":
    from tqdm import tqdm

    bar: tqdm[Any]
    with tqdm(unit="weight", desc="Measuring", leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
