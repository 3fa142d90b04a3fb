"""An adapter that was read from files, and whether it fits a model."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.adapters.attach import AdapterSpec, adapted_shapes, attach, full_shapes
from dora_mlx.errors import UserError

_BLOCK_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class StoredAdapter:
    """What is put into a model, and its arrays by their names in that model."""

    spec: AdapterSpec
    arrays: dict[str, mx.array]

    def attach_to(self, model: nn.Module) -> AdapterSpec:
        """Attach the adapter to ``model``, which it has to fit (``fit_problems``), trainable."""
        spec = self.spec
        attached = attach(
            model,
            spec.method,
            spec.rank,
            spec.alpha,
            spec.dropout,
            spec.keys,
            spec.num_layers,
            spec.rslora,
            spec.rank_overrides,
        )
        model.load_weights(list(self.arrays.items()), strict=False)
        return attached


def fit_problems(adapter: StoredAdapter, model: nn.Module) -> list[str]:
    """Everything that keeps an adapter from fitting ``model``, all blocks of a kind in one line.

    An empty list means that every array has its place and every place its array.
    """
    spec = adapter.spec
    problems = []
    if spec.num_layers > len(model.layers):
        problems.append(f"it adapts {spec.num_layers} blocks, the model has {len(model.layers)}")
    expected = full_shapes(model) if spec.method == "full" else adapted_shapes(model, spec)
    if not expected:
        problems.append("it adapts no layer that the model has")
    groups = defaultdict(list)
    for name in sorted(expected.keys() | adapter.arrays.keys()):
        if name not in adapter.arrays:
            groups["is missing"].append(name)
        elif name not in expected:
            groups["has no place in the model"].append(name)
        elif adapter.arrays[name].shape != expected[name]:
            found, wanted = (_times(s) for s in (adapter.arrays[name].shape, expected[name]))
            groups[f"is {found} and has to be {wanted}"].append(name)
    return problems + sorted(
        f"{merged} {what}" for what, names in groups.items() for merged in merge_names(names)
    )


def merge_names(names: list[str]) -> list[str]:
    """``model.layers.0.x, model.layers.1.x`` -> ``model.layers.0-1.x``, for messages."""
    blocks = defaultdict(list)
    for name in names:
        number = _BLOCK_NUMBER.search(name)
        key = _BLOCK_NUMBER.sub("*", name, count=1)
        blocks[key].append(int(number.group()) if number else None)
    return [
        key.replace("*", _ranges(sorted(n for n in numbers if n is not None)), 1)
        for key, numbers in blocks.items()
    ]


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays in a safetensors file, read at once: the file may be replaced afterwards.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        arrays = cast(dict[str, mx.array], mx.load(str(file)))
        mx.eval(arrays)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"Cannot read the adapter {file}: {error}") from error
    return arrays


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object in an adapter's configuration.

    Raises:
        UserError: If the file is missing or holds something else.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{file} is not an adapter's configuration: {error}.") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file} is not an adapter's configuration: it holds no JSON object.")
    return settings


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5] -> "0-2,5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
