"""The run one looks at: what it does, its charts, how it was started, and what to do with it."""

import json
from typing import Any

import gradio as gr

from app.connect import connect, follow
from app.context import Context, Page
from app.folders import open_folder
from app.run_watch import RunLook
from app.views import html
from app.views import run as view
from dora_mlx import (
    TrainConfig,
    UserError,
    delete_run,
    find_run,
    list_runs,
    rename_run,
    train_command,
)

_NO_RUN = html.empty("No run yet", "Start one with the form; it goes on when this page is closed.")


def build(context: Context, page: Page) -> None:
    """Make the cards of a run and wire them."""
    with gr.Column(elem_classes="card", elem_id="run-card"):
        with gr.Row(elem_classes="toolbar"):
            choice = gr.Dropdown(
                [], label="Run", show_label=False, container=False, scale=4, min_width=180,
                elem_id="run-choice",
            )  # fmt: skip
            pause = gr.Button("Pause", visible=False, scale=0, min_width=90, elem_id="run-pause")
            stop = gr.Button(
                "Stop and save", variant="stop", visible=False, scale=0, min_width=130,
                elem_id="run-stop",
            )  # fmt: skip
            resume = gr.Button(
                "Resume", visible=False, scale=0, min_width=100, elem_id="run-resume"
            )
        problem = gr.HTML(elem_id="run-problem")
        status = gr.HTML(elem_id="run-status")
    with gr.Column(elem_classes="card", elem_id="loss-card", visible=False) as charts:
        gr.HTML(html.heading("Loss", "dashed: best validation · dotted: saved"))
        loss = gr.HTML(elem_id="run-loss")
        with gr.Accordion("Learning rate, speed, memory, gradient", open=False):
            details = gr.HTML(elem_id="run-details")
        with gr.Accordion("Command and configuration", open=False):
            command = gr.HTML(elem_id="run-command")
        with gr.Accordion("Rename, delete, open folder", open=False, elem_id="run-manage"):
            _build_management(context, page)
    seen = gr.State(None)

    def refresh(name: str | None, seen: Any) -> tuple[Any, ...]:
        look = _look(context, name)
        version = look.version if look is not None else ()
        if version == seen:
            return (gr.skip(),) * 9
        if look is None and list_runs(context.runs_dir):
            # The picker is about to choose one.
            return (gr.skip(),) * 9
        if look is None:
            hidden = gr.update(visible=False)
            return _NO_RUN, gr.update(visible=False), "", "", "", hidden, hidden, hidden, ()
        return (
            view.status_card(look, context.trainings.log() if look.summary is None else ""),
            gr.update(visible=look.summary is not None),
            view.loss_chart(look),
            view.detail_charts(look),
            _command(context, look),
            *_buttons(context, look),
            version,
        )

    follow(
        [page.clock.progress(), page.run.change],
        refresh,
        [page.run, seen],
        [status, charts, loss, details, command, pause, stop, resume, seen],
    )
    _wire_choice(context, page, choice)
    _wire_actions(context, page, pause, stop, resume, problem)


def _look(context: Context, name: str | None) -> RunLook | None:
    if name is None:
        return None
    try:
        return context.watch.look(name)
    except UserError:
        # Deleted or renamed meanwhile, maybe in another window.
        return None


def _command(context: Context, look: RunLook) -> str:
    if look.summary is None:
        return ""
    folder = look.summary.folder
    config = TrainConfig.from_file(folder.config_file)
    words = train_command(config, look.name, context.runs_dir)
    return (
        html.code(html.shell(["python", "-m", "dora_mlx.train", *words]), "command line")
        + '<p class="hint">The options of this run, as --config reads them:</p>'
        + html.code(json.dumps(config.to_dict(), indent=2), "configuration")
    )


def _buttons(context: Context, look: RunLook) -> tuple[Any, Any, Any]:
    """Pause, stop and resume, as far as each has a meaning now."""
    summary = look.summary
    active = summary is not None and summary.is_active and not look.is_stopping
    paused = summary is not None and summary.status == "paused"
    ended = look.activity is None or not look.activity.alive
    resumable = summary is not None and summary.can_resume and ended
    return (
        gr.update(visible=active, value="Continue" if paused else "Pause"),
        gr.update(
            visible=active or look.is_preparing,
            value="Cancel" if look.is_preparing else "Stop and save",
        ),
        gr.update(visible=resumable),
    )


def _wire_choice(context: Context, page: Page, choice: Any) -> None:
    """The picker of runs: it follows the page's run, and the page's run follows it."""
    listed = gr.State(None)

    def refresh(run: str | None, listed: Any) -> tuple[Any, Any, Any]:
        names = [summary.name for summary in list_runs(context.runs_dir)]
        activity = context.trainings.status()
        coming = activity.run if activity is not None and not activity.started else None
        if coming is not None and coming not in names:
            names.insert(0, coming)
        if run not in names:
            # A page that was just opened looks at what goes on, or else at the newest run.
            alive = activity.run if activity is not None and activity.alive else None
            run = alive if alive in names else next(iter(names), None)
        if (names, run) == listed:
            return gr.skip(), gr.skip(), gr.skip()
        return gr.update(choices=names, value=run), run, (names, run)

    follow(
        [page.clock.news(), page.run.change],
        refresh,
        [page.run, listed],
        [choice, page.run, listed],
        queue=True,
    )
    follow(choice.input, lambda name: name, [choice], [page.run], queue=True)


def _wire_actions(
    context: Context, page: Page, pause: Any, stop: Any, resume: Any, problem: Any
) -> None:
    def toggle_pause(name: str) -> None:
        if find_run(name, context.runs_dir).pause_file.exists():
            context.trainings.unpause(name)
        else:
            context.trainings.pause(name)

    connect(pause.click, toggle_pause, [page.run], notice=problem, queue=False)

    def stop_or_cancel(name: str) -> None:
        if context.watch.look(name).is_preparing:
            context.trainings.cancel()
        else:
            context.trainings.stop(name)

    connect(stop.click, stop_or_cancel, [page.run], notice=problem, queue=False)
    connect(resume.click, context.trainings.resume, [page.run], notice=problem, queue=False)


def _build_management(context: Context, page: Page) -> None:
    """Rename, delete and open the folder of the run one looks at."""
    problem = gr.HTML(elem_id="run-manage-problem")
    with gr.Row(elem_classes="toolbar"):
        new_name = gr.Textbox(
            placeholder="New name", show_label=False, container=False, max_length=100, scale=4,
            min_width=160, elem_id="run-new-name",
        )  # fmt: skip
        rename = gr.Button("Rename", scale=0, min_width=90, elem_id="run-rename")
        folder = gr.Button(
            "Open folder", scale=0, min_width=110, visible=context.is_local,
            elem_id="run-folder",
        )  # fmt: skip
        delete = gr.Button("Delete ...", scale=0, min_width=90, elem_id="run-delete")
    with gr.Row(visible=False, elem_classes="toolbar ask") as ask:
        question = gr.HTML(elem_id="run-delete-question")
        really = gr.Button(
            "Delete for good", variant="stop", scale=0, min_width=130, elem_id="run-delete-really"
        )
        keep = gr.Button("Keep it", scale=0, min_width=90, elem_id="run-keep")

    def to_new_name(run: str, wanted: str) -> tuple[str, str]:
        name = rename_run(run, (wanted or "").strip(), context.runs_dir).name
        context.trainings.forget(run)
        return name, ""

    def ask_first(run: str) -> tuple[Any, str]:
        find_run(run, context.runs_dir)
        text = f"Delete {run} with its adapter and all its checkpoints? There is no way back."
        return gr.update(visible=True), html.note(text, "warn")

    def delete_now(run: str) -> tuple[None, Any]:
        delete_run(run, context.runs_dir)
        context.trainings.forget(run)
        return None, gr.update(visible=False)

    connect(rename.click, to_new_name, [page.run, new_name], [page.run, new_name], notice=problem)
    connect(delete.click, ask_first, [page.run], [ask, question], notice=problem)
    connect(keep.click, lambda: gr.update(visible=False), [], [ask], queue=False)
    connect(really.click, delete_now, [page.run], [page.run, ask], notice=problem)
    connect(
        folder.click,
        lambda run: open_folder(context, find_run(run, context.runs_dir).path),
        [page.run],
        notice=problem,
    )
