"""Flags made from an options dataclass, and the frame every command runs in."""

import argparse
import dataclasses
import difflib
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from dora_mlx.atomic import file_problem
from dora_mlx.config import TrainConfig, flag_of, plain_type
from dora_mlx.errors import UserError
from dora_mlx.run_folder import DEFAULT_RUNS_DIR

# Exit codes: 0 done, 1 a failure that is not the person's doing, 2 something to fix, 130 Ctrl-C.
USER_ERROR = 2
FAILURE = 1
INTERRUPTED = 130

# What pyproject.toml installs, by the names that are imported.
DEPENDENCIES = frozenset(
    (
        *("mlx", "mlx_lm", "scipy_openblas32", "numpy", "gguf", "gradio"),
        *("huggingface_hub", "sentencepiece", "tokenizers", "tqdm", "tomli"),
    )
)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help 100 columns wide that never breaks a flag at its dashes."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=100)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one sentence instead of its whole usage."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, with the nearest flag to an unknown one, and exit with 2."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split()
        hint = ""
        if unknown and not message.startswith(unknown[0]):
            nearest = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        self.exit(USER_ERROR, f"error: {message}{hint}. See {self.prog} --help.\n")


def parser_for(verb: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help names the command the way it was started."""
    # `dora-mlx train` and `python -m dora_mlx.train` are the same command under two names.
    started_as_module = sys.argv[0].endswith(f"{verb}.py")
    prog = f"python -m dora_mlx.{verb}" if started_as_module else f"dora-mlx {verb}"
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
        allow_abbrev=False,
    )


def add_runs_dir_flag(group: "argparse._ActionsContainer") -> None:
    """``--runs-dir``, the same for every command that has to do with runs."""
    group.add_argument(
        "--runs-dir",
        metavar="DIR",
        type=Path,
        default=Path(DEFAULT_RUNS_DIR),
        help=f"Folder that holds the runs. Default: {DEFAULT_RUNS_DIR}.",
    )


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """What names a base model and adapters on it, for commands that take several."""
    parser.add_argument(
        "--run",
        metavar="NAME",
        nargs="+",
        default=[],
        help="A run, or several of one base model.",
    )
    add_runs_dir_flag(parser)
    add_checkpoint_flag(parser)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="Alias, folder or Hub name of the base model, where no --run says it.",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        nargs="+",
        type=Path,
        default=[],
        help="Folder with an adapter of dora-mlx, mlx-lm or PEFT, or several.",
    )


def add_checkpoint_flag(parser: "argparse._ActionsContainer") -> None:
    """``--checkpoint``, the same for every command that uses a trained adapter."""
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        help="Use the adapter as it was after this step, or `last` for the newest, instead of the "
        "best one.",
    )


def add_option_flags(
    parser: argparse.ArgumentParser,
    only: tuple[str, ...] = (),
    options: Any = TrainConfig,
    title: str = "training",
) -> None:
    """One flag per option of a dataclass; a flag not given leaves no attribute behind.

    With ``only``, for commands that need a few of them, just those.
    """
    types = get_type_hints(options)
    basic = parser.add_argument_group(title)
    advanced = parser.add_argument_group(f"{title}, in detail")
    for option in dataclasses.fields(options):
        if only and option.name not in only:
            continue
        group = advanced if option.metadata["advanced"] else basic
        hint, metavar = plain_type(types[option.name]), option.metadata["metavar"]
        help_text = option.metadata["help"].replace("%", "%%") + _default(option.default)
        keywords: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
        if hint is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is Literal:
            keywords["choices"] = get_args(hint)
        elif get_origin(hint) is tuple:
            keywords |= {"nargs": "+", "metavar": metavar}
        else:
            keywords |= {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, metavar)}
        group.add_argument(flag_of(option.name), **keywords)


def _default(value: Any) -> str:
    """The sentence about a default; none where the help text says it or it is plainly off."""
    if value is False or value in (None, ()):
        return ""
    shown = "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)
    return f" Default: {shown}."


def train_command(
    config: TrainConfig, run: str | None = None, runs_dir: Path = Path(DEFAULT_RUNS_DIR)
) -> list[str]:
    """The words after ``python -m dora_mlx.train`` that start this training."""
    words = ["--run", run] if run is not None else []
    if runs_dir != Path(DEFAULT_RUNS_DIR):
        words += ["--runs-dir", str(runs_dir)]
    for option in dataclasses.fields(TrainConfig):
        value = getattr(config, option.name)
        if value == option.default:
            continue
        flag = flag_of(option.name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def given_options(arguments: argparse.Namespace, options: Any = TrainConfig) -> dict[str, Any]:
    """The values of the option flags that were given; lists become tuples."""
    names = {option.name for option in dataclasses.fields(options)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def run_command(body: Callable[[], int]) -> int:
    """Run a command's body and turn what a person can act on into one message and a code.

    Returns:
        The body's own code; 2 for a ``UserError`` or a package that is not installed; 1 for a
        full disk or a file that cannot be written; 130 for Ctrl-C. Any other exception is a bug
        and goes through.
    """
    try:
        return body()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEPENDENCIES:
            raise
        print(
            f"error: the installation is not complete: {error.name} is missing. Run `make demo` "
            "again, or `pip install .` in the environment you use.",
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (such as `head`) has what it wanted; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        problem = file_problem(error)
        if problem is None:
            raise
        print(f"error: {problem}. Mend that and run it again.", file=sys.stderr)
        return FAILURE
