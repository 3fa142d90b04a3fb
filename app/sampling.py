"""The controls of how an answer is drawn, made from the fields of ``Sampling``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import gradio as gr

from dora_mlx import Sampling, UserError

_FIELDS = {option.name: option for option in dataclasses.fields(Sampling)}
# The bounds of the flags are wider than a slider can be of use for.
_SLIDERS = {
    "max_tokens": (1, 4096, 1),
    "temperature": (0, 2, 0.05),
    "top_p": (0.01, 1, 0.01),
    "top_k": (0, 200, 1),
    "min_p": (0, 1, 0.01),
    "repetition_penalty": (1, 2, 0.01),
}


def sampling_controls() -> dict[str, Any]:
    """One control for each field, showing its default."""
    with gr.Row(elem_classes="columns"):
        return {name: _control(name) for name in _FIELDS}


def sampling_from(values: Mapping[str, Any]) -> Sampling:
    """The sampling that the controls say.

    Raises:
        UserError: Listing every value that cannot be.
    """
    given = dict(values)
    seed = str(given["seed"] or "").strip()
    if seed and not seed.isdecimal():
        raise UserError(f"The seed has to be a whole number but is {seed!r}.")
    given["seed"] = int(seed) if seed else None
    given["stop"] = tuple(line for line in (given["stop"] or "").splitlines() if line)
    if missing := [_label(name) for name in _SLIDERS if given[name] is None]:
        raise UserError(f"{', '.join(missing)} must have a number.")
    for name in ("max_tokens", "top_k"):
        given[name] = int(given[name])
    return Sampling(**given)


def _label(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _control(name: str) -> Any:
    option = _FIELDS[name]
    common = {
        "label": _label(name),
        "info": option.metadata["help"],
        "elem_id": f"sampling-{name.replace('_', '-')}",
        "min_width": 240,
    }
    if name in _SLIDERS:
        low, high, step = _SLIDERS[name]
        return gr.Slider(low, high, option.default, step=step, buttons=[], **common)
    if name == "stop":
        common["info"] = "Texts that end the answer, one a line."
        return gr.Textbox(lines=2, max_lines=4, max_length=2000, **common)
    # A number field has no way to be empty.
    return gr.Textbox(placeholder="another each time", max_length=20, **common)
