"""The form for a new run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app import work
from app.connect import connect, follow
from app.context import Context, Page
from app.controls import (
    ADVANCED,
    GROUPS,
    config_from,
    control,
    shown,
)
from app.presets import PRESETS
from app.views import html
from app.views import plan as plan_view
from app.views.numbers import count
from app.wording import OPTIONS
from dora_mlx import TrainConfig, UserError, cached_models, list_models, new_run

_START = "Start training"


def build(context: Context, page: Page) -> None:
    """Make the form and wire it."""
    with gr.Column(elem_classes="card", elem_id="train-form"):
        gr.HTML(html.heading("New run"))
        model = gr.Dropdown(
            value="starter",
            choices=model_choices(),
            label="Base model",
            info="Pick one, or write the Hub name (owner/name) of an MLX model.",
            allow_custom_value=True,
            elem_id="train-model",
        )
        name = gr.Textbox(
            label="Name", placeholder="from model and data", max_length=100, elem_id="train-name"
        )
        preset = gr.Radio(
            list(PRESETS),
            value="Balanced",
            label="Preset",
            elem_id="train-preset",
            elem_classes="segments",
        )
        controls = _short_form()
        with gr.Accordion("Advanced", open=False, elem_id="train-advanced") as advanced:
            controls |= _long_form()
        plan = gr.HTML(elem_id="train-plan")
        problem = gr.HTML(elem_id="train-problem")
        start = gr.Button(_START, variant="primary", elem_id="train-start")
    _wire_form(context, page, model, controls, preset, advanced, plan)
    _wire_start(context, page, model, name, controls, start, problem)
    connect(page.blocks.load, lambda: gr.update(choices=model_choices()), [], [model])


def model_choices() -> list[tuple[str, str]]:
    """Every model with a short name, those on this machine first: (what is shown, alias)."""
    there = set(cached_models())
    entries = sorted(list_models(), key=lambda entry: entry.alias not in there)
    return [
        (
            f"{entry.alias} · {count(entry.parameters).replace(' ', '')} · "
            + ("on this machine" if entry.alias in there else f"{entry.download_gb:g} GB to load")
            + f" · needs about {entry.train_memory_gb:g} GB",
            entry.alias,
        )
        for entry in entries
    ]


def checked_model(model: Any) -> str:
    """An alias or a Hub name, as a browser may name it.

    Raises:
        UserError: If it is neither: the browser cannot choose folders of this machine.
    """
    name = str(model or "").strip()
    if name.lower() in {entry.alias for entry in list_models()}:
        return name.lower()
    owner, slash, rest = name.partition("/")
    if not slash or not owner or not rest or "/" in rest or name.startswith((".", "~")):
        raise UserError(
            f"{name or 'Nothing'} is no model that can be chosen here: pick one of the list, or "
            "write a Hub name such as mlx-community/Qwen3-4B-4bit."
        )
    if Path(name).exists():
        raise UserError(
            f"{name} is a folder on this machine, and those are for the command line: "
            "`python -m dora_mlx.train --model FOLDER`."
        )
    return name


def _short_form() -> dict[str, Any]:
    """Rank, learning rate and length of the training."""
    made = {}
    with gr.Row(elem_classes="pair"):
        made["rank"] = control("rank", info="Size of the update.", min_width=120)
        made["learning_rate"] = control(
            "learning_rate", info="Empty: by the size of the model.", min_width=120
        )
    with gr.Row(elem_classes="pair"):
        made["epochs"] = control("epochs", info="Passes over the data.", min_width=120)
        made["steps"] = control("steps", info="Empty: from the epochs.", min_width=120)
    return made


def _long_form() -> dict[str, Any]:
    """Everything else, in groups, two side by side."""
    made: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    title = next(iter(GROUPS.values()))
    for name in ADVANCED:
        title = GROUPS.get(name, title)
        groups.setdefault(title, []).append(name)
    for title, names in groups.items():
        gr.HTML(f'<h3 class="group">{html.escape(title)}</h3>')
        for name in names:
            made[name] = control(name)
    return made


def _wire_form(
    context: Context,
    page: Page,
    model: Any,
    controls: dict[str, Any],
    preset: Any,
    advanced: Any,
    plan: Any,
) -> None:
    """Presets fill the form; the form decides the plan and says how much of it was changed."""
    names, components = list(controls), list(controls.values())

    def apply(choice: str) -> list[Any]:
        options = PRESETS.get(choice, {})
        return [shown(name, options.get(name, OPTIONS[name].default)) for name in names]

    def changed(*values: Any) -> dict[str, Any]:
        given = dict(zip(names, values, strict=True))
        other = [name for name in ADVANCED if given[name] != shown(name, OPTIONS[name].default)]
        return gr.update(label=f"Advanced · {len(other)} changed" if other else "Advanced")

    def estimate(data: dict[str, Any], model: str, *values: Any) -> str:
        try:
            config = _config(data, model, names, values)
            plan = context.data.call(work.plan, config)
        except UserError:
            # Start says what is wrong; a plan for what cannot be is of no use.
            return ""
        return plan_view.bar(plan)

    connect(preset.input, apply, [preset], components)
    # Not "always_last" as the plan is: two of these on one event would call each other for ever.
    connect([component.change for component in components], changed, components, [advanced],
            trigger_mode="multiple")  # fmt: skip
    connect(
        [page.blocks.load, page.data.change, model.change, *(c.change for c in components)],
        estimate,
        [page.data, model, *components],
        [plan],
        trigger_mode="always_last",
    )


def _wire_start(
    context: Context,
    page: Page,
    model: Any,
    name: Any,
    controls: dict[str, Any],
    start: Any,
    problem: Any,
) -> None:
    """The button that starts, and says what is missing as long as something is."""
    names, components = list(controls), list(controls.values())
    label = gr.State(_START)

    def begin(data: dict[str, Any], model: str, name: str, *values: Any) -> str:
        if missing := _missing(context, data):
            raise UserError(f"{missing}.")
        config = _config(data, model, names, values)
        stem = Path(data["data"]).stem if data.get("data") else "pirate"
        folder = new_run(
            (name or "").strip() or None, context.runs_dir, f"{Path(config.model).name}-{stem}"
        )
        context.trainings.start(config, folder.name)
        return folder.name

    def refresh(data: dict[str, Any], before: str) -> tuple[Any, Any]:
        now = _missing(context, data) or _START
        if now == before:
            return gr.skip(), gr.skip()
        return gr.update(value=now, interactive=now == _START), now

    connect(
        start.click,
        begin,
        [page.data, model, name, *components],
        [page.run],
        notice=problem,
    )
    follow(
        [page.clock.news(), page.data.change, page.run.change],
        refresh,
        [page.data, label],
        [start, label],
    )


def _missing(context: Context, data: dict[str, Any]) -> str:
    """What keeps a training from starting, short enough for a button."""
    activity = context.trainings.status()
    if activity is not None and activity.alive:
        return "A training is running"
    return "" if data else "Choose data first"


def _config(
    data: dict[str, Any], model: Any, names: Sequence[str], values: Sequence[Any]
) -> TrainConfig:
    given = dict(zip(names, values, strict=True))
    return config_from(given, {**data, "model": checked_model(model)})
