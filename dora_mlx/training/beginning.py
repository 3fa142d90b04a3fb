"""Where a training begins: at a new adapter, or at one that was made elsewhere."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dora_mlx.adapters.attach import AdapterSpec, attach
from dora_mlx.adapters.reading import read_adapter
from dora_mlx.config import TrainConfig, flag_of
from dora_mlx.errors import UserError
from dora_mlx.loading import LoadedModel


def attach_as_told(config: TrainConfig, base: LoadedModel) -> tuple[TrainConfig, AdapterSpec]:
    """Attach a new adapter, or that of ``init_adapter``, to ``base``.

    Returns:
        The options, with those that the adapter decides as it has them; and what was attached.

    Raises:
        UserError: If the adapter does not fit the model, or an option contradicts it.
    """
    if config.init_adapter is not None:
        stored = read_adapter(Path(config.init_adapter), base)
        config = _as_in(stored.spec, config)
        stored = replace(stored, spec=replace(stored.spec, dropout=config.dropout))
        return config, stored.attach_to(base.model)
    spec = attach(
        base.model,
        config.method,
        config.rank,
        config.alpha,
        config.dropout,
        config.target_modules,
        config.num_layers,
        config.rslora,
        config.rank_overrides,
    )
    return config, spec


def _as_in(spec: AdapterSpec, config: TrainConfig) -> TrainConfig:
    """The options with those of the adapter; one that is set and says otherwise is an error."""
    if spec.method == "full":
        raise UserError(
            f"{config.init_adapter} holds all weights of a full fine-tuning, not an adapter. "
            "Export it by --format mlx and train on that as --model."
        )
    decided: dict[str, Any] = {
        "method": spec.method,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "target_modules": spec.keys,
        "num_layers": spec.num_layers,
        "rslora": spec.rslora,
        "rank_overrides": spec.rank_overrides,
    }
    defaults = {option.name: option.default for option in fields(TrainConfig)}
    problems = [
        f"{flag_of(name)} is {_shown(getattr(config, name))} but the adapter has {_shown(value)}"
        for name, value in decided.items()
        if getattr(config, name) not in (defaults[name], value)
    ]
    if problems:
        raise UserError(
            f"{'; '.join(problems)}. Leave these options to --init-adapter {config.init_adapter}."
        )
    return replace(config, **decided)


def _shown(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else f"{value}"
