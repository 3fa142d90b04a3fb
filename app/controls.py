"""One control for each option of a training, made from the option's own description.

A new option of ``TrainConfig`` appears in the form by itself: its type decides the kind of
control, its bounds and help text come along.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gradio as gr

from app.wording import OPTIONS, in_words_of_the_form, label_of
from dora_mlx import TrainConfig, UserError, plain_type

_TYPES = get_type_hints(TrainConfig)
# What the Data tab decides, and the form's own picker.
DATA_OPTIONS = (
    "data",
    "valid_data",
    "valid_fraction",
    "data_form",
    "columns",
    "skip_bad_rows",
    "train_on",
    "mask_prompt",
    "max_seq_length",
    "long_examples",
)
SHORT_FORM = ("rank", "learning_rate", "epochs", "steps")
ADVANCED = tuple(name for name in OPTIONS if name not in (*DATA_OPTIONS, *SHORT_FORM, "model"))
# The option that each group of the long form begins with, in the order of TrainConfig.
GROUPS = {
    "pack": "Method",
    "batch_size": "Batches",
    "optimizer": "Optimizer",
    "steps_per_eval": "Validation and checkpoints",
}
_AUTO = "automatic"
_SWITCH = {_AUTO: None, "on": True, "off": False}


def help_of(name: str) -> str:
    """The help text with the labels of the form in the place of flags."""
    return in_words_of_the_form(OPTIONS[name].metadata["help"])


def control(name: str, **settings: Any) -> Any:
    """The control of an option, showing its default; ``settings`` overrule what it is made of."""
    option, hint = OPTIONS[name], _TYPES[name]
    plain = plain_type(hint)
    common = {
        "label": label_of(name),
        "info": help_of(name),
        "value": shown(name, option.default),
        "elem_id": f"train-{name.replace('_', '-')}",
        **settings,
    }
    if hint is bool:
        return gr.Checkbox(**common)
    if plain is bool:
        return gr.Dropdown(list(_SWITCH), **common)
    if get_origin(plain) is Literal:
        return gr.Dropdown(list(get_args(plain)), **common)
    if hint in (int, float):
        # Without bounds: Gradio would refuse a number while it is still being typed, and
        # TrainConfig names all values out of bounds at once.
        return gr.Number(precision=0 if hint is int else None, step=_step(option.default), **common)
    # A number field has no way to be empty, so what may be left to the program is text.
    return gr.Textbox(placeholder="" if get_origin(plain) is tuple else _AUTO, **common)


def shown(name: str, value: Any) -> Any:
    """The value of an option as its control shows it."""
    plain = plain_type(_TYPES[name])
    if plain is bool and _TYPES[name] is not bool:
        return next(word for word, meaning in _SWITCH.items() if meaning is value)
    if plain in (int, float) and _TYPES[name] is not plain:
        return "" if value is None else f"{value:g}"
    return " ".join(value) if get_origin(plain) is tuple else value


def meant(name: str, value: Any) -> Any:
    """The value of an option from what its control gives.

    Raises:
        UserError: If an option that has to have a value was left empty.
    """
    hint, plain = _TYPES[name], plain_type(_TYPES[name])
    if get_origin(plain) is tuple:
        return tuple((value or "").split())
    if plain is bool and hint is not bool:
        if value not in _SWITCH:
            raise UserError(f"{label_of(name)} has to be {', '.join(_SWITCH)}, not {value!r}.")
        return _SWITCH[value]
    if value is None or value == "":
        if type(None) in get_args(hint):
            return None
        raise UserError(f"{label_of(name)} needs a value.")
    if plain not in (int, float):
        return value
    try:
        return plain(value)
    except (ValueError, OverflowError) as error:
        kind = "a whole number" if plain is int else "a number"
        raise UserError(f"{label_of(name)} has to be {kind} but is {value!r}.") from error


def config_from(values: Mapping[str, Any], data: Mapping[str, Any]) -> TrainConfig:
    """The options of a training from the form's values and what the Data tab decided.

    Raises:
        UserError: For every value that cannot be; the form's labels stand for the flags.
    """
    options: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        try:
            options[name] = meant(name, value)
        except UserError as error:
            problems.append(str(error).removesuffix("."))
    try:
        config = TrainConfig.from_dict({**options, **data}, where="The form")
    except UserError as error:
        problems.append(in_words_of_the_form(str(error)).removesuffix("."))
    if problems:
        raise UserError(f"{'; '.join(problems)}.")
    return config


def _step(default: Any) -> float:
    """What the arrows of a number field add."""
    return 1 if default >= 1 else 0.01
