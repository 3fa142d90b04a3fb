"""The tab Chat."""

import gradio as gr

from app.context import Context, Page
from app.views import html


def build(context: Context, page: Page) -> None:
    """Make the tab's components and wire them."""
    with gr.Column(elem_classes="card"):
        gr.HTML(html.heading("Chat"))
        gr.HTML(
            html.empty(
                "No trained run yet",
                "Train a run first, then compare its answers with those of the base model.",
            )
        )
