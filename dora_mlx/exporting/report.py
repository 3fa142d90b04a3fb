"""What an export came to: figures that were measured, and sentences that follow from them."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dora_mlx.registry import HUB_NAME

REPORT_FILE = "export_report.json"


@dataclass(frozen=True)
class LogitReport:
    """How two models' logits differ, over every position of the same tokens.

    ``relative_rms`` is the root mean square of the difference over the standard deviation of the
    reference, ``top1_agreement`` the share of positions with the same most likely token, and
    ``kl`` the mean divergence of the other distribution from the reference, in nats.
    """

    max_abs_logit_difference: float
    relative_rms: float
    top1_agreement: float
    kl: float


@dataclass(frozen=True)
class ModelFigures:
    """One model on the validation prompts.

    ``loss`` is the mean cross-entropy of the answers' tokens in nats, ``None`` without
    validation data; ``difference`` is that of its logits to the trained model's, ``None`` for
    the trained model itself.
    """

    loss: float | None
    difference: LogitReport | None


@dataclass(frozen=True)
class Training:
    """How the exported model was trained, as far as its page says it.

    Attributes:
        base: The base model, without the place where it lies on this machine.
        license: Of the base model, as far as it is known.
        method: ``dora``, ``lora`` or ``full``; ``None`` for a model that is no single run's, of
            which the rest is 0.
        rank: Of the update.
        alpha: Its strength.
        steps: Updates of the optimizer.
        examples: Examples that were trained on.
        tokens: Tokens of their answers.
    """

    base: str
    license: str | None
    method: str | None = None
    rank: int = 0
    alpha: float = 0.0
    steps: int = 0
    examples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class ExportReport:
    """What was written, what read it back, and what is left of the training in it.

    Attributes:
        run: Name of the run.
        training: How it was trained.
        format: As in ``--format``.
        quant: As in ``--quant``.
        output: Path of the file or folder; its name alone in the saved report.
        size_bytes: Its size.
        program: What read it back.
        tensors: How many tensors were compared with the weights they were written from.
        prompts: How many prompts the models were compared on.
        positions: How many tokens of theirs were predicted.
        prompts_from: Where the prompts come from, in words.
        base: The base model's figures.
        trained: The trained model's.
        exported: The export's.
        kept_gain: Share of the drop in validation loss from base to trained that the export has
            too; ``None`` where training did not lower that loss.
        kept_change: Share of the change of the logits from base to trained that the export has
            too: the projection of its own change on that one; 1 is all of it.
        keeps_training: Whether a good part of the training survived.
        advice: Flags of an export that keeps it, when this one does not.
        verdict: All of this in sentences.
        versions: Of the programs that took part.
    """

    run: str
    training: Training
    format: str
    quant: str
    output: str
    size_bytes: int
    program: str
    tensors: int
    prompts: int
    positions: int
    prompts_from: str
    base: ModelFigures
    trained: ModelFigures
    exported: ModelFigures
    kept_gain: float | None
    kept_change: float | None
    keeps_training: bool
    advice: str | None
    verdict: tuple[str, ...]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON says it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExportReport":
        """What ``to_dict`` gave."""
        figures = {
            name: ModelFigures(
                values[name]["loss"],
                LogitReport(**values[name]["difference"]) if values[name]["difference"] else None,
            )
            for name in ("base", "trained", "exported")
        }
        training = Training(**values["training"])
        verdict = tuple(values["verdict"])
        return cls(**{**values, **figures, "training": training, "verdict": verdict})

    def table(self) -> list[str]:
        """The figures as lines of text, one model a line."""
        return list(_table(self))

    def next_commands(self) -> list[str]:
        """How to use the export in the program it is for; most often one command."""
        place = shlex.quote(self.output)
        model = re.sub(r"[^a-z0-9._-]+", "-", self.run.lower())
        base = self.training.base
        if self.format == "mlx-adapter" and HUB_NAME.fullmatch(base):
            # A base model of this machine has no name here that mlx-lm would know.
            return [f"mlx_lm.chat --model {base} --adapter-path {place}"]
        return {
            "gguf": [f"llama-cli -m {place}"],
            "ollama": [f"ollama create {model} -f {place}/Modelfile", f"ollama run {model}"],
            "mlx": [f"mlx_lm.chat --model {place}"],
        }.get(self.format, [])


def report_path(output: Path) -> Path:
    """Where the report of an export lies: in its folder, or beside its file."""
    return (
        output / REPORT_FILE
        if output.is_dir()
        else output.with_name(f"{output.stem}.{REPORT_FILE}")
    )


def read_export_report(output: Path) -> ExportReport | None:
    """The report of the export ``output``, or ``None`` if it has none."""
    path = report_path(output)
    if not path.is_file():
        return None
    report = ExportReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    return replace(report, output=str(output))


def _table(report: ExportReport) -> Iterator[str]:
    yield f"{'':<14}{'loss':>8}{'same next token':>19}{'KL (nats)':>11}{'largest logit gap':>19}"
    for name in ("base", "trained", "exported"):
        figures: ModelFigures = getattr(report, name)
        loss = "-" if figures.loss is None else f"{figures.loss:.4f}"
        line = f"{name + ' model':<14}{loss:>8}"
        other = figures.difference
        if other is None:
            yield f"{line}{'(what the others are compared with)':>43}"
        else:
            yield (
                f"{line}{other.top1_agreement:>19.1%}{other.kl:>11.2g}"
                f"{other.max_abs_logit_difference:>19.2g}"
            )
    yield "(KL and gap: 0 is no difference from the trained model)"
