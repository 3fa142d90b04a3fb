"""The progress bar of the train command, and the lines above it."""

import sys
from collections import deque
from typing import TYPE_CHECKING, Any, TextIO

from dora_mlx.atomic import naming
from dora_mlx.config import flag_of
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.events import RECENT_STEPS, recent_loss

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressBar:
    """Reader of a run's events: a progress bar, and a line for what deserves one.

    The lines also go to the run's ``log.txt``.
    """

    def __init__(self, folder: RunFolder):
        self._folder = folder
        self._bar: tqdm[Any] | None = None
        self._log: TextIO | None = None
        self._losses: deque[float | None] = deque(maxlen=RECENT_STEPS)
        self._validations: list[tuple[int, float]] = []
        self._last_step: dict[str, Any] | None = None
        self._steps, self._tokens, self._seconds = 0, 0, 0.0

    @property
    def steps(self) -> int:
        """Steps that were trained while it looked."""
        return self._steps

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            with naming(self._folder.log_file):
                self._log.close()

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "start":
            self._start(event)
        elif kind == "step":
            self._step(event)
        elif kind == "validation":
            self._validations.append((event["step"], event["loss"]))
        line = self._summary(event) if kind == "end" else describe(event)
        if line and self._bar is not None and self._log is not None:
            self._bar.write(line)
            with naming(self._folder.log_file):
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
        self._steps += 1
        before = self._last_step["tokens"] if self._last_step else 0
        if self._last_step or event["step"] == 1:
            self._tokens += event["tokens"] - before
            self._seconds += (event["tokens"] - before) / event["tokens_per_second"]
        self._last_step = event
        self._losses.append(event["loss"])
        self._bar.set_postfix_str(
            f"{self._loss()}, {event['tokens_per_second']:.0f} tokens/s, "
            f"{event['peak_memory_bytes'] / 1e9:.2f} GB",
            refresh=False,
        )
        self._bar.update(event["step"] - self._bar.n)

    def _summary(self, event: dict[str, Any]) -> str | None:
        """What a run came to, in one line."""
        if self._last_step is None or self._bar is None:
            return None
        minutes, seconds = divmod(round(self._bar.format_dict["elapsed"]), 60)
        recent = f"{len(self._losses)} step{'s'[: len(self._losses) > 1]}"
        parts = [
            f"step {event['step']} after {minutes}:{seconds:02d}",
            f"{self._loss()} (mean of the last {recent})",
        ]
        if self._validations:
            parts.append(self._validation_loss())
        if self._seconds:
            parts.append(f"{self._tokens / self._seconds:.0f} trained tokens/s")
        parts.append(f"peak memory {self._last_step['peak_memory_bytes'] / 1e9:.2f} GB")
        reason = event["reason"].replace("_", " ").capitalize()
        return f"{reason}: {', '.join(parts)}"

    def _loss(self) -> str:
        loss = recent_loss(self._losses)
        return "no finite loss" if loss is None else f"loss {loss:.3f}"

    def _validation_loss(self) -> str:
        if self._validations[-1][0] == 0:
            return f"validation loss {self._validations[0][1]:.3f} before training, none since"
        # A run that goes on may have validated only once, at its end.
        ends = self._validations[:1] + self._validations[1:][-1:]
        losses = "validation loss " + " -> ".join(f"{loss:.3f}" for _, loss in ends)
        candidates = self._validations[1:]
        step, best = min(candidates or ends, key=lambda validation: validation[1])
        # The best of a run that went on may have been before.
        if self._validations[0][0] > 0 or step == ends[-1][0]:
            return losses
        return f"{losses}, best {best:.3f} at step {step}"


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
    line = f"\nmemory: {peak:.2f} GB planned of {limit:.1f} GB, {plan['verdict']}"
    if plan.get("grad_checkpoint"):
        line += ", with gradient checkpointing"
    chosen = [f"{flag_of(name)} {value}" for name, value in plan["chosen"].items()]
    return line + (f"; chosen to fit: {' '.join(chosen)}" if chosen else "")
