"""``python -m dora_mlx.train``: fine-tune a model on a chat file."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

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
from dora_mlx.readers.progress_bar import ProgressBar
from dora_mlx.readers.reports import WRITERS, reports
from dora_mlx.run_folder import (
    DEFAULT_RUNS_DIR,
    RunFolder,
    checkpoints_newest_first,
    find_run,
    new_run,
)

DESCRIPTION = """\
Fine-tune a language model on your own chat file with DoRA.

Without arguments it trains the embedded starter model on the sample data: a minute or two.
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
    run.add_argument(
        "--resume",
        metavar="NAME",
        help="Go on with a run that was stopped, or train one that was complete for longer "
        "(--steps, --epochs).",
    )
    run.add_argument(
        "--accept-changes",
        action="store_true",
        help="Resume also if the files of the model or the data have changed.",
    )
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
        "--report",
        metavar="NAME",
        nargs="+",
        default=[],
        choices=sorted(WRITERS),
        help="Draw the curves by tensorboard, wandb or trackio as well; each is an extra.",
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
    # Everything behind this line needs MLX, whose import takes seconds: help does without.
    from dora_mlx.training.finetune import finetune
    from dora_mlx.training.workers import Workers

    workers = Workers()
    if workers.count == 1:
        config, folder = _what_to_train(arguments)
    else:
        # Only the first machine may have the run.
        told = _what_to_train(arguments) if workers.leads else None
        options, path = workers.share(told and (told[0].to_dict(), str(told[1].path)))
        config, folder = TrainConfig.from_dict(options), RunFolder(Path(path))
    elsewhere = arguments.runs_dir != Path(DEFAULT_RUNS_DIR)
    where = f" --runs-dir {arguments.runs_dir}" if elsewhere else ""
    try:
        with (
            staying_awake(),
            pausing(folder),
            stopping(workers.leads) as stop,
            reports(arguments.report if workers.leads else [], folder) as drawn,
            ProgressBar(folder) as bar,
        ):

            def show(event: dict[str, Any]) -> None:
                bar.show(event)
                for report in drawn:
                    report.show(event)

            reason = finetune(
                config,
                folder,
                resume=arguments.resume is not None,
                overwrite=arguments.overwrite,
                accept_changes=arguments.accept_changes,
                fit=arguments.fit,
                ignore_memory=arguments.ignore_memory,
                listener=show,
                should_stop=lambda: stop.requested,
            )
    except KeyboardInterrupt:
        if workers.leads and folder.config_file.exists():
            kept = checkpoints_newest_first(folder.checkpoints_dir)
            what = "The last checkpoint is kept" if kept else "No step was saved yet"
            print(
                f"{what}; go on with `python -m dora_mlx.train --resume {folder.name}{where}`.",
                file=sys.stderr,
            )
        raise
    if workers.leads:
        print(_what_next(reason, folder, where, bar.steps))
    return INTERRUPTED if reason == "stopped" else 0


def _what_next(reason: str, folder: RunFolder, where: str, steps: int) -> str:
    """The last words of the command."""
    resume = f"python -m dora_mlx.train --resume {folder.name}{where}"
    if reason == "stopped":
        return f"Stopped; everything is kept. Go on with:\n  {resume}"
    longer = ""
    if not steps:
        longer = "There was nothing left to train. Train it for longer with:\n  "
        longer += (
            f"{resume} --patience N\n" if reason == "early_stopped" else f"{resume} --steps N\n"
        )
    return (
        f"\n{longer}The adapter is in {folder.path}. Try next:\n"
        f"  python -m dora_mlx.chat --run {folder.name}{where}\n"
        f'  python -m dora_mlx.chat --run {folder.name}{where} --compare --prompt "Hello!"\n'
        f"  python -m dora_mlx.export --run {folder.name}{where} --format gguf"
    )


def _what_to_train(arguments: argparse.Namespace) -> tuple[TrainConfig, RunFolder]:
    """Options and folder from flags, a saved configuration or the run to resume."""
    given = given_options(arguments)
    if arguments.resume is not None:
        return _what_to_resume(arguments, given)
    if arguments.accept_changes:
        raise UserError("--accept-changes goes with --resume.")
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


def _what_to_resume(
    arguments: argparse.Namespace, given: dict[str, Any]
) -> tuple[TrainConfig, RunFolder]:
    """The options of a run with those in ``given`` that a resume may change."""
    changeable = {o.name for o in fields(TrainConfig) if o.metadata["on_resume"]}
    fixed = [flag_of(name) for name in given if name not in changeable]
    for name in ("run", "config", "overwrite", "fit", "ignore_memory"):
        fixed += [flag_of(name)] if getattr(arguments, name) else []
    if fixed:
        raise UserError(
            f"--resume goes on with a run as it began, so it takes no {', '.join(fixed)}. What may "
            f"change: {', '.join(map(flag_of, sorted(changeable)))}."
        )
    folder = find_run(arguments.resume, arguments.runs_dir)
    saved = read_options(folder.config_file)
    if "epochs" in given:
        # Saved is the number of steps that the epochs came to.
        saved["steps"] = None
    return TrainConfig.from_dict(saved | given, where=str(folder.config_file)), folder


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

    def __init__(self, speaks: bool):
        self.requested = False
        self._speaks = speaks

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._speaks:
            print("\nStopping after this step (again to stop at once) ...", file=sys.stderr)


@contextmanager
def stopping(speaks: bool = True) -> Iterator[StopRequest]:
    """Within the block, Ctrl-C and SIGTERM make a request that a training looks at."""
    stop = StopRequest(speaks)
    with _handling({signal.SIGINT: stop, signal.SIGTERM: stop}):
        yield stop


@contextmanager
def pausing(folder: RunFolder) -> Iterator[None]:
    """Within the block, SIGUSR1 makes the training of ``folder`` wait and SIGUSR2 go on."""

    def pause(*_: object) -> None:
        # Before the folder is there, nothing trains that could wait.
        if folder.path.is_dir():
            folder.pause_file.touch()

    with _handling(
        {
            signal.SIGUSR1: pause,
            signal.SIGUSR2: lambda *_: folder.pause_file.unlink(missing_ok=True),
        }
    ):
        yield


@contextmanager
def _handling(handlers: dict[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
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


if __name__ == "__main__":
    sys.exit(main())
