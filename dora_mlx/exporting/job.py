"""One export from beginning to end: refuse, measure, write, read back, judge, put in place."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx.nn as nn

import dora_mlx
from dora_mlx.adapters.attach import adapters_disabled
from dora_mlx.atomic import write_text
from dora_mlx.errors import UserError
from dora_mlx.exporting.formats import ExportFormat, Quant
from dora_mlx.exporting.judgement import Judgement, Reference, judge
from dora_mlx.exporting.logits import check_rounding, coarser, logits_of
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.model_card import CARD_FILE, model_card
from dora_mlx.exporting.prompts import Prompts
from dora_mlx.exporting.report import ExportReport, Training, report_path
from dora_mlx.exporting.staging import check_space, check_target
from dora_mlx.exporting.writer import ExportSource, Reading
from dora_mlx.registry import public_name

# Called with what is being done (reading, writing, checking, uploading), and with the bytes done
# and in all where it is known how many there are, else 0 and 0.
ExportProgress = Callable[[str, int, int], None]


class TrainingLostError(UserError):
    """An export was refused (``strict``) because it had lost a good part of the training."""

    def __init__(self, report: ExportReport):
        super().__init__(" ".join(report.verdict))
        self.report = report


@dataclass(frozen=True)
class Job:
    """What to write, and where.

    Attributes:
        source: The weights and what belongs to them.
        export_format: The format.
        quant: One of the format's.
        output: File or folder to write.
        run: Name of the run, for the report.
        model_name: The base model as a person names it.
        overwrite: Replace an export that is there.
        strict: Keep nothing that has lost a good part of the training.
        training: How the model was trained, where it is a single run's.
    """

    source: ExportSource
    export_format: ExportFormat
    quant: Quant
    output: Path
    run: str
    model_name: str
    overwrite: bool = False
    strict: bool = False
    training: Training | None = None

    def prepare(self) -> None:
        """Find out that the export can be written, before any weight is read.

        Raises:
            UserError: If the target is taken, the model cannot be exported so, or the disk is
                too small.
        """
        check_target(self.output, self.overwrite, folder=not self.export_format.suffix)
        check_space(self.output, self.size())

    def size(self) -> int:
        """Bytes that will be written.

        Raises:
            UserError: If the model cannot be exported so.
        """
        self.export_format.writer.refuse(self.source, self.quant.name)
        return self.export_format.writer.size(self.source, self.quant.name)

    def with_model(self, trained: nn.Module) -> "Job":
        """The same job with the weights of a model that has been read, adapters merged."""
        return replace(self, source=replace(self.source, weights=MergedWeights(trained)))


def measure(trained: nn.Module, prompts: Prompts, base: nn.Module | None = None) -> Reference:
    """Compute what an export of ``trained`` is compared with.

    Without ``base`` the base model is ``trained`` with its adapters disabled.
    """
    if base is None:
        with adapters_disabled(trained):
            before, _ = logits_of(trained, prompts.tokens)
    else:
        before, _ = logits_of(base, prompts.tokens)
    after, computed_in = logits_of(trained, prompts.tokens)
    return Reference(prompts, before, after, computed_in)


def run_job(job: Job, reference: Reference, progress: ExportProgress | None = None) -> ExportReport:
    """Write the export, read it back, and put it in place when it has passed.

    Args:
        job: What to do; prepared.
        reference: What the export is compared with.
        progress: Told how far it is; what it raises ends the export and leaves nothing.

    Raises:
        TrainingLostError: With ``job.strict``.
        VerificationError: If what was written is not the model that was exported.
    """
    say = progress or (lambda phase, done, total: None)
    writer = job.export_format.writer
    reports: list[ExportReport] = []

    def check(written: Path) -> None:
        say("checking", 0, 0)
        reading = writer.read(job.source, written, job.quant.name, reference.prompts.tokens)
        judgement = judge(reference, reading.logits, job.export_format, job.quant)
        difference = judgement.exported.difference
        if reading.precision is not None and difference is not None:
            precision = coarser(reading.precision, reference.computed_in)
            check_rounding(difference, precision, job.output)
        report = _report(job, written, reference.prompts, reading, judgement)
        if job.strict and not report.keeps_training:
            raise TrainingLostError(report)
        if written.is_dir():
            _save(report, report_path(written))
            (written / CARD_FILE).write_text(model_card(report), encoding="utf-8")
        reports.append(report)

    writer.write(
        job.source,
        job.output,
        job.quant.name,
        lambda done, total: say("writing", done, total),
        overwrite=job.overwrite,
        check=check,
    )
    report = reports[0]
    if not job.output.is_dir():
        _save(report, report_path(job.output))
    return report


def _report(
    job: Job, written: Path, prompts: Prompts, reading: Reading, judgement: Judgement
) -> ExportReport:
    sentences = (
        judgement.sentences
        if reading.note is None
        else (
            *judgement.sentences,
            reading.note,
        )
    )
    return ExportReport(
        run=job.run,
        training=job.training or Training(*public_name(job.model_name)),
        format=job.export_format.name,
        quant=job.quant.name,
        output=str(job.output),
        size_bytes=_size(written),
        program=reading.program,
        tensors=reading.tensors,
        prompts=len(prompts.lengths),
        positions=int(prompts.lengths.sum()),
        prompts_from=prompts.origin,
        base=judgement.base,
        trained=judgement.trained,
        exported=judgement.exported,
        kept_gain=judgement.kept_gain,
        kept_change=judgement.kept_change,
        keeps_training=judgement.keeps_training,
        advice=judgement.advice,
        verdict=sentences,
        versions={
            "dora-mlx": dora_mlx.__version__,
            **{package: version(package) for package in ("mlx", "mlx-lm")},
        },
    )


def _save(report: ExportReport, path: Path) -> None:
    # A folder may move, and its place on this machine is nobody else's business.
    report = replace(report, output=Path(report.output).name)
    write_text(path, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
