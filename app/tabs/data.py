"""The tab Data: what there is to learn from, what is wrong with it, and what will be learned."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app import work
from app.connect import connect
from app.context import Context, Page
from app.controls import control, meant
from app.guard import UPLOAD_LIMIT
from app.last_data import recall, remember
from app.uploads import keep_upload, uploaded_file, uploads
from app.views import data as view
from app.views import html
from app.views.numbers import gigabytes
from dora_mlx import UserError, cached_models

# What a file may be called; the content decides what it is.
_KINDS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz"]
_ACCEPTED = (
    f"JSONL, JSON, CSV, TSV, Parquet or text, all also as .gz; up to {gigabytes(UPLOAD_LIMIT)}."
)
_SAMPLE = "sample"
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
# Options of TrainConfig that are decided here, besides the sources themselves.
_OPTIONS = (
    "max_seq_length",
    "long_examples",
    "valid_fraction",
    "train_on",
    "mask_prompt",
    "skip_bad_rows",
    "data_form",
)
_COLUMNS = ("prompt", "completion", "system")
_SAME = "as it is named"
_NOTHING = html.empty(
    "No data yet", "Upload a chat file or take the sample; every mistake is named with its line."
)
_NO_EXAMPLE = html.empty("No example yet", "Here you will see which tokens the model learns.")


def build(context: Context, page: Page) -> None:
    """Make the tab's components and wire them."""
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=320, elem_classes="side"):
            sources = _sources_card()
            with gr.Column(elem_classes="card"):
                gr.HTML(html.heading("Checks", "what is wrong, and where"))
                problem = gr.HTML(elem_id="data-problem")
                checks = gr.HTML(_NOTHING, elem_id="data-checks")
        with gr.Column(scale=7, min_width=320, elem_classes="side"), gr.Column(elem_classes="card"):
            examples = _examples_card()
    _wire(context, page, sources, examples, checks, problem)


def _sources_card() -> dict[str, Any]:
    """Where data comes from, and how it is read."""
    with gr.Column(elem_classes="card"):
        gr.HTML(html.heading("Training data", "chats, questions and answers, or text"))
        upload = gr.File(
            label="Upload a file",
            file_types=_KINDS,
            elem_id="data-upload",
            height=120,
            show_label=False,
        )
        gr.HTML(f'<p class="hint">{_ACCEPTED}</p>', elem_id="data-accepted")
        sample = gr.Button("Use the sample", elem_id="data-sample")
        chosen = gr.Dropdown(
            [],
            label="Data on this machine",
            info="What was uploaded before, or the sample.",
            elem_id="data-chosen",
        )
        with gr.Accordion("Other sources", open=False, elem_id="data-more"):
            hub = gr.Textbox(
                label="Data set of the Hugging Face Hub",
                placeholder="owner/name",
                max_length=200,
                elem_id="data-hub",
            )
            load = gr.Button("Load it", elem_id="data-load")
            valid = gr.Dropdown(
                [],
                label="Data to validate on",
                info="An uploaded file. By default a part of the training data.",
                elem_id="data-valid",
            )
        with gr.Accordion("Columns", open=False, elem_id="data-columns") as columns:
            gr.HTML('<p class="hint">Say which columns hold what, if no known name does.</p>')
            named = [
                gr.Dropdown([_SAME], value=_SAME, label=label, elem_id=f"data-column-{known}")
                for known, label in zip(_COLUMNS, ("Question", "Answer", "System"), strict=True)
            ]
        with gr.Accordion("How it is read", open=False, elem_id="data-options"):
            options = [control(name, elem_id=f"data-{name.replace('_', '-')}") for name in _OPTIONS]
            tokenizer = gr.Dropdown(
                cached_models(),
                value="starter",
                label="Tokens of",
                info="Whose tokens and chat template are shown here.",
                elem_id="data-tokenizer",
            )
    return {
        "upload": upload, "sample": sample, "chosen": chosen, "hub": hub, "load": load,
        "valid": valid, "columns": columns, "named": named, "options": options,
        "tokenizer": tokenizer,
    }  # fmt: skip


def _examples_card() -> dict[str, Any]:
    """The examples, one at a time, and their lengths."""
    with gr.Row(elem_classes="title-row"):
        gr.HTML(html.heading("What the model learns from", "only learned tokens carry loss"))
        previous = gr.Button("Previous", size="sm", interactive=False, elem_id="data-previous")
        following = gr.Button("Next", size="sm", interactive=False, elem_id="data-next")
    gr.HTML(view.legend())
    shown = gr.HTML(_NO_EXAMPLE, elem_id="data-example")
    lengths = gr.HTML(elem_id="data-lengths")
    return {"previous": previous, "next": following, "shown": shown, "lengths": lengths}


def _wire(
    context: Context,
    page: Page,
    sources: dict[str, Any],
    examples: dict[str, Any],
    checks: Any,
    problem: Any,
) -> None:
    asked = gr.State({})  # the options of what is shown
    at = gr.State(0)
    inputs = [sources["chosen"], sources["valid"], sources["tokenizer"]]
    inputs += [*sources["named"], *sources["options"]]
    results = [
        page.data, asked, at, checks, examples["shown"], examples["lengths"],
        examples["previous"], examples["next"], sources["columns"], *sources["named"],
    ]  # fmt: skip

    def take_upload(file: str | None) -> Any:
        if file is None:
            return [gr.skip()] * 3
        name = keep_upload(Path(file), context.uploads_dir)
        files = gr.update(choices=_files(context))
        return None, gr.update(choices=_choices(context), value=name), files

    def take_hub(name: str) -> Any:
        if not _HUB.fullmatch(name.strip()):
            raise UserError(f"“{name.strip()}” is no name of a data set: write owner/name.")
        source = f"hub:{name.strip()}"
        return gr.update(choices=[*_choices(context), (source, source)], value=source)

    def look(chosen: str | None, valid: str | None, tokenizer: str, *values: Any) -> Any:
        named, settings = values[: len(_COLUMNS)], values[len(_COLUMNS) :]
        if not chosen:
            return _nothing(_NOTHING)
        try:
            return _found(context, chosen, valid, tokenizer, named, settings)
        except UserError as error:
            # What was shown, and what Start would train on, is of other data.
            return _nothing(html.problem(str(error).replace(f"{context.uploads_dir}/", "")))

    connect(sources["upload"].upload, take_upload, [sources["upload"]],
            [sources["upload"], sources["chosen"], sources["valid"]], notice=problem)  # fmt: skip
    connect(sources["sample"].click, lambda: _SAMPLE, [], [sources["chosen"]])
    connect([sources["load"].click, sources["hub"].submit], take_hub, [sources["hub"]],
            [sources["chosen"]], notice=problem)  # fmt: skip
    asking = [component.input for component in (sources["tokenizer"], sources["valid"])]
    asking += [component.input for component in (*sources["named"], *sources["options"])]
    connect([sources["chosen"].change, *asking], look, inputs, results, notice=problem,
            trigger_mode="always_last", show_progress="minimal",
            show_progress_on=[checks])  # fmt: skip
    pages = [at, examples["shown"], examples["previous"], examples["next"]]
    for button, by in ((examples["previous"], -1), (examples["next"], 1)):
        connect(button.click, _turning(context, by), [asked, at], pages, notice=problem)
    connect(page.blocks.load, lambda: _restored(context, len(inputs)), [], inputs)


def _nothing(why: str) -> list[Any]:
    """The tab's results when there is nothing to show, and why."""
    return [{}, {}, 0, why, _NO_EXAMPLE, "", *[gr.update(interactive=False)] * 2,
            gr.skip(), *[gr.skip()] * len(_COLUMNS)]  # fmt: skip


def _found(
    context: Context,
    chosen: str,
    valid: str | None,
    tokenizer: str,
    named: Sequence[str],
    settings: Sequence[Any],
) -> list[Any]:
    """The tab's results for what was chosen.

    Raises:
        UserError: If the model or the data cannot be read.
    """
    if tokenizer not in cached_models():
        raise UserError(f"{tokenizer} is no model on this machine; choose another for “Tokens of”.")
    options = _options(context, chosen, valid, named, settings)
    seen = {**options, "model": tokenizer}
    overview = context.data.call(work.look_at_data, seen)
    usable = overview.train.examples and (not overview.bad_rows or options["skip_bad_rows"])
    more = overview.train.examples > 1
    first = _NO_EXAMPLE
    if overview.train.examples:
        spans = context.data.call(work.example_of_data, seen, 0)
        first = view.example(spans, 1, overview.train.examples)
    choices = [_SAME, *overview.columns]
    remember(context.last_data_file, [chosen, valid, tokenizer, *named, *settings])
    return [
        options if usable else {}, seen, 0, view.checks(overview, options["skip_bad_rows"]),
        first, view.histogram(overview.bars), gr.update(interactive=False),
        gr.update(interactive=more),
        gr.update(open=bool(options["columns"]) or not overview.train.examples),
        *[gr.update(choices=choices, value=n if n in choices else _SAME) for n in named],
    ]  # fmt: skip


def _turning(context: Context, by: int) -> Any:
    """A handler that shows the example ``by`` places further on."""

    def show(seen: dict[str, Any], number: int) -> Any:
        overview = context.data.call(work.look_at_data, seen)
        number = min(max(0, number + by), overview.train.examples - 1)
        spans = context.data.call(work.example_of_data, seen, number)
        return (
            number,
            view.example(spans, number + 1, overview.train.examples),
            gr.update(interactive=number > 0),
            gr.update(interactive=number + 1 < overview.train.examples),
        )

    return show


def _restored(context: Context, count: int) -> list[Any]:
    """The tab's controls as they were left, with the files there are now."""
    choices, files, models = _choices(context), _files(context), cached_models()
    kept = recall(context.last_data_file, count)
    if kept is None or kept[0] not in {value for _, value in choices}:
        lists = [gr.update(choices=choices), gr.update(choices=files)]
        return [*lists, *[gr.skip()] * (count - len(lists))]
    chosen, valid, tokenizer, *rest = kept
    named, settings = rest[: len(_COLUMNS)], rest[len(_COLUMNS) :]
    return [
        gr.update(choices=choices, value=chosen),
        gr.update(choices=files, value=valid if valid in dict(files) else None),
        gr.update(choices=models, value=tokenizer if tokenizer in models else "starter"),
        *[gr.update(choices=list(dict.fromkeys([_SAME, name])), value=name) for name in named],
        *settings,
    ]


def _choices(context: Context) -> list[tuple[str, str]]:
    return [*_files(context), ("Sample: talk like a pirate", _SAMPLE)]


def _files(context: Context) -> list[tuple[str, str]]:
    return [(name, name) for name in uploads(context.uploads_dir)]


def _options(
    context: Context,
    chosen: str,
    valid: str | None,
    named: Sequence[str],
    settings: Sequence[Any],
) -> dict[str, Any]:
    """Options of ``TrainConfig`` from what the tab's controls say."""

    def place(name: str) -> str | None:
        if name == _SAMPLE:
            return None
        if name.startswith("hub:") and _HUB.fullmatch(name.removeprefix("hub:")):
            return name
        return str(uploaded_file(context.uploads_dir, name))

    columns = tuple(
        f"{known}={name}" for known, name in zip(_COLUMNS, named, strict=True) if name != _SAME
    )
    options = {name: meant(name, value) for name, value in zip(_OPTIONS, settings, strict=True)}
    valid_data = {"valid_data": place(valid)} if valid else {}
    return {"data": place(chosen), "columns": columns, **valid_data, **options}
