"""From measured logits to the sentences of a report."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

from dora_mlx.exporting.formats import ADAPTER_FORMAT, ExportFormat, Quant
from dora_mlx.exporting.logits import Logits, change_kept, compare_logits, mean_loss
from dora_mlx.exporting.prompts import Prompts
from dora_mlx.exporting.report import LogitReport, ModelFigures

# An export that keeps less of the gain in validation loss, or of the change of the logits where
# there is no such gain to measure, has lost a good part of the training.
GOOD_PART = 0.8
# Nats; a smaller gain than this says nothing about a few prompts.
_SMALLEST_GAIN = 0.01
_FEW_EXAMPLES = 10


@dataclass(frozen=True)
class Reference:
    """What an export is compared with: logits ``[B, L, vocab]`` of both models on the prompts.

    ``computed_in`` is the type that the trained model's were computed in.
    """

    prompts: Prompts
    base: Logits
    trained: Logits
    computed_in: mx.Dtype


@dataclass(frozen=True)
class Judgement:
    """The figures of the three models and what they mean."""

    base: ModelFigures
    trained: ModelFigures
    exported: ModelFigures
    kept_gain: float | None
    kept_change: float
    keeps_training: bool
    advice: str | None
    sentences: tuple[str, ...]


def judge(
    reference: Reference, exported: Logits, export_format: ExportFormat, quant: Quant
) -> Judgement:
    """Compare base, trained and exported model, the last by its logits ``[B, L, vocab]``."""
    prompts, base, trained = reference.prompts, reference.base, reference.trained
    used = prompts.used
    losses = [mean_loss(logits, prompts) for logits in (base, trained, exported)]
    difference = compare_logits(trained, exported, used)
    kept_gain = _kept_gain(*losses)
    kept_change = change_kept(base, trained, exported, used)
    kept = kept_change if kept_gain is None else kept_gain
    keeps = kept >= GOOD_PART
    return Judgement(
        base=ModelFigures(losses[0], compare_logits(trained, base, used)),
        trained=ModelFigures(losses[1], None),
        exported=ModelFigures(losses[2], difference),
        kept_gain=kept_gain,
        kept_change=kept_change,
        keeps_training=keeps,
        advice=None if keeps else _advice(export_format, quant),
        sentences=tuple(
            _sentences(
                difference, kept, kept_gain is not None, len(prompts.lengths), quant, export_format
            )
        ),
    )


def _kept_gain(base: float | None, trained: float | None, exported: float | None) -> float | None:
    if base is None or trained is None or exported is None or base - trained < _SMALLEST_GAIN:
        return None
    return (base - exported) / (base - trained)


def _advice(export_format: ExportFormat, quant: Quant) -> str:
    """Flags of an export that keeps what this one does not."""
    if quant.name == export_format.keeps:
        # Sixteen bits are all that merged weights are read in; unmerged, nothing is rounded.
        return f"--format {ADAPTER_FORMAT}"
    return f"--format {export_format.name} --quant {export_format.keeps}"


def _sentences(
    difference: LogitReport,
    kept: float,
    of_loss: bool,
    examples: int,
    quant: Quant,
    export_format: ExportFormat,
) -> Iterator[str]:
    share = f"{max(0.0, min(1.0, kept)):.0%}"
    part = f"{share} of {'the drop in validation loss' if of_loss else 'what it changed'} is kept"
    if kept >= GOOD_PART:
        yield f"The training is in the export: {part}."
    else:
        yield f"Rounding (--quant {quant.name}) has undone much of the training: only {part}."
    yield (
        "At "
        f"{difference.top1_agreement:.1%} of the positions it chooses the same next token as the "
        "trained model."
    )
    if examples < _FEW_EXAMPLES:
        yield "Few examples: this is a rough check."
    if kept < GOOD_PART:
        yield f"This keeps it: {_advice(export_format, quant)}."
