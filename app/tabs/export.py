"""The tab Export: the trained model as a file for other programs, with what was measured."""

from typing import Any

import gradio as gr

from app import work
from app.connect import connect, follow
from app.context import Context, Page
from app.folders import open_folder
from app.run_picker import keep_runs, no_run, run_dropdown
from app.views import export as view
from app.views import html
from dora_mlx import EXPORT_FORMATS, UserError, find_run, read_export_report

_FORMATS = {entry.name: entry for entry in EXPORT_FORMATS}
_FIRST = "gguf"
_NO_RESULT = html.empty("Nothing exported yet", "Its size, and what is left of the training in it.")


def build(context: Context, page: Page) -> None:
    """Make the tab's components and wire them."""
    nothing = no_run("export-empty", "Train a run first, then write it as one model.")
    with gr.Row(elem_classes="columns", visible=False) as body:
        with gr.Column(scale=5, min_width=320, elem_classes="card"):
            form = _form()
        with gr.Column(scale=7, min_width=320, elem_classes="side"):
            with gr.Column(elem_classes="card"):
                gr.HTML(html.heading("Result", "measured on data it was not trained on"))
                job = gr.HTML(_NO_RESULT, elem_id="export-job")
                stop = gr.Button(
                    "Stop", variant="stop", size="sm", visible=False, elem_id="export-stop"
                )
            with gr.Column(elem_classes="card", visible=False) as written:
                gr.HTML(html.heading("Written before"))
                done = gr.Dropdown([], label="Export", elem_id="export-done")
                files = gr.HTML(elem_id="export-files")
                show = gr.Button("Open folder", size="sm", elem_id="export-open")
                problem = gr.HTML(elem_id="export-done-problem")
    _wire_form(context, page, form, nothing, body)
    _wire_result(context, page, form, job, stop, written, done, files, show, problem)


def _form() -> dict[str, Any]:
    first = _FORMATS[_FIRST]
    gr.HTML(html.heading("Export", "one model, the adapter merged into it"))
    run = run_dropdown("export-run")
    chosen = gr.Radio(
        list(_FORMATS),
        value=_FIRST,
        label="Format",
        info=first.summary,
        elem_id="export-format",
        elem_classes="segments",
    )
    quant = gr.Dropdown(
        _quants(first),
        value=first.quants[0].name,
        label="Precision",
        info=first.quants[0].help,
        elem_id="export-quant",
    )
    replace = gr.Checkbox(False, label="Replace it if it is there", elem_id="export-replace")
    size = gr.HTML(elem_id="export-size")
    problem = gr.HTML(elem_id="export-problem")
    start = gr.Button("Export", variant="primary", elem_id="export-start")
    return {
        "run": run, "format": chosen, "quant": quant, "replace": replace, "size": size,
        "problem": problem, "start": start,
    }  # fmt: skip


def _quants(chosen: Any) -> list[tuple[str, str]]:
    """The precisions of a format, the usual ones first."""
    ordered = sorted(chosen.quants, key=lambda quant: quant.advanced)
    return [(quant.name, quant.name) for quant in ordered]


def _wire_form(context: Context, page: Page, form: dict[str, Any], nothing: Any, body: Any) -> None:
    def choose_format(name: str) -> Any:
        chosen = _format(name)
        first = chosen.quants[0]
        return gr.update(info=chosen.summary), gr.update(
            choices=_quants(chosen),
            value=first.name,
            info=first.help,
            visible=len(chosen.quants) > 1,
        )

    def measure(run: str | None, name: str, quant: str) -> Any:
        if not run:
            return gr.skip(), gr.skip()
        folder = find_run(run, context.runs_dir)
        picked = _precision(name, quant)
        place = context.exports.place(folder.name, name, picked.name)
        found = context.data.call(work.size_of_export, folder, name, place, picked.name)
        return view.size(found.needed, found.free, place), gr.update(info=picked.help)

    def start(run: str | None, name: str, quant: str, replace: bool) -> None:
        if not run:
            raise UserError("Choose a run to export first.")
        folder = find_run(run, context.runs_dir)
        context.exports.start(folder, name, _format(name).quant(quant).name, bool(replace))

    asked = [form["run"], form["format"], form["quant"]]
    # Not "always_last" as the size is: two of these on one event would call each other for ever.
    connect(form["format"].change, choose_format, [form["format"]],
            [form["format"], form["quant"]], trigger_mode="multiple")  # fmt: skip
    connect([form["run"].change, form["quant"].change, form["format"].change], measure, asked,
            [form["size"], form["quant"]], notice=form["problem"],
            trigger_mode="always_last")  # fmt: skip
    connect(form["start"].click, start, [*asked, form["replace"]], [], notice=form["problem"])
    keep_runs(context, page, form["run"], nothing, body)


def _format(name: str) -> Any:
    if name not in _FORMATS:
        raise UserError(f"There is no export format {name!r}.")
    return _FORMATS[name]


def _precision(name: str, quant: str) -> Any:
    """The precision the form shows, or the first one of a format that was just chosen."""
    chosen = _format(name)
    known = quant in {entry.name for entry in chosen.quants}
    return chosen.quant(quant if known else None)


def _wire_result(
    context: Context, page: Page, form: dict[str, Any], job: Any, stop: Any, written: Any,
    done: Any, files: Any, show: Any, problem: Any,
) -> None:  # fmt: skip
    seen = gr.State("")

    def watch(before: str, chosen: str | None, run: str | None, name: str, quant: str) -> Any:
        """The job and the list of exports, when they or what is selected are other than before."""
        state = context.exports.job
        names = context.exports.names()
        precision = _precision(name, quant).name
        selected = context.exports.place(run, name, precision).name if run else ""
        now = f"{names} {selected} {state}"
        if now == before:
            return [gr.skip()] * 5
        newest = state.output.name if state is not None and state.report is not None else None
        ended = state is not None and not state.running and str(state) not in before
        value = newest if ended and newest in names else chosen if chosen in names else None
        return [
            now, view.job(state, selected) or _last_report(context, names, selected),
            gr.update(visible=state is not None and state.running),
            gr.update(visible=bool(names)),
            gr.update(choices=names, value=value or (names[0] if names else None)),
        ]  # fmt: skip

    def list_files(name: str | None) -> str:
        if not name or name not in context.exports.names():
            return ""
        place = context.exports_dir / name
        report = read_export_report(place)
        return view.downloads(context.exports_dir, name) + view.commands(
            place, [] if report is None else report.next_commands()
        )

    selecting = [form["run"], form["format"], form["quant"]]
    asked, shown = [seen, done, *selecting], [seen, job, stop, written, done]
    follow(page.clock.progress(), watch, asked, shown)
    # Not with "follow", for the same reason as the choice of a format.
    connect([control.change for control in selecting], watch, asked, shown,
            trigger_mode="multiple", queue=False)  # fmt: skip
    connect(stop.click, lambda: context.exports.stop(), [], [])
    connect(done.change, list_files, [done], [files])
    connect(show.click, lambda name: _open(context, name), [done], [], notice=problem)


def _last_report(context: Context, names: list[str], selected: str) -> str:
    """What was measured about the newest export, also by a former server."""
    found = read_export_report(context.exports_dir / names[0]) if names else None
    return _NO_RESULT if found is None else view.report(found, selected)


def _open(context: Context, name: str | None) -> None:
    if not name or name not in context.exports.names():
        raise UserError("There is no export to show yet.")
    place = context.exports_dir / name
    open_folder(context, place if place.is_dir() else place.parent)
