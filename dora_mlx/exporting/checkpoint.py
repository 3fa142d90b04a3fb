"""What the files of a base checkpoint say about it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_mlx.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        UserError: When the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.name} is missing from {path.parent}. Download the base model again."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}. Download it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object. Download it again.")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, or an empty one when there is no such file."""
    return read_json(path) if path.exists() else {}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency, kind of scaling, and the scaling's parameters."""

    base: float
    kind: str
    scaling: dict[str, Any] = field(default_factory=dict)


def read_rope(config: dict[str, Any]) -> Rope:
    """The rotary embedding of a ``config.json``, in its older form or in the newer one.

    The older form has ``rope_theta`` and ``rope_scaling``; Transformers 5 writes both into
    ``rope_parameters``.

    Raises:
        UserError: When the base frequency is missing or given twice. Every program has its own
            default for it, and a wrong one gives a wrong model without any error.
    """
    newer = config.get("rope_parameters") or {}
    bases = {float(c["rope_theta"]) for c in (config, newer) if c.get("rope_theta") is not None}
    if len(bases) != 1:
        found = "is missing from" if not bases else "has two different values in"
        raise UserError(
            f"rope_theta {found} the base model's config.json. "
            "Add the value from the model's own page and export again."
        )
    scaling = {k: v for k, v in (config.get("rope_scaling") or newer).items() if k != "rope_theta"}
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    return Rope(bases.pop(), kind, scaling)
