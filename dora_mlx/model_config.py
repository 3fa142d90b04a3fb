"""``config.json`` and its neighbours, read once for everybody.

Transformers 5 keeps the RoPE base and scaling under ``rope_parameters``; before that they were
``rope_theta`` and ``rope_scaling``. Models come in both forms, and every program has a default of
its own for what it does not find, so a base that is read wrongly gives a wrong model and no error.
"""

import json
from pathlib import Path
from typing import Any

from dora_mlx.errors import UserError

Config = dict[str, Any]


def read_json(path: Path) -> Config:
    """The JSON object in ``path``, a file of a model folder.

    Raises:
        UserError: If the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is not a model folder: it has no {path.name}.") from error
    except ValueError as error:
        raise UserError(f"{path} is broken: {error}. Download or copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is broken: expected a JSON object. Download or copy it again.")
    return content


def read_json_if_there(path: Path) -> Config:
    """The JSON object in ``path``, or an empty one if there is no such file."""
    return read_json(path) if path.exists() else {}


def rope_parameters(config: Config) -> tuple[Config, Config]:
    """``rope_parameters`` of full-attention layers and, when they differ, of sliding ones."""
    parameters = config.get("rope_parameters") or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]
    if not by_layer:
        return parameters, {}
    full = parameters.get("full_attention") or by_layer[0]
    return full, parameters.get("sliding_attention") or {}


def rope_base(config: Config, name: str, parameters: Config, where: str) -> Any:
    """The base that the old form (``name``) and the new one agree on, or the one that is given.

    Raises:
        UserError: If they disagree; ``where`` names the file.
    """
    old, new = config.get(name), parameters.get("rope_theta")
    if old is not None and new is not None and old != new:
        raise UserError(
            f"{where} says {name} {old} but rope_parameters {new}: remove the wrong one."
        )
    return new if old is None else old


def rope_scaling(parameters: Config) -> Config | None:
    """``rope_scaling`` in mlx-lm's form, or ``None`` for plain RoPE."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return None
    rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
    # Half of mlx-lm's architectures read one name and half the other.
    return {**rest, "type": kind, "rope_type": kind}
