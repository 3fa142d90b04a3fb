"""What the library says, in the words of the app: labels of the form instead of flags."""

import dataclasses
import re
from typing import Any

from dora_mlx import TrainConfig

OPTIONS: dict[str, dataclasses.Field[Any]] = {
    option.name: option for option in dataclasses.fields(TrainConfig)
}
_LABELS = {
    "rslora": "rsLoRA",
    "lora_b_lr_ratio": "Rate of B",
    "magnitude_lr_ratio": "Rate of magnitudes",
    "grad_accumulation_steps": "Gradient accumulation",
    "grad_checkpoint": "Gradient checkpointing",
    "max_grad_norm": "Largest gradient norm",
    "steps_per_eval": "Steps between validations",
    "steps_per_save": "Steps between checkpoints",
    "max_seq_length": "Longest example",
}
# Flags of an export; a value follows each of them.
_EXPORT_WORDS = {"format": "format", "quant": "precision"}
_FLAG = re.compile(r"--([a-z][a-z-]+)")
_TWO_FLAGS = re.compile(r"(--format \S+) (?=--quant )")


def label_of(name: str) -> str:
    """``weight_decay`` -> ``Weight decay``."""
    return _LABELS.get(name) or name.replace("_", " ").capitalize()


def in_words_of_the_form(text: str) -> str:
    """A sentence with the labels of options in the place of their flags."""
    return _FLAG.sub(lambda found: _labelled(found[1]), _TWO_FLAGS.sub(r"\1, ", text))


def _labelled(flag: str) -> str:
    name = flag.replace("-", "_")
    if name in OPTIONS:
        return f"“{label_of(name)}”"
    return _EXPORT_WORDS.get(name, f"--{flag}")
