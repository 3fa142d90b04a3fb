"""The choice of a trained run and its state, the same on every tab that needs one."""

from collections.abc import Iterable
from typing import Any

import gradio as gr

from app.connect import follow
from app.context import Context, Page
from app.views import html
from app.views.numbers import count
from dora_mlx import list_runs

# The state that is no step.
BEST = "best"


def run_dropdown(elem_id: str, **settings: Any) -> gr.Dropdown:
    """The control; ``keep_runs`` fills it."""
    return gr.Dropdown([], label="Run", elem_id=elem_id, **settings)


def state_dropdown(elem_id: str) -> gr.Dropdown:
    """Which of a run's adapters: its choices follow by ``states_of``."""
    return gr.Dropdown(
        states_of(()), value=BEST, label="State", elem_id=elem_id, scale=2, min_width=160
    )


def states_of(steps: Iterable[int]) -> list[tuple[str, str]]:
    """Label and value of the best adapter and of a checkpoint after each of the steps."""
    return [("Best adapter", BEST), *((f"Step {step}", str(step)) for step in steps)]


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
