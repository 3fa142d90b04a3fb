"""Other programs that draw a run's curves: TensorBoard, Weights & Biases and trackio.

Each is a reader of the run's events and needs its package, an extra of dora-mlx by its name.
"""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Protocol

from dora_mlx.errors import UserError
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.events import read_events

# What is drawn, by the name of its curve.
_CURVES = {
    "step": {
        "loss": "train/loss",
        "learning_rate": "train/learning_rate",
        "grad_norm": "train/grad_norm",
        "tokens": "train/tokens",
        "tokens_per_second": "train/tokens_per_second",
        "peak_memory_bytes": "train/peak_memory_bytes",
    },
    "validation": {"loss": "validation/loss"},
}
PROJECT = "dora-mlx"


class Writer(Protocol):
    """Draws points; opened when the run starts, after the step that it goes on from."""

    def __init__(self, run: RunFolder, resumed_from: int | None): ...

    def draw(self, step: int, values: dict[str, float]) -> None:
        """Add a point at ``step`` to each curve that ``values`` names."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Files in the run's folder ``tensorboard``, for ``tensorboard --logdir runs``."""

    def __init__(self, run: RunFolder, resumed_from: int | None):
        from tensorboardX import SummaryWriter

        # Points behind the checkpoint are drawn again.
        purge = None if resumed_from is None else resumed_from + 1
        folder = str(run.path / "tensorboard")
        # Files are named by the second; one that is resumed in the same would replace the other.
        suffix = f".{resumed_from or 0}"
        self._writer = SummaryWriter(
            folder, purge_step=purge, write_to_disk=True, filename_suffix=suffix
        )

    def draw(self, step: int, values: dict[str, float]) -> None:
        """As ``Writer``."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """As ``Writer``."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine."""

    def __init__(self, run: RunFolder, resumed_from: int | None):
        import wandb

        with _saying_what_wandb_lacks():
            self._run = wandb.init(
                project=PROJECT,
                name=run.name,
                dir=str(run.path),
                config=run.read_config(),
                # The same run goes on after a resume.
                id=run_id(run),
                resume="allow",
            )

    def draw(self, step: int, values: dict[str, float]) -> None:
        """As ``Writer``."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """As ``Writer``."""
        self._run.finish()


@contextmanager
def _saying_what_wandb_lacks() -> Iterator[None]:
    import wandb

    try:
        yield
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases cannot start: {str(error).rstrip('.')}. Or set WANDB_MODE=offline, "
            "which needs no account."
        ) from error


def _log_in_to_wandb() -> None:
    """Ask for what is missing before a run is there that would be left behind."""
    import wandb

    with _saying_what_wandb_lacks():
        wandb.login()


class Trackio:
    """A run of trackio, which keeps its data on this machine; ``trackio show`` draws it."""

    def __init__(self, run: RunFolder, resumed_from: int | None):
        import trackio

        self._run = trackio.init(
            project=PROJECT, name=run_id(run), config=run.read_config(), resume="allow"
        )

    def draw(self, step: int, values: dict[str, float]) -> None:
        """As ``Writer``."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """As ``Writer``."""
        import trackio

        # The run's own finish() would be called once more when the process ends.
        trackio.finish()


# By the name of the extra: the writer and the package it needs.
WRITERS: dict[str, tuple[type[Writer], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WandB, "wandb"),
    "trackio": (Trackio, "trackio"),
}


def run_id(run: RunFolder) -> str:
    """A name that another run of the same name, trained later or elsewhere, does not have."""
    return f"{run.name}-{read_events(run.path)[0]['time']:.0f}"


class Report:
    """Reader of a run's events that draws them with one of ``WRITERS``."""

    def __init__(self, kind: str, run: RunFolder):
        self._kind, self._run = kind, run
        self._writer: Writer | None = None

    def show(self, event: dict[str, Any]) -> None:
        """Draw one event."""
        if event["event"] == "start":
            self._writer = WRITERS[self._kind][0](self._run, event["resumed_from"])
        curves = _CURVES.get(event["event"], {})
        values = {name: float(event[key]) for key, name in curves.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        if self._writer is not None and values:
            self._writer.draw(event["step"], values)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def reports(kinds: list[str], run: RunFolder) -> Iterator[list[Report]]:
    """A reader for every program in ``kinds``, closed at the end of the block.

    Raises:
        UserError: Naming the packages that are missing; or nobody is logged in to Weights &
            Biases.
    """
    missing = [kind for kind in kinds if importlib.util.find_spec(WRITERS[kind][1]) is None]
    if missing:
        raise UserError(
            f"--report {' '.join(missing)} needs a package that is not installed: "
            f"pip install 'dora-mlx[{','.join(missing)}]'."
        )
    if "wandb" in kinds:
        _log_in_to_wandb()
    with ExitStack() as held:
        yield [held.enter_context(closing(Report(kind, run))) for kind in kinds]
