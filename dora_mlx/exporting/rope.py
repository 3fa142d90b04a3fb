"""The rotary embedding that a base checkpoint says it has."""

from dataclasses import dataclass, field
from typing import Any

from dora_mlx.errors import UserError
from dora_mlx.model_config import Config, rope_base, rope_parameters, rope_scaling


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency, kind of scaling, and the scaling's parameters."""

    base: float
    kind: str
    scaling: dict[str, Any] = field(default_factory=dict)


def read_rope(config: Config) -> Rope:
    """The rotary embedding of a ``config.json``, in its older form or in the newer one.

    Raises:
        UserError: If the base frequency is missing or given twice.
    """
    parameters, _ = rope_parameters(config)
    base = rope_base(config, "rope_theta", parameters, "the base model's config.json")
    if base is None:
        raise UserError(
            "rope_theta is missing from the base model's config.json. "
            "Add the value from the model's own page and export again."
        )
    scaling = dict(config.get("rope_scaling") or rope_scaling(parameters) or {})
    kinds = scaling.pop("rope_type", None), scaling.pop("type", None)
    scaling.pop("rope_theta", None)
    return Rope(float(base), kinds[0] or kinds[1] or "default", scaling)
