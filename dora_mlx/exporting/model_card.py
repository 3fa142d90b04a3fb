"""The page of an export: what it is, what it was made from, and what was measured."""

import re
from collections.abc import Iterator
from pathlib import Path

from dora_mlx.exporting.formats import find_format
from dora_mlx.exporting.report import ExportReport, Training
from dora_mlx.registry import HUB_NAME

CARD_FILE = "README.md"

_LICENSE_LINE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)
_LICENSE_ID = re.compile(r"[\w.+-]+")


def model_card(report: ExportReport) -> str:
    """Markdown with the Hub's metadata in front; holds nothing of the data but how much it was."""
    training = report.training
    export_format = find_format(report.format)
    licence = training.license or "that of the base model, which is not known here"
    lines = [
        "---",
        *([f"license: {licence.lower()}"] if _LICENSE_ID.fullmatch(licence) else []),
        *([f"base_model: {training.base}"] if HUB_NAME.fullmatch(training.base) else []),
        "tags:",
        "- dora-mlx",
        *([f"- {training.method}"] if training.method else []),
        "---",
        "",
        f"# {report.run}",
        "",
        f"{training.base}, fine-tuned, as {export_format.summary}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| Base model | {training.base} |",
        *_training_rows(training),
        f"| Format | {report.format}, {report.quant} |",
        f"| Licence | {licence} |",
        "",
        "## Measured",
        "",
        f"Read back by {report.program} and compared on {report.prompts} prompts "
        f"({report.positions} tokens) of {report.prompts_from}:",
        "",
        "```text",
        *report.table(),
        "```",
        "",
        " ".join(report.verdict),
        "",
        "Made with dora-mlx " + ", ".join(f"{k} {v}" for k, v in report.versions.items()) + ".",
        "",
    ]
    return "\n".join(lines)


_METHODS = {
    "dora": "DoRA (arXiv 2402.09353)",
    "lora": "LoRA (arXiv 2106.09685)",
    "full": "training all weights",
}


def _training_rows(training: Training) -> Iterator[str]:
    if training.method is None:
        return
    rank = f", rank {training.rank}, alpha {training.alpha:g}" if training.method != "full" else ""
    yield f"| Method | {_METHODS[training.method]}{rank} |"
    yield f"| Steps | {training.steps:,} |"
    yield f"| Data | {training.examples:,} examples, {training.tokens:,} trained tokens |"


def license_of(base_dir: Path) -> str | None:
    """The licence that the base model's own page names, if it has one."""
    page = base_dir / CARD_FILE
    found = _LICENSE_LINE.search(page.read_text(encoding="utf-8")) if page.is_file() else None
    return found[1] if found else None
