"""The list of all runs, and some of them compared."""

from collections.abc import Sequence

from app.run_watch import RunLook
from app.views import chart, html
from app.views.run import STATUS, points, started_at
from dora_mlx import RunSummary

MOST_COMPARED = 6


def table(runs: Sequence[RunSummary], selected: str | None, compared: Sequence[str]) -> str:
    """Every run in a line; its name opens it, its box puts it into the comparison."""
    if not runs:
        return html.empty(
            "No runs yet", "What you train is listed here and stays until you delete it."
        )
    head = "".join(
        f'<th scope="col" class="{name}">{title}</th>'
        for name, title in (
            ("compare", '<span class="unseen">Compare</span>'),
            ("name", "Run"),
            ("status", "Status"),
            ("figure", "Steps"),
            ("figure", "Train loss"),
            ("figure", "Best validation"),
            ("date", "Started"),
        )
    )
    rows = "".join(_row(run, run.name == selected, compared) for run in runs)
    return (
        '<div class="runs" tabindex="0" role="region" aria-label="All runs"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def comparison(looks: Sequence[RunLook]) -> str:
    """Smoothed training loss and validation loss of some runs, one above the other."""
    if not looks:
        return ""
    steps = max(look.summary.steps for look in looks if look.summary is not None)
    smooth, validation = [], []
    for color, look in enumerate(looks, start=1):
        losses = chart.smoothed(points(look.events, "step", "loss"))
        smooth.append(chart.line(look.name, losses[len(losses) // 50 :], color))
        validation.append(
            chart.line(look.name, points(look.events, "validation", "loss"), color, "dots")
        )
    names = ", ".join(look.name for look in looks)
    return (
        '<div class="compared"><section><h3>Training loss, smoothed</h3>'
        + chart.chart("compared-loss", f"Training loss of {names}", smooth, steps=steps)
        + "</section><section><h3>Validation loss</h3>"
        + chart.chart("compared-validation", f"Validation loss of {names}", validation, steps=steps)
        + "</section></div>"
    )


def _row(run: RunSummary, selected: bool, compared: Sequence[str]) -> str:
    name = html.escape(run.name)
    full = len(compared) >= MOST_COMPARED
    state = " checked" if run.name in compared else " disabled" if full else ""
    color = compared.index(run.name) + 1 if run.name in compared else 0
    key = f' style="--key:var(--series-{color})"' if color else ""
    word, kind = STATUS[run.status]
    figures = (
        f"{run.step:,} / {run.steps:,}",
        html.NOTHING if run.loss is None else f"{run.loss:.3f}",
        html.NOTHING if run.best_validation is None else f"{run.best_validation:.3f}",
    )
    cells = "".join(f'<td class="figure">{figure}</td>' for figure in figures)
    return (
        f'<tr class="{"selected" if selected else ""}"><td class="compare"{key}>'
        f'<input type="checkbox" data-compare="{name}" aria-label="Compare {name}"{state}></td>'
        f'<td class="name"><button type="button" data-open="{name}">{name}</button>'
        f"<small>{html.escape(run.model)} · {html.escape(run.method)}</small></td>"
        f'<td class="status">{html.pill(word, kind)}</td>{cells}'
        f'<td class="date">{started_at(run.created)}</td></tr>'
    )
