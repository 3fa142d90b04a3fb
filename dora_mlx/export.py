"""``python -m dora_mlx.export``: write a trained model for other programs, and measure it."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_mlx.command_line import (
    FAILURE,
    add_checkpoint_flag,
    add_runs_dir_flag,
    parser_for,
    run_command,
)
from dora_mlx.exporting.formats import EXPORT_FORMATS, ExportFormat, Quant, find_format
from dora_mlx.run_folder import RunFolder, find_run

if TYPE_CHECKING:
    from dora_mlx.adapters.trained import TrainedModel
    from dora_mlx.exporting.job import ExportProgress, Job
    from dora_mlx.exporting.judgement import Reference
    from dora_mlx.exporting.report import ExportReport, Training

EXPORTS_DIR = Path("exports")

DESCRIPTION = """\
Write a trained model for other programs, the adapter merged into the weights in float32.

{formats}

The result is read back and compared with the adapted model before it appears under its name; what
was measured is printed and kept beside it.
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.export --run demo --format safetensors
  python -m dora_mlx.export --run demo --format gguf --output pirate.gguf
"""


@dataclass(frozen=True)
class ExportSize:
    """Bytes that an export needs, and bytes that are free where it would be written."""

    needed: int
    free: int


def export_run(
    folder: RunFolder,
    output_format: str,
    output: Path | None = None,
    *,
    quant: str | None = None,
    overwrite: bool = False,
    strict: bool = False,
    push: str | None = None,
    public: bool = False,
    pre: str | None = None,
    checkpoint: str | None = None,
    progress: "ExportProgress | None" = None,
) -> "ExportReport":
    """Write the trained model of a run, read it back and compare it with the adapted one.

    Nothing appears under ``output`` until it has been written completely and has passed.

    Args:
        folder: The run.
        output_format: Name of one of ``EXPORT_FORMATS``.
        output: Folder or file to write; by default ``default_export_path``.
        quant: Name of one of the format's quants; by default the first.
        overwrite: Replace an export that is there.
        strict: Keep nothing, and raise, when a good part of the training is lost.
        push: Hub name (owner/name) to upload the export to when it is in place.
        public: Whether a repository that the upload makes can be seen by everybody.
        pre: What llama.cpp calls the tokenizer's way of splitting text, where it is not known here.
        checkpoint: As for ``load_run``: ``None`` for the best adapter.
        progress: Called with the phase, and bytes done and in all or 0 and 0; what it raises ends
            the export and leaves nothing behind.

    Raises:
        UserError: If this model cannot be exported so, before any work; or the disk is full.
            With ``strict`` a ``TrainingLostError``, which has the ``report``.
        VerificationError: If what was written is not the model; nothing of it is kept.
    """
    from dora_mlx.adapters.trained import load_run
    from dora_mlx.exporting.hub import check_push, upload
    from dora_mlx.exporting.job import run_job

    say = progress or (lambda phase, done, total: None)
    if push is not None:
        check_push(push)
    say("reading", 0, 0)
    job = _job(folder, output_format, output, quant, pre=pre, overwrite=overwrite, strict=strict)
    job.prepare()
    trained = load_run(folder, checkpoint)
    say("checking", 0, 0)
    reference = _reference(folder, trained)
    report = run_job(job.with_model(trained.base.model), reference, progress)
    if push is not None:
        say("uploading", 0, 0)
        upload(report, push, public=public)
    return report


def export_size(
    folder: RunFolder, output_format: str, quant: str | None = None, output: Path | None = None
) -> ExportSize:
    """What an export would need, from the shapes of the model alone; arguments as ``export_run``.

    Raises:
        UserError: If this model cannot be exported so.
    """
    from dora_mlx.exporting.staging import free_space

    job = _job(folder, output_format, output, quant, overwrite=True)
    return ExportSize(job.size(), free_space(job.output))


def default_export_path(run: str, export_format: ExportFormat, quant: Quant) -> Path:
    """Where an export of the run called ``run`` goes by default: a place in ``exports``."""
    kind = [] if export_format.suffix else [export_format.name]
    if len(export_format.quants) > 1:
        kind.append(quant.name)
    return EXPORTS_DIR / f"{'-'.join([run, *kind])}{export_format.suffix}"


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and export; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _export(arguments))


def _job(
    folder: RunFolder,
    output_format: str,
    output: Path | None,
    quant: str | None,
    *,
    overwrite: bool,
    strict: bool = False,
    pre: str | None = None,
) -> "Job":
    export_format = find_format(output_format)
    chosen = export_format.quant(quant)

    from dora_mlx.exporting.job import Job
    from dora_mlx.exporting.merge import MergedWeights
    from dora_mlx.exporting.writer import ExportSource
    from dora_mlx.loading import load_base
    from dora_mlx.registry import resolve

    name = folder.read_config()["options"]["model"]
    base = load_base(resolve(name), lazy=True)
    training = _training(folder, base.path)
    source = ExportSource(base, MergedWeights(base.model), folder.path, training.base, pre)
    place = output or default_export_path(folder.name, export_format, chosen)
    return Job(
        source,
        export_format,
        chosen,
        place,
        folder.name,
        name,
        overwrite,
        strict,
        training,
    )


def _training(folder: RunFolder, base_dir: Path) -> "Training":
    from dora_mlx.exporting.model_card import license_of
    from dora_mlx.exporting.report import Training
    from dora_mlx.registry import public_name
    from dora_mlx.training.events import read_events

    options = folder.read_config()["options"]
    base, known_license = public_name(options["model"])
    events = read_events(folder.path)
    start: dict[str, Any] = next((e for e in events if e["event"] == "start"), {})
    return Training(
        base=base,
        license=known_license or license_of(base_dir),
        method=options["method"],
        rank=options["rank"],
        alpha=options["alpha"],
        steps=max((event.get("step", 0) for event in events), default=0),
        examples=start.get("train_examples", 0),
        tokens=start.get("trained_tokens", 0),
    )


def _reference(folder: RunFolder, trained: "TrainedModel") -> "Reference":
    from dora_mlx.exporting.job import measure
    from dora_mlx.exporting.prompts import prompts_of_run
    from dora_mlx.loading import load_base

    tokenizer, vocabulary = trained.base.tokenizer, trained.base.vocabulary
    prompts = prompts_of_run(folder.read_config(), tokenizer, vocabulary)
    # Full fine-tuning has no adapter that could be disabled.
    base = load_base(trained.base.path).model if trained.spec.method == "full" else None
    return measure(trained.base.model, prompts, base)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    formats = "\n".join(f"  {one.name:<12} {one.summary}" for one in EXPORT_FORMATS)
    parser = parser_for("export", DESCRIPTION.format(formats=formats), EXAMPLES + _quants_help())
    parser.add_argument("--run", metavar="NAME", required=True, help="The run to export.")
    add_runs_dir_flag(parser)
    add_checkpoint_flag(parser)
    add_export_flags(parser)
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="Upload the export to this repository of the Hugging Face Hub, with a page that says "
        "what was measured. It is made, private, if it is not there.",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="With --push: a repository that is made can be seen by everybody.",
    )
    parser.add_argument(
        "--pre",
        metavar="NAME",
        help="For GGUF files: what llama.cpp calls the tokenizer's way of splitting text, for a "
        "tokenizer that the command does not know.",
    )
    return parser


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    """What is written, and where, for every command that writes a model."""
    names = [one.name for one in EXPORT_FORMATS]
    parser.add_argument("--format", required=True, choices=names, help="What to write.")
    parser.add_argument(
        "--quant",
        metavar="TYPE",
        help="Type of the weights. `dora-mlx export --help` ends with what each format takes; "
        "default: the first there.",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        help=f"Folder or file to write. Default: in {EXPORTS_DIR}/, named after the run.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace the output if it is there."
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="Keep nothing and end with code 1 when rounding has undone a good part of the "
        "training. Without it the export is kept, with a warning.",
    )


def _quants_help() -> str:
    """What ``--quant`` takes for each format, for the end of a help."""
    formats: dict[tuple[Quant, ...], list[str]] = {}
    for export_format in EXPORT_FORMATS:
        formats.setdefault(tuple(export_format.quants), []).append(export_format.name)
    lines = []
    for quants, names in formats.items():
        lines.append(f"\n--quant for {' and '.join(names)}:")
        lines += [f"  {quant.name:<10} {quant.help}" for quant in quants]
    return "\n".join(lines) + "\n"


def _export(arguments: argparse.Namespace) -> int:
    # A wrong --quant is said before anything is imported.
    find_format(arguments.format).quant(arguments.quant)
    folder = find_run(arguments.run, arguments.runs_dir)

    code = print_export(
        lambda progress: export_run(
            folder,
            arguments.format,
            arguments.output,
            quant=arguments.quant,
            overwrite=arguments.overwrite,
            strict=arguments.strict,
            checkpoint=arguments.checkpoint,
            push=arguments.push,
            public=arguments.public,
            pre=arguments.pre,
            progress=progress,
        )
    )
    if code == 0 and arguments.push is not None:
        print(f"Uploaded to {arguments.push}.")
    return code


def print_export(write: Callable[["ExportProgress"], "ExportReport"]) -> int:
    """Write with a progress bar and print what was measured; returns the exit code."""
    from dora_mlx.exporting.job import TrainingLostError
    from dora_mlx.exporting.logits import VerificationError

    try:
        with _progress_bar() as progress:
            report = write(progress)
    except TrainingLostError as error:
        _print_figures(error.report)
        print(f"error: {error} Nothing was kept (--strict).", file=sys.stderr)
        return FAILURE
    except VerificationError as error:
        print(f"error: {error}. This is a bug; nothing was kept.", file=sys.stderr)
        return FAILURE
    print(f"Wrote {report.output} ({report.size_bytes / 1e6:.1f} MB).")
    _print_figures(report)
    print("\n".join(report.verdict))
    if commands := report.next_commands():
        print("Use it with:", *commands, sep="\n  ")
    return 0


def _print_figures(report: "ExportReport") -> None:
    print(
        f"Read back by {report.program} and compared on {report.prompts} prompts "
        f"({report.positions} tokens) of {report.prompts_from}:\n"
    )
    print("\n".join(f"  {line}" for line in report.table()))
    print()


@contextmanager
def _progress_bar() -> Iterator["ExportProgress"]:
    from tqdm import tqdm

    bar: tqdm[Any]
    with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def show(phase: str, done: int, total: int) -> None:
            bar.set_description(phase.capitalize(), refresh=False)
            bar.total = total or None
            bar.n = done
            bar.refresh()

        yield show


if __name__ == "__main__":
    sys.exit(main())
