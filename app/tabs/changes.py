"""The tab What changed: how far a run moved each weight, in magnitude and in direction."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from app import work
from app.connect import connect
from app.context import Context, Page
from app.run_picker import keep_runs, no_run, run_dropdown, state_dropdown, states_of, step_of
from app.views import changes as view
from app.views import html
from dora_mlx import UserError, find_run

_UNMEASURED = html.empty(
    "Not measured yet",
    "You will see how far each weight was stretched (magnitude) and turned (direction). Measuring "
    "reads every trained weight once: seconds for a small model.",
)


def build(context: Context, page: Page) -> None:
    """Make the tab's components and wire them."""
    nothing = no_run(
        "changes-empty", "Train a run first, then see which of its layers moved, and how."
    )
    with gr.Column(elem_classes="card", visible=False) as body:
        gr.HTML(html.heading("What changed", "magnitude and direction of every trained weight"))
        with gr.Row(elem_classes="columns ask"):
            run = run_dropdown("changes-run", scale=4, min_width=220)
            state = state_dropdown("changes-state")
            measure = gr.Button(
                "Measure", variant="primary", scale=1, min_width=110, elem_id="changes-measure"
            )
        problem = gr.HTML(elem_id="changes-problem")
        result = gr.HTML(_UNMEASURED, elem_id="changes-result")
    _wire(context, page, run, state, measure, problem, result, nothing, body)


def _wire(
    context: Context, page: Page, run: Any, state: Any, measure: Any, problem: Any, result: Any,
    nothing: Any, body: Any,
) -> None:  # fmt: skip
    def choose(name: str | None) -> Any:
        if not name:
            return gr.skip(), gr.skip()
        steps, _ = context.data.call(work.talk_about, find_run(name, context.runs_dir))
        return states_of(steps), _UNMEASURED

    def look(name: str | None, chosen: str) -> Iterator[str]:
        if not name:
            raise UserError("Choose a run first.")
        folder = find_run(name, context.runs_dir)
        checkpoint = step_of(chosen)
        yield html.progress(0.0, "Measuring")
        try:
            for kind, value in context.inspection.stream(work.inspect, folder, checkpoint):
                if kind == "progress":
                    done, total = value
                    yield html.progress(done / max(1, total), "Measuring")
                else:
                    yield (
                        view.summary(value) + view.heat_maps(value) + view.largest(value.weights)
                    )
        finally:
            # It holds a whole model, which others may need the memory of.
            context.inspection.stop()

    keep_runs(context, page, run, nothing, body)
    connect(run.change, choose, [run], [state, result], notice=problem)
    connect(measure.click, look, [run, state], [result], notice=problem, concurrency_limit=1)
