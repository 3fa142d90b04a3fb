"""The tab Train: a form for a new run, the run one looks at, and the list of all runs."""

import gradio as gr

from app.context import Context, Page
from app.tabs import train_form, train_runs, train_status


def build(context: Context, page: Page) -> None:
    """Make the tab's components and wire them."""
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=4, min_width=320, elem_classes="side"):
            train_form.build(context, page)
        with gr.Column(scale=7, min_width=320, elem_classes="side"):
            train_status.build(context, page)
    train_runs.build(context, page)
