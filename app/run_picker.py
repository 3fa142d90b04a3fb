"""The choice of a trained run and of its states, the same on every tab that needs one."""

import re
from collections.abc import Sequence
from typing import Any

import gradio as gr

from app.connect import follow
from app.context import Context, Page
from app.views import html
from app.views.numbers import count
from dora_mlx import UserError, list_runs

_BEST = "best"


def run_dropdown(elem_id: str, **settings: Any) -> gr.Dropdown:
    """The control; ``keep_runs`` fills it."""
    return gr.Dropdown([], label="Run", elem_id=elem_id, **settings)


def state_dropdown(elem_id: str) -> gr.Dropdown:
    """The control of which of a run's adapters it is; ``states_of`` fills it."""
    return gr.Dropdown(
        [("Best adapter", _BEST)], value=_BEST, label="State", elem_id=elem_id, scale=2,
        min_width=160,
    )  # fmt: skip


def states_of(steps: Sequence[int]) -> Any:
    """An update of ``state_dropdown``: the best adapter, or one of the checkpoints."""
    kept = [(f"Step {step}", str(step)) for step in steps]
    return gr.update(choices=[("Best adapter", _BEST), *kept], value=_BEST)


def step_of(state: str | None) -> int | None:
    """The step of a chosen state, ``None`` for the best adapter.

    Raises:
        UserError: If a browser says what is no state.
    """
    if state == _BEST:
        return None
    if state is None or not re.fullmatch(r"[0-9]{1,12}", state):
        raise UserError("A run has no such state; choose one from the list.")
    return int(state)


def no_run(elem_id: str, what_for: str) -> gr.HTML:
    """What stands there as long as no run has an adapter."""
    return gr.HTML(
        html.empty("No trained run yet", what_for, "train", "Train one"), elem_id=elem_id
    )


def keep_runs(context: Context, page: Page, run: Any, nothing: Any, body: Any) -> None:
    """Keep the list current, on the run that the page looks at until another is picked here.

    Args:
        context: The server's.
        page: The page's.
        run: What ``run_dropdown`` made.
        nothing: What ``no_run`` made; hidden when there is a run.
        body: The rest of the tab; hidden until then.
    """
    shown = gr.State(())

    def refresh(before: Any, chosen: str | None, looked_at: str | None) -> Any:
        runs = [summary for summary in list_runs(context.runs_dir) if summary.has_adapter]
        names = [summary.name for summary in runs]
        # A new run is looked at before it has an adapter, and is wanted here once it has one.
        followed = looked_at if looked_at in names else None
        now = (followed, *((summary.name, summary.step) for summary in runs))
        if now == before:
            return [gr.skip()] * 4
        wanted = followed if not before or before[0] != followed else chosen
        value = next((name for name in (wanted, chosen, *names) if name in names), None)
        choices = [(_label(summary), summary.name) for summary in runs]
        return [
            now,
            gr.update(choices=choices, value=value),
            gr.update(visible=not runs),
            gr.update(visible=bool(runs)),
        ]

    follow(
        [page.clock.news(), page.run.change],
        refresh,
        [shown, run, page.run],
        [shown, run, nothing, body],
    )


def _label(run: Any) -> str:
    """A run in a list: its name, what it is, how good it became."""
    loss = "" if run.best_validation is None else f" · validation {run.best_validation:.3f}"
    return f"{run.name} · {run.method} · step {count(run.step)}{loss}"
