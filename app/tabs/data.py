"""The tab Data."""

import gradio as gr

from app.context import Context, Page
from app.views import html


def build(context: Context, page: Page) -> None:
    """Make the tab's components and wire them."""
    with gr.Column(elem_classes="card"):
        gr.HTML(html.heading("Data"))
        gr.HTML(
            html.empty(
                "No data yet",
                "Upload a chat file here; every mistake in it will be named with its line.",
            )
        )
