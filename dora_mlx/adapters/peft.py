"""PEFT's form of an adapter."""

from pathlib import Path

import mlx.nn as nn

from dora_mlx.adapters.stored import StoredAdapter
from dora_mlx.errors import UserError

PEFT_WEIGHTS_FILE = "adapter_model.safetensors"


def is_peft_folder(folder: Path) -> bool:
    """Whether ``folder`` has an adapter as PEFT saves it."""
    return (folder / PEFT_WEIGHTS_FILE).is_file()


def read_peft(folder: Path, model: nn.Module, problems: list[str]) -> StoredAdapter:
    """TODO"""
    raise UserError("later")
