"""What the Export tab says."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app.views import html
from app.views.html import escape
from app.views.numbers import gigabytes
from app.wording import in_words_of_the_form

_PHASES = {
    "starting": "Starting",
    "reading": "Reading the model",
    "writing": "Merging and writing",
    "checking": "Reading it back and comparing",
    "uploading": "Uploading",
    "done": "Done",
}
_MODELS = (("base", "Base model"), ("trained", "Trained model"), ("exported", "This export"))


def size(needed: int, free: int, place: Path) -> str:
    """How large an export will be, and whether there is room for it."""
    said = f"{gigabytes(needed)} for {place.name}, {gigabytes(free)} free on this disk"
    if needed > free:
        return html.note(f"{said}: it does not fit. Free some space first.", "bad")
    return f'<p class="hint figures">{escape(said)}</p>'


def job(state: Any, selected: str) -> str:
    """How far an export is, or what became of it; ``selected`` is the name the form asks for."""
    if state is None:
        return ""
    title = f"{state.output.name}"
    if state.running:
        share = state.done / state.total if state.total else 0.0
        counted = f" · {gigabytes(state.done)} of {gigabytes(state.total)}" if state.total else ""
        phase = _PHASES.get(state.phase, state.phase.capitalize())
        return (
            f'<div class="job"><p class="figures" role="status"><strong>{escape(title)}</strong> '
            f"{escape(phase + counted)}</p>{html.progress(share, f'Export of {title}')}</div>"
        )
    if state.error or state.report is None:
        text = state.error or "It ended without a result; the app's terminal says why."
        return html.note(in_words_of_the_form(text), "bad", title)
    return report(state.report, selected)


def report(found: Any, selected: str) -> str:
    """What was measured about an export, in plain words and then in numbers.

    Args:
        found: The ``ExportReport``.
        selected: The name of what the form asks for, which may be another export.
    """
    name = Path(found.output).name
    title = f"{name} is written" if name == selected else f"Last export: {name}"
    verdict = in_words_of_the_form("\n".join(found.verdict))
    kind = "good" if found.keeps_training else "warn"
    rows = "".join(_row(found, name, label) for name, label in _MODELS)
    read = f"Read back by {found.program}, compared on {found.prompts} prompts from "
    return (
        html.note(verdict, kind, title)
        + '<div class="scroll" tabindex="0"><table class="figures"><thead><tr><th scope="col">Model'
        '</th><th scope="col">Validation loss</th><th scope="col">Same next token</th>'
        '<th scope="col">KL (nats)</th><th scope="col">Largest logit gap</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f'<p class="hint">{escape(read + found.prompts_from)}. KL and gap: '
        "0 is no difference from the trained model.</p>"
    )


def _row(found: Any, name: str, label: str) -> str:
    figures = getattr(found, name)
    loss = "-" if figures.loss is None else f"{figures.loss:.4f}"
    cells = [loss, "-", "-", "-"]
    if figures.difference is not None:
        other = figures.difference
        cells[1:] = [
            f"{other.top1_agreement:.1%}",
            f"{other.kl:.2g}",
            f"{other.max_abs_logit_difference:.2g}",
        ]
    drawn = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(label)}</th>{drawn}</tr>'


def downloads(exports_dir: Path, name: str) -> str:
    """Links to the files of an export."""
    place = exports_dir / name
    files = [place] if place.is_file() else sorted(place.iterdir())
    shown = (f for f in files if f.is_file() and not f.is_symlink() and f.name[0] != ".")
    items = "".join(_link(file, exports_dir) for file in shown)
    return f'<ul class="files">{items}</ul>'


def _link(file: Path, exports_dir: Path) -> str:
    address = "/exports/" + quote(file.relative_to(exports_dir).as_posix())
    return (
        f'<li><a href="{escape(address)}" download="{escape(file.name)}">{escape(file.name)}</a>'
        f"<span>{gigabytes(file.stat().st_size)}</span></li>"
    )


def commands(place: Path, lines: Iterable[str]) -> str:
    """Where an export lies and what to run next."""
    lines = list(lines)
    shown = html.code("\n".join(lines), "command") if lines else ""
    return f'<p class="hint">It is in {escape(place)}.</p>{shown}'
