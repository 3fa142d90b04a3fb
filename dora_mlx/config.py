"""Every option of a training, once.

The command-line flags, the saved ``config.json`` and the controls of the app derive from the
fields of ``TrainConfig``: their types, defaults, bounds and help texts.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dora_mlx.errors import UserError

# Models of fewer parameters need, and stand, a higher learning rate and no checkpointing.
SMALL_MODEL = 100_000_000


def knob(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    advanced: bool = False,
    on_resume: bool = False,
    metavar: str = "NAME",
) -> Any:
    """A field of an options dataclass: its default, help text (with units) and bounds.

    ``on_resume`` marks what a resumed run may change: its length and its habits, but nothing
    that the steps so far depend on. ``metavar`` stands in a help for a text, or each
    one of a list.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "advanced": advanced,
        "on_resume": on_resume,
        "metavar": metavar,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a training run depends on, apart from the name and place of its folder.

    Raises:
        UserError: On construction, listing every value that is out of bounds.
    """

    model: str = knob(
        "starter",
        "Alias, folder or Hub name (owner/name) of the model. `dora-mlx models` lists the aliases.",
    )
    data: str | None = knob(
        None,
        "File (JSONL, JSON, CSV, TSV, Parquet or text, also gzip), folder with train.* and maybe "
        "valid.* and test.*, or hub:owner/name. "
        "Default: the sample that comes with the starter model.",
        metavar="FILE",
    )
    valid_data: str | None = knob(
        None,
        "Data to validate on. Default: a part of the data, see --valid-fraction.",
        metavar="FILE",
    )
    valid_fraction: float = knob(
        0.1,
        "Share of the examples kept for validation when there is no validation file.",
        minimum=0,
        maximum=0.5,
        advanced=True,
    )
    data_form: Literal["auto", "messages", "sharegpt", "prompt-completion", "alpaca", "text"] = (
        knob("auto", "Form of the rows; auto finds it from the columns.", advanced=True)
    )
    columns: tuple[str, ...] = knob(
        (),
        "Columns under other names, the known name first: prompt=question completion=answer.",
        advanced=True,
        metavar="KNOWN=NAME",
    )
    skip_bad_rows: bool = knob(
        False, "Leave bad rows out and say how many, instead of stopping.", advanced=True
    )
    train_on: Literal["all", "last"] = knob(
        "all",
        "Answers of a conversation that are learned: all of them, or only the last.",
        advanced=True,
    )
    mask_prompt: bool = knob(
        True, "Train on the assistant's turns only, not on what the user says.", advanced=True
    )
    max_seq_length: int = knob(
        2048,
        "Longest example in tokens; see --long-examples.",
        minimum=8,
        advanced=True,
    )
    long_examples: Literal["truncate", "truncate-prompt", "drop", "split"] = knob(
        "truncate",
        "What happens to longer examples: cut at the end, cut at the start of the prompt, left "
        "out, or split into several.",
        advanced=True,
    )
    pack: bool = knob(
        False,
        "Put short examples end to end in rows of --max-seq-length tokens; their attention stays "
        "apart. --batch-size then counts rows.",
        advanced=True,
    )
    method: Literal["dora", "lora", "full"] = knob(
        "dora",
        "What is trained: DoRA (magnitude and direction), LoRA, or all weights of the model "
        "(full; a quantized model is dequantized first).",
    )
    init_adapter: str | None = knob(
        None,
        "Begin with the adapter in this folder, of dora-mlx, mlx-lm or PEFT. It says method, rank, "
        "alpha and layers.",
        advanced=True,
        metavar="DIR",
    )
    rank: int = knob(8, "Rank of the low-rank update.", minimum=1, maximum=1024)
    rank_overrides: tuple[str, ...] = knob(
        (),
        "Other ranks for some layers, by name or pattern: v_proj=16 mlp.*=4.",
        advanced=True,
        metavar="NAME=RANK",
    )
    alpha: float = knob(
        16.0, "Strength of the update: its scale is alpha / rank.", minimum=1e-3, maximum=1e4
    )
    rslora: bool = knob(
        False,
        "Scale the update by alpha / sqrt(rank), which keeps high ranks stable (rsLoRA).",
        advanced=True,
    )
    dropout: float = knob(
        0.0,
        "Probability of dropping an input of the low-rank path.",
        minimum=0,
        maximum=0.9,
        advanced=True,
    )
    target_modules: tuple[str, ...] = knob(
        (),
        "Linear layers to adapt, by name or pattern such as q_proj or mlp.*. "
        "Default: all of them in every adapted block.",
        advanced=True,
    )
    num_layers: int | None = knob(
        None,
        "Number of transformer blocks to adapt, counted from the last. Default: all.",
        minimum=1,
        advanced=True,
    )
    epochs: float = knob(
        3.0,
        "Passes over the training examples; --steps overrules it.",
        minimum=1e-3,
        on_resume=True,
    )
    steps: int | None = knob(
        None, "Number of optimizer steps. Default: see --epochs.", minimum=1, on_resume=True
    )
    batch_size: int = knob(4, "Examples in one forward pass.", minimum=1, maximum=4096)
    grad_accumulation_steps: int = knob(
        1, "Forward passes per optimizer step and worker.", minimum=1, maximum=4096, advanced=True
    )
    learning_rate: float | None = knob(
        None,
        "Peak learning rate. Default: 2e-4, or 2e-3 for models under 100 million parameters; "
        "a tenth of that for full fine-tuning.",
        minimum=0,
        maximum=1,
        on_resume=True,
    )
    optimizer: Literal["adamw", "adam", "adafactor", "lion", "muon", "sgd"] = knob(
        "adamw",
        "Optimizer. Lion and Muon want a lower learning rate, SGD a higher one.",
        advanced=True,
    )
    weight_decay: float = knob(
        0.0,
        "Share of every matrix removed per step, times the learning rate; magnitudes, norms and "
        "biases never decay.",
        minimum=0,
        maximum=1,
        advanced=True,
    )
    magnitude_lr_ratio: float = knob(
        1.0,
        "Learning rate of the DoRA magnitudes, as a multiple of --learning-rate.",
        minimum=0,
        maximum=1000,
        advanced=True,
    )
    lora_b_lr_ratio: float = knob(
        1.0,
        "Learning rate of the B matrices, as a multiple of --learning-rate (LoRA+ advises 16).",
        minimum=0,
        maximum=1000,
        advanced=True,
    )
    schedule: Literal["cosine", "linear", "constant"] = knob(
        "cosine", "Learning rate after the warm-up, down to a tenth of its peak.", advanced=True
    )
    warmup_steps: int = knob(
        10,
        "Optimizer steps in which the learning rate rises to its peak.",
        minimum=0,
        advanced=True,
    )
    grad_checkpoint: bool | None = knob(
        None,
        "Recompute every transformer block in the backward: far less memory for a third more "
        "time. Default: on where the run would take more than nine tenths of the memory without.",
        advanced=True,
        on_resume=True,
    )
    pause_ms: int = knob(
        0,
        "Rest of the GPU after every forward and backward pass, in milliseconds: 50 keeps a Mac "
        "usable, and its screen drawn, while it trains.",
        minimum=0,
        maximum=60_000,
        advanced=True,
        on_resume=True,
    )
    max_grad_norm: float = knob(
        1.0, "Gradients are scaled down to this global norm.", minimum=1e-6, advanced=True
    )
    steps_per_eval: int = knob(
        50,
        "Optimizer steps between two validations.",
        minimum=1,
        advanced=True,
        on_resume=True,
    )
    patience: int | None = knob(
        None,
        "Stop after this many validations in a row without a new best one. Default: never.",
        minimum=1,
        advanced=True,
        on_resume=True,
    )
    steps_per_save: int = knob(
        50,
        "Optimizer steps between two checkpoints.",
        minimum=1,
        advanced=True,
        on_resume=True,
    )
    keep_checkpoints: int = knob(
        2,
        "Number of checkpoints kept, the newest; `inspect` shows how the weights moved over them.",
        minimum=1,
        maximum=1000,
        advanced=True,
        on_resume=True,
    )
    seed: int = knob(0, "Seed of the split, the order, the adapter and the dropout.", minimum=0)

    def __post_init__(self) -> None:
        check_bounds(self)

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "configuration") -> "TrainConfig":
        """The options from JSON values; ``where`` names their source in messages.

        Raises:
            UserError: For every unknown name (with the nearest one) and every wrong type.
        """
        types = get_type_hints(cls)
        problems = [_unknown_option(name, list(types)) for name in values if name not in types]
        parsed: dict[str, Any] = {}
        for name, value in values.items():
            if name not in types:
                continue
            if not _fits(value, types[name]):
                problems.append(f"{name} cannot be {json.dumps(value)}")
            parsed[name] = tuple(value) if isinstance(value, list) else value
        if problems:
            raise UserError(f"{where}: {'; '.join(problems)}.")
        return cls(**parsed)

    @classmethod
    def from_file(cls, path: Path) -> "TrainConfig":
        """The options of a saved run's ``config.json``, or of a flat JSON file of options.

        Raises:
            UserError: If the file is missing or is no JSON object; or as ``from_dict`` does.
        """
        return cls.from_dict(read_options(path), where=str(path))


def read_options(path: Path) -> dict[str, Any]:
    """The option values of a run's ``config.json`` or of a flat JSON file.

    Raises:
        UserError: If the file is missing or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not a JSON configuration: {error}.") from error
    if isinstance(values, dict) and isinstance(values.get("options"), dict):
        values = values["options"]
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no options: expected a JSON object of names and values.")
    return values


def check_bounds(options: Any) -> None:
    """Raise one ``UserError`` that lists every option out of its bounds."""
    problems = []
    types = get_type_hints(type(options))
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        low, high = option.metadata["minimum"], option.metadata["maximum"]
        flag = flag_of(option.name)
        if not _fits(value, types[option.name]):
            problems.append(f"{flag} cannot be {value!r}")
        elif value is not None and low is not None and not value >= low:
            problems.append(f"{flag} must be at least {low:g} but is {value:g}")
        elif value is not None and high is not None and not value <= high:
            problems.append(f"{flag} must be at most {high:g} but is {value:g}")
    if problems:
        raise UserError("; ".join(problems) + ".")


def flag_of(name: str) -> str:
    """The command-line flag of an option: ``grad_accumulation_steps`` -> its dashed form."""
    return "--" + name.replace("_", "-")


def _unknown_option(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown option {name!r}{hint}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an option's type; numbers may lack their decimal point."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
    if origin is not None and type(None) in get_args(hint):
        return any(_fits(value, choice) for choice in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def plain_type(hint: Any) -> Any:
    """``int`` for ``int | None``; other hints as they are."""
    if get_origin(hint) is Union or type(None) in get_args(hint):
        return next(choice for choice in get_args(hint) if choice is not type(None))
    return hint
