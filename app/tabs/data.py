"""The tab Data."""

from typing import Any

import gradio as gr

from app.connect import connect
from app.context import Context, Page
from app.views import html


def build(context: Context, page: Page) -> None:
    """Make the tab's components and wire them."""

    def use_sample() -> dict[str, Any]:
        return {"data": None}

    with gr.Column(elem_classes="card"):
        gr.HTML(html.heading("Data"))
        gr.HTML(
            html.empty(
                "No data yet",
                "Upload a chat file here; every mistake in it will be named with its line.",
            )
        )
        sample = gr.Button("Use the sample", elem_id="data-sample")
    connect(sample.click, use_sample, [], [page.data])
