"""``python -m dora_mlx.train``: fine-tune a model on a chat file."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from dora_mlx.command_line import (
    INTERRUPTED,
    add_option_flags,
    add_runs_dir_flag,
    given_options,
    parser_for,
    run_command,
)
from dora_mlx.config import TrainConfig, flag_of, read_options
from dora_mlx.errors import UserError
from dora_mlx.run_folder import DEFAULT_RUNS_DIR, RunFolder, find_run, new_run

if TYPE_CHECKING:
    from tqdm import tqdm

DESCRIPTION = """\
Fine-tune a language model on your own chat file with DoRA.

Without arguments it trains the embedded starter model on the sample data: about a minute.
Steps are optimizer updates, lengths are tokens, memory is in GB (10^9 bytes).
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.train
  python -m dora_mlx.train --model mistral-7b-4bit --data chat.jsonl
  python -m dora_mlx.train --model qwen3-4b-4bit --data chat.jsonl --rank 16 --steps 400
  python -m dora_mlx.train --resume RUN

A line of a chat file: {"messages": [{"role": "user", "content": "Hi"},
                                     {"role": "assistant", "content": "Hello!"}]}
Ctrl-C stops after the current step and keeps everything; --resume goes on from there.
"""


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and train; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _train(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = parser_for("train", DESCRIPTION, EXAMPLES)
    run = parser.add_argument_group("the run")
    run.add_argument("--run", metavar="NAME", help="Name of the run. Default: from model and data.")
    add_runs_dir_flag(run)
    run.add_argument("--resume", metavar="NAME", help="Go on with a run that was stopped.")
    run.add_argument(
        "--overwrite", action="store_true", help="Replace the run if there is one of that name."
    )
    run.add_argument(
        "--fit",
        action="store_true",
        help="Choose batch size (the global batch stays), checkpointing and, last, length so that "
        "the run fits into memory.",
    )
    run.add_argument(
        "--ignore-memory",
        action="store_true",
        help="Start although the run is planned to need more memory than there is.",
    )
    run.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="Read the options of a saved run (runs/NAME/config.json); flags overrule them.",
    )
    add_option_flags(parser)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    config, folder = _what_to_train(arguments)
    # Everything behind this line needs MLX, whose import takes seconds: help does without.
    from dora_mlx.training.finetune import finetune

    elsewhere = arguments.runs_dir != Path(DEFAULT_RUNS_DIR)
    where = f" --runs-dir {arguments.runs_dir}" if elsewhere else ""
    try:
        with staying_awake(), stopping() as stop, Display(folder) as display:
            reason = finetune(
                config,
                folder,
                resume=arguments.resume is not None,
                overwrite=arguments.overwrite,
                fit=arguments.fit,
                ignore_memory=arguments.ignore_memory,
                listener=display.show,
                should_stop=lambda: stop.requested,
            )
    except (OSError, KeyboardInterrupt):
        if folder.config_file.exists():
            kept = any(folder.checkpoints_dir.glob("step_*"))
            what = "The last checkpoint is kept" if kept else "No step was saved yet"
            print(
                f"{what}; go on with `python -m dora_mlx.train --resume {folder.name}{where}`.",
                file=sys.stderr,
            )
        raise
    if reason == "stopped":
        print(
            f"Stopped; everything is kept. Go on with:\n"
            f"  python -m dora_mlx.train --resume {folder.name}{where}"
        )
        return INTERRUPTED
    print(
        f"\nThe adapter is in {folder.path}. Try next:\n"
        f"  python -m dora_mlx.chat --run {folder.name}{where}\n"
        f'  python -m dora_mlx.chat --run {folder.name}{where} --compare --prompt "Hello!"\n'
        f"  python -m dora_mlx.export --run {folder.name}{where} --format gguf"
    )
    return 0


def _what_to_train(arguments: argparse.Namespace) -> tuple[TrainConfig, RunFolder]:
    """Options and folder from flags, a saved configuration or the run to resume."""
    given = given_options(arguments)
    if arguments.resume is not None:
        others = ("run", "config", "overwrite", "fit", "ignore_memory")
        if given or any(getattr(arguments, name) for name in others):
            raise UserError(
                "--resume goes on with a run as it began, so it takes no other option than "
                "--runs-dir."
            )
        folder = find_run(arguments.resume, arguments.runs_dir)
        return TrainConfig.from_file(folder.config_file), folder
    saved = {} if arguments.config is None else read_options(arguments.config)
    config = TrainConfig.from_dict(saved | given, where=str(arguments.config or "options"))
    config = replace(
        config,
        model=absolute_if_there(config.model),
        data=absolute(config.data),
        valid_data=absolute(config.valid_data),
        init_adapter=absolute(config.init_adapter),
    )
    data = "pirate" if config.data is None else Path(config.data).stem
    fallback = f"{Path(config.model).name}-{data}"
    return config, new_run(arguments.run, arguments.runs_dir, fallback)


def absolute(path: str | None) -> str | None:
    """A path that still holds when the run is resumed from another folder."""
    if path is None or path.startswith("hub:"):
        return path
    return str(Path(path).expanduser().absolute())


def absolute_if_there(model: str) -> str:
    """As ``absolute`` for a folder; an alias or a Hub name stays as it is."""
    return str(absolute(model)) if Path(model).expanduser().is_dir() else model


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the second one interrupts at once."""

    requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nStopping after this step (again to stop at once) ...", file=sys.stderr)


@contextmanager
def stopping() -> Iterator[StopRequest]:
    """Within the block, Ctrl-C and SIGTERM make a request that a training looks at."""
    stop = StopRequest()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def staying_awake() -> Iterator[None]:
    """Keep a Mac from falling asleep as long as this process trains."""
    if sys.platform != "darwin":
        yield
        return
    # -w ends it with this process, also after a kill.
    caffeinate = subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())])
    try:
        yield
    finally:
        caffeinate.terminate()


class Display:
    """Reader of a run's events: a progress bar, and a line for what deserves one.

    The lines also go to the run's ``log.txt``.
    """

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._bar: tqdm[Any] | None = None
        self._log: TextIO | None = None
        self._loss: float | None = None
        self._validation: list[float] = []
        self._last_step: dict[str, Any] | None = None
        self._tokens, self._seconds = 0, 0.0

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "start":
            self._start(event)
        elif kind == "step":
            self._step(event)
        elif kind == "validation":
            self._validation.append(event["loss"])
        line = self._summary(event) if kind == "end" else describe(event)
        if line and self._bar is not None and self._log is not None:
            self._bar.write(line)
            self._log.write(line + "\n")
            self._log.flush()

    def _start(self, event: dict[str, Any]) -> None:
        from tqdm import tqdm

        self._log = open(self._folder.log_file, "a", encoding="utf-8")  # noqa: SIM115
        self._bar = tqdm(
            total=event["steps"],
            initial=event["resumed_from"] or 0,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            # A file or a pipe gets a line now and then instead of a picture that moves.
            mininterval=0.1 if sys.stderr.isatty() else 10,
            bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]"
            "{postfix}",
        )

    def _step(self, event: dict[str, Any]) -> None:
        if self._bar is None:
            return
        before = self._last_step["tokens"] if self._last_step else 0
        if self._last_step or event["step"] == 1:
            self._tokens += event["tokens"] - before
            self._seconds += (event["tokens"] - before) / event["tokens_per_second"]
        self._last_step = event
        loss = event["loss"]
        # A running mean: the loss of one batch says little.
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        self._bar.set_postfix_str(
            f"loss {self._loss:.3f}, {event['tokens_per_second']:.0f} tokens/s, "
            f"{event['peak_memory_bytes'] / 1e9:.2f} GB",
            refresh=False,
        )
        self._bar.update(event["step"] - self._bar.n)

    def _summary(self, event: dict[str, Any]) -> str | None:
        """What a run came to, in one line."""
        if self._last_step is None or self._bar is None:
            return None
        minutes, seconds = divmod(round(self._bar.format_dict["elapsed"]), 60)
        parts = [f"step {event['step']} after {minutes}:{seconds:02d}", f"loss {self._loss:.3f}"]
        if self._validation:
            first, last = self._validation[0], self._validation[-1]
            parts.append(f"validation loss {first:.3f} -> {last:.3f}")
        if self._seconds:
            parts.append(f"{self._tokens / self._seconds:.0f} trained tokens/s")
        parts.append(f"peak memory {self._last_step['peak_memory_bytes'] / 1e9:.2f} GB")
        reason = event["reason"].replace("_", " ").capitalize()
        return f"{reason}: {', '.join(parts)}"


def describe(event: dict[str, Any]) -> str | None:
    """One line about an event, or ``None`` for one that the bar shows well enough."""
    kind = event["event"]
    if kind == "start":
        share = event["trainable_parameters"] / event["total_parameters"]
        begin = "Resuming" if event["resumed_from"] is not None else "Training"
        after = f" after step {event['resumed_from']}" if event["resumed_from"] is not None else ""
        return (
            f"{begin} {event['model']} with {event['method']} as run {event['run']}{after}: "
            f"{event['train_examples']} examples ({event['trained_tokens']:,} trained tokens), "
            f"{event['valid_examples']} to validate, {event['steps']} steps, "
            f"{event['trainable_parameters']:,} trainable parameters ({share:.1%}), "
            f"on the {event['device'].upper()}{_memory_line(event.get('plan'))}"
        )
    if kind == "validation":
        return f"step {event['step']}: validation loss {event['loss']:.4f}"
    if kind == "warning":
        return f"warning: {event['message']}"
    return None


def _memory_line(plan: dict[str, Any] | None) -> str:
    """What a run is planned to need, and what was chosen for it to fit."""
    if plan is None:
        return ""
    peak, limit = ((plan["calibrated_peak"] or plan["peak"]) / 1e9, plan["limit"] / 1e9)
    line = f"\nmemory: {peak:.2f} GB of {limit:.1f} GB planned, {plan['verdict']}"
    chosen = [f"{flag_of(name)} {value}" for name, value in plan["chosen"].items()]
    return line + (f"; chosen to fit: {' '.join(chosen)}" if chosen else "")


if __name__ == "__main__":
    sys.exit(main())
