"""``python -m dora_mlx.compare``: DoRA, LoRA and full fine-tuning side by side on your data."""

import argparse
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_mlx.command_line import (
    INTERRUPTED,
    add_option_flags,
    given_options,
    parser_for,
    run_command,
)
from dora_mlx.comparing.settings import (
    Settings,
    parse_budget,
    parse_contenders,
    parse_learning_rates,
)
from dora_mlx.config import TrainConfig
from dora_mlx.errors import UserError
from dora_mlx.registry import samples_dir
from dora_mlx.train import absolute, absolute_if_there, staying_awake, stopping

if TYPE_CHECKING:
    from tqdm import tqdm

    from dora_mlx.comparing.comparison import Comparison

DESCRIPTION = """\
Train the same model by several methods, on the same batches from the same start, and say what each
cost and what it gave: step time, memory, validation loss, what was forgotten.

Everything is kept in one folder, with a run folder for every training. The same command goes on
with a comparison that was interrupted and does not repeat finished runs.
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.compare --budget 100steps
  python -m dora_mlx.compare --model mistral-7b-4bit --data chat.jsonl --methods dora,lora
  python -m dora_mlx.compare --data chat.jsonl --methods dora:4,lora --seeds 3 --sweep
  python -m dora_mlx.compare --data chat.jsonl --learning-rates dora=1e-3/2e-3,lora=1e-3
"""

# What a comparison decides by itself.
_NOT_OFFERED = {"method", "epochs", "steps", "learning_rate"}
_GENERAL_SAMPLE = "general.jsonl"


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and compare; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _compare(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = parser_for("compare", DESCRIPTION, EXAMPLES)
    group = parser.add_argument_group("the comparison")
    group.add_argument(
        "--methods",
        metavar="LIST",
        default="dora,lora,full",
        help="Methods with commas between them; dora:4 is DoRA of rank 4, at the same scale. Full "
        "fine-tuning is left out where it does not fit. Default: dora,lora,full.",
    )
    group.add_argument(
        "--budget",
        default="100steps",
        help="Length of every run, as 200steps or 5minutes. With minutes, the steps of a method "
        "follow from its step time, measured first. Default: 100steps.",
    )
    group.add_argument(
        "--seeds", metavar="N", type=int, default=1, help="Runs of every method. Default: 1."
    )
    group.add_argument(
        "--learning-rates",
        metavar="LIST",
        help="Peak rates as dora=1e-3,lora=2e-3; of several, as dora=1e-3/2e-3, the best by "
        "validation loss on the first seed is taken. Default: the method's own.",
    )
    group.add_argument(
        "--sweep",
        action="store_true",
        help="Try half, once and twice the rate of every method on the first seed, and take the "
        "best by validation loss.",
    )
    group.add_argument(
        "--general-data",
        metavar="FILE",
        help="Data that has nothing to do with --data: its loss before and after says what was "
        "forgotten. Default for the starter model: a sample that comes with it.",
    )
    group.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="Folder of the comparison. Default: comparisons/MODEL-DATA.",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="Replace a comparison that is there."
    )
    options = tuple(f.name for f in fields(TrainConfig) if f.name not in _NOT_OFFERED)
    add_option_flags(parser, only=options)
    return parser


def _compare(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    data = "pirate" if settings.config.data is None else Path(settings.config.data).stem
    fallback = Path("comparisons") / f"{Path(settings.config.model).name}-{data}"
    folder: Path = arguments.output or fallback
    # Everything behind this line needs MLX, whose import takes seconds: help does without.
    from dora_mlx.comparing.comparison import (
        RESULTS_FILE,
        Stopped,
        Watch,
        run_comparison,
        with_sweep,
    )

    if arguments.overwrite and (folder / RESULTS_FILE).exists():
        shutil.rmtree(folder / "runs", ignore_errors=True)
        (folder / RESULTS_FILE).unlink()
    if arguments.sweep:
        settings = with_sweep(settings)
    try:
        with staying_awake(), stopping() as stop, _Display() as display:
            watch = Watch(display.starting, display.show, lambda: stop.requested)
            comparison = run_comparison(settings, folder, watch)
    except Stopped:
        print(f"Stopped; everything is kept in {folder}. The same command goes on from there.")
        return INTERRUPTED
    _report(comparison, folder)
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    given = given_options(arguments)
    config = TrainConfig.from_dict(given, where="options")
    general = arguments.general_data
    if general is None and config.model == "starter":
        general = str(samples_dir() / _GENERAL_SAMPLE)
    given |= {
        "model": absolute_if_there(config.model),
        "data": absolute(config.data),
        "valid_data": absolute(config.valid_data),
    }
    if arguments.seeds < 1:
        raise UserError(f"--seeds must be at least 1 but is {arguments.seeds}.")
    contenders = parse_contenders(arguments.methods)
    return Settings(
        TrainConfig.from_dict(given, where="options"),
        contenders,
        arguments.seeds,
        parse_budget(arguments.budget),
        parse_learning_rates(arguments.learning_rates, contenders),
        absolute(general),
    )


def _report(comparison: "Comparison", folder: Path) -> None:
    from dora_mlx.analysis import pictures
    from dora_mlx.atomic import write_text
    from dora_mlx.comparing import report
    from dora_mlx.comparing.comparison import RESULTS_FILE

    print(report.text(comparison))
    written = [folder / RESULTS_FILE, folder / "comparison.md"]
    write_text(written[1], report.markdown(comparison))
    if pictures.can_draw():
        written.append(folder / "curves.png")
        report.draw_curves(comparison, written[-1])
    print(f"\nWrote {', '.join(map(str, written))}.")
    if not pictures.can_draw():
        print(pictures.HOW_TO_DRAW, file=sys.stderr)


class _Display:
    """A progress bar for each run, which says where the comparison stands."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._title = ""

    def __enter__(self) -> "_Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def starting(self, name: str, number: int, total: int) -> None:
        """A run begins."""
        self._title = f"{number}/{total} {name}"

    def show(self, event: dict[str, Any]) -> None:
        """An event of the run."""
        from tqdm import tqdm

        if event["event"] == "start":
            self._bar = tqdm(
                total=event["steps"],
                initial=event["resumed_from"] or 0,
                desc=self._title,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.1 if sys.stderr.isatty() else 10,
            )
        elif event["event"] == "step" and self._bar is not None:
            self._bar.set_postfix_str(f"loss {event['loss']:.3f}", refresh=False)
            self._bar.update(event["step"] - self._bar.n)
        elif event["event"] == "end" and self._bar is not None:
            self._bar.close()
            self._bar = None


if __name__ == "__main__":
    sys.exit(main())
