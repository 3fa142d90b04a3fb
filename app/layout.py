"""The frame of the page: header, tabs, and what they share."""

import gradio as gr

from app import machine
from app.clock import Clock
from app.connect import follow
from app.context import Context, Page
from app.tabs import changes, chat, data, export, train
from app.views import header
from app.views.run import status_of

_TABS = (
    ("Data", "data", data.build),
    ("Train", "train", train.build),
    ("Chat", "chat", chat.build),
    ("What changed", "changes", changes.build),
    ("Export", "export", export.build),
)


def build_page(context: Context) -> gr.Blocks:
    """The whole page of a server."""
    with gr.Blocks(title="dora_mlx", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        page = Page(blocks, Clock(), gr.State({}), gr.State(None))
        status = gr.HTML(_bar(context), elem_id="bar")
        shown = gr.State("")
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
            for label, name, build in _TABS:
                with gr.Tab(label, id=name, elem_id=f"tab-{name}"):
                    build(context, page)

        def refresh(before: str) -> tuple[object, str]:
            now = _bar(context)
            return (gr.skip() if now == before else now), now

        follow(page.clock.progress(), refresh, [shown], [status, shown])
        page.clock.start(blocks, context.now)
    return blocks


def _bar(context: Context) -> str:
    activity = context.trainings.status()
    if activity is None or not activity.alive:
        return header.bar(machine.description(), ("Idle", "plain"))
    look = context.watch.look(activity.run)
    step = ""
    if look.summary is not None and look.summary.is_active:
        step = f"step {look.summary.step:,} / {look.summary.steps:,}"
    return header.bar(machine.description(), status_of(look), step)
