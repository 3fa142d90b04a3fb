"""The list of all runs, and their curves side by side."""

from typing import Any

import gradio as gr

from app.connect import connect, follow
from app.context import Context, Page
from app.views import html, runs
from dora_mlx import UserError, list_runs

# A click on a row says which; the server looks the name up among the runs there are. A new table
# is put into the old one, whose boxes would keep what was clicked in another row.
_ROWS = """
element.addEventListener('click', (event) => {
  const open = event.target.closest('[data-open]');
  if (open) trigger('click', {action: 'open', run: open.dataset.open});
});
element.addEventListener('change', (event) => {
  const box = event.target.closest('[data-compare]');
  if (box) trigger('click', {action: box.checked ? 'add' : 'remove', run: box.dataset.compare});
});
watch('value', () => {
  for (const box of element.querySelectorAll('[data-compare]')) box.checked = box.defaultChecked;
});
"""


def build(context: Context, page: Page) -> None:
    """Make the list and wire it."""
    with gr.Column(elem_classes="card", elem_id="runs-card"):
        gr.HTML(html.heading("All runs", "tick some to compare their curves"))
        problem = gr.HTML(elem_id="runs-problem")
        table = gr.HTML(runs.table([], None, []), js_on_load=_ROWS, elem_id="runs-table")
        comparison = gr.HTML(elem_id="runs-comparison")
    compared = gr.State([])
    shown = gr.State("")

    def refresh(run: str | None, compared: list[str], shown: str) -> tuple[Any, Any, Any]:
        listed = list_runs(context.runs_dir)
        names = {summary.name for summary in listed}
        compared = [name for name in compared if name in names]
        drawn = runs.table(listed, run, compared)
        looks = [context.watch.look(name) for name in compared]
        key = drawn + str([look.version for look in looks])
        if key == shown:
            return gr.skip(), gr.skip(), gr.skip()
        return drawn, runs.comparison(looks), key

    def act(
        event: gr.EventData, run: str | None, compared: list[str]
    ) -> tuple[str | None, list[str]]:
        name = str(event._data.get("run"))
        if name not in {summary.name for summary in list_runs(context.runs_dir)}:
            raise UserError("That run is gone; the list is up to date again in a second.")
        if event._data.get("action") == "open":
            return name, compared
        others = [other for other in compared if other != name]
        if event._data.get("action") == "remove":
            return run, others
        if len(others) >= runs.MOST_COMPARED:
            raise UserError(f"{runs.MOST_COMPARED} runs at most can be compared at once.")
        return run, [*others, name]

    # Of two quick clicks, the second would be dropped as long as the first is under way.
    connect(table.click, act, [page.run, compared], [page.run, compared], notice=problem,
            trigger_mode="multiple")  # fmt: skip
    follow(
        [page.clock.progress(), page.run.change, compared.change],
        refresh,
        [page.run, compared, shown],
        [table, comparison, shown],
    )
