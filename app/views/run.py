"""A run in words and figures."""

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from app.run_watch import RunLook
from app.views import chart, html
from app.views.numbers import count, duration, gigabytes
from app.wording import in_words_of_the_form
from dora_mlx import RunSummary

STATUS = {
    "training": ("Training", "info"),
    "paused": ("Paused", "warn"),
    "completed": ("Completed", "good"),
    "early_stopped": ("Stopped early", "good"),
    "stopped": ("Stopped", "plain"),
    "interrupted": ("Interrupted", "warn"),
    "ended": ("Interrupted", "warn"),
    "failed": ("Failed", "bad"),
}
_RECENT_STEPS = 20
_LOG_LINES = 14


def status_of(look: RunLook) -> tuple[str, str]:
    """A word for what a run is doing, and the kind of its pill."""
    if look.is_preparing:
        return "Preparing", "info"
    if look.summary is None:
        return "Not started", "bad"
    return ("Stopping", "warn") if look.is_stopping else STATUS[look.summary.status]


def status_card(look: RunLook, log: str = "") -> str:
    """Status, progress and figures of a run; ``log`` is what it wrote to its terminal."""
    word, kind = status_of(look)
    if look.summary is None:
        return _not_there_yet(look, word, kind, log)
    summary = look.summary
    steps = [event for event in look.events if event["event"] == "step"]
    validations = _validations(look.events)
    name = f'<strong class="run-name">{html.escape(look.name)}</strong>'
    what = f"{summary.model} · {summary.method.replace('dora', 'DoRA').replace('lora', 'LoRA')}"
    share = summary.step / max(1, summary.steps)
    facts = [
        f"step {summary.step:,} of {summary.steps:,}",
        f"{100 * share:.0f} %",
        f"{duration(_elapsed(look.events))} so far" if summary.is_active else
        f"took {duration(_elapsed(look.events))}",
    ]  # fmt: skip
    line = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    return (
        f'<div class="run-head">{html.pill(word, kind, live=True)}{name}'
        f'<span class="hint">{html.escape(what)}</span></div>'
        f"{html.progress(share, 'Progress of the training', kind)}"
        f'<div class="run-facts figures">{line}</div>'
        f"{html.tiles(_figures(summary, steps, validations))}"
        f"{_last_words(look)}"
    )


def loss_chart(look: RunLook) -> str:
    """The loss of the whole run: every step, smoothed, and on the validation examples."""
    if look.summary is None or not look.events:
        return html.empty("Nothing to draw yet", "The loss appears here with the first step.")
    raw = points(look.events, "step", "loss")
    validations = _validations(look.events)
    smooth = chart.smoothed(raw)
    marks = [
        {"x": event["step"], "kind": "saved"}
        for event in look.events
        if event["event"] == "checkpoint"
    ][-60:]
    trained = [point for point in validations if point[0] > 0]
    if trained:
        marks.append({"x": min(trained, key=lambda point: point[1])[0], "kind": "best"})
    last = f"{smooth[-1][1]:.3f}" if smooth else "none yet"
    return chart.chart(
        "loss-chart",
        f"Loss over {len(raw)} steps, smoothed value at the end {last}",
        [
            chart.line("every step", raw, 1, "raw"),
            chart.line("smoothed", smooth, 1),
            chart.line("validation", validations, 2, "dots"),
        ],
        steps=look.summary.steps,
        y=chart.value_range(raw, [*smooth[len(smooth) // 20 :], *validations]),
        marks=marks,
    )


def detail_charts(look: RunLook) -> str:
    """Learning rate, speed, memory and gradient norm, small."""
    if look.summary is None or not any(event["event"] == "step" for event in look.events):
        return ""
    memory = [(x, y / 1e9) for x, y in points(look.events, "step", "peak_memory_bytes")]
    speed = points(look.events, "step", "tokens_per_second")
    norm = points(look.events, "step", "grad_norm")
    drawn = [
        ("Learning rate", "", points(look.events, "step", "learning_rate"), None),
        ("Speed", "tokens/s", speed, chart.value_range(speed, [])),
        ("Peak memory", "GB", memory, None),
        ("Gradient norm", "", norm, chart.value_range(norm, [])),
    ]
    cells = "".join(
        f"<section><h3>{title}{f' <small>{unit}</small>' if unit else ''}</h3>"
        + chart.chart(
            f"{title.lower().replace(' ', '-')}-chart",
            f"{title} by step",
            [chart.line(title.lower(), values, 1)],
            steps=look.summary.steps,
            unit=unit,
            y=limits,
            small=True,
        )
        + "</section>"
        for title, unit, values, limits in drawn
    )
    return f'<div class="small-charts">{cells}</div>'


def points(events: Sequence[dict[str, Any]], kind: str, value: str) -> list[chart.Point]:
    """One value of the events of a kind, by step; what is not finite is left out."""
    return [
        (event["step"], event[value])
        for event in events
        if event["event"] == kind and event.get(value) is not None
    ]


def _validations(events: Sequence[dict[str, Any]]) -> list[chart.Point]:
    return points(events, "validation", "loss")


def _figures(
    summary: RunSummary, steps: Sequence[dict[str, Any]], validations: Sequence[chart.Point]
) -> list[tuple[str, str, str]]:
    """Label, value and unit of the figures under the progress bar."""
    none = html.NOTHING
    last = steps[-1] if steps else {}
    best = summary.best_validation
    recent = steps[-_RECENT_STEPS:]
    rate = sum(event["tokens_per_second"] for event in recent) / max(1, len(recent))
    left = _seconds_left(summary, recent)
    memory, unit = gigabytes(last["peak_memory_bytes"]).split() if last else (none, "")
    return [
        ("Train loss", none if summary.loss is None else f"{summary.loss:.3f}", "recent mean"),
        (
            "Validation loss",
            f"{validations[-1][1]:.3f}" if validations else none,
            f"best {best:.3f}" if best is not None else "",
        ),
        ("Speed", f"{rate:,.0f}" if recent else none, "tokens/s"),
        ("Peak memory", memory, unit),
        ("Trained tokens", count(last["tokens"]) if last else none, ""),
        ("Time left", none if left is None else duration(left), ""),
    ]


def _seconds_left(summary: RunSummary, recent: Sequence[dict[str, Any]]) -> float | None:
    if summary.status != "training" or len(recent) < 2:
        return None
    spans = sorted(b["time"] - a["time"] for a, b in pairwise(recent))
    # The median: a validation or a pause between two steps says nothing about the rest.
    return spans[len(spans) // 2] * (summary.steps - summary.step)


def _elapsed(events: Sequence[dict[str, Any]]) -> float:
    """Seconds of training, without the time between an end and a resume."""
    total, began, last = 0.0, None, 0.0
    for event in events:
        if event["event"] == "start":
            total += last - began if began is not None else 0.0
            began = event["time"]
        last = event["time"]
    return total + (last - began if began is not None else 0.0)


def _last_words(look: RunLook) -> str:
    """What a person should know about the run besides its figures."""
    notes = []
    if look.summary is not None and look.summary.status == "ended":
        text = "Its process ended without a word: it was killed, or the machine lost power. "
        notes.append(html.note(text + "Resume goes on from the last checkpoint.", "warn"))
    end = look.events[-1] if look.events and look.events[-1]["event"] == "end" else {}
    if end.get("message"):
        notes.append(html.problem(str(end["message"])))
    # The pill and the button say what a pause is.
    warnings = [
        str(event["message"])
        for event in look.events
        if event["event"] == "warning" and not event.get("pause")
    ]
    if warnings:
        shown = "\n".join(dict.fromkeys(warnings[-8:]))
        notes.append(html.note(in_words_of_the_form(shown), "warn"))
    return "".join(notes)


def _not_there_yet(look: RunLook, word: str, kind: str, log: str) -> str:
    head = (
        f'<div class="run-head">{html.pill(word, kind, live=True)}'
        f'<strong class="run-name">{html.escape(look.name)}</strong></div>'
    )
    error = look.activity.error if look.activity is not None else ""
    if error:
        return head + html.problem(error)
    if kind == "bad":
        lines = "\n".join(log.strip().splitlines()[-_LOG_LINES:])
        return (
            head
            + html.problem("The training ended before its first step. Its last words:")
            + html.code(lines or "(none)", "log of the training")
        )
    return head + (
        '<div class="waiting" aria-hidden="true"></div>'
        '<p class="hint">Reading the data and loading the model. A model that is not on this '
        "machine is downloaded first.</p>"
    )


def started_at(seconds: float) -> str:
    """A moment as ``24 Nov 07:35``."""
    return time.strftime("%d %b %H:%M", time.localtime(seconds))
