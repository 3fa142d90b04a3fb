"""The tab Train."""

import gradio as gr

from app.context import Context, Page
from app.views import html


def build(context: Context, page: Page) -> None:
    """Make the tab's components and wire them."""
    with gr.Column(elem_classes="card"):
        gr.HTML(html.heading("Train"))
        gr.HTML(html.empty("Nothing to train yet", "Choose data first."))
