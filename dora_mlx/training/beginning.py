"""Where a training begins: at a new adapter, at one made elsewhere, or at a checkpoint."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from dora_mlx.adapters.attach import AdapterSpec, attach
from dora_mlx.adapters.reading import read_adapter, read_spec
from dora_mlx.config import TrainConfig, flag_of
from dora_mlx.errors import UserError
from dora_mlx.loading import LoadedModel
from dora_mlx.run_folder import RunFolder
from dora_mlx.skeleton import ModelFacts, build_skeleton
from dora_mlx.training.checkpoints import load_newest_checkpoint
from dora_mlx.training.graph import nothing_evaluated
from dora_mlx.training.loop import Trainer


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


def as_begun(config: TrainConfig, facts: ModelFacts) -> TrainConfig:
    """The options with those that an adapter decides as it has them, before the model is there.

    Raises:
        UserError: As ``attach_as_told`` does.
    """
    if config.init_adapter is None:
        return config
    with nothing_evaluated():
        return _as_in(read_spec(Path(config.init_adapter), build_skeleton(facts)), config)


def changes_since(folder: RunFolder, now: dict[str, Any], accept: bool) -> list[str]:
    """What is not as it was when the run began, in sentences; ``now`` is its description.

    Raises:
        UserError: If there is any and ``accept`` is not set.
    """
    before = folder.read_config()
    changed = [
        f"The {part} of run {folder.name} has changed since it began "
        f"({', '.join(before[part].get('files', [before[part].get('path')]))})."
        for part in ("model", "data")
        if before[part]["fingerprint"] != now[part]["fingerprint"]
    ]
    if changed and not accept:
        raise UserError(
            f"{' '.join(changed)} Put it back as it was, start a new run, or go on with what is "
            "there now by --accept-changes."
        )
    return changed


def restore_newest(trainer: Trainer, folder: RunFolder) -> list[str]:
    """Go to the newest intact checkpoint; returns what there is to say about it.

    Raises:
        UserError: If the run is already past its last step, or no checkpoint is intact.
    """
    found, damaged = load_newest_checkpoint(folder.checkpoints_dir)
    if found is not None:
        trainer.restore(found)
    elif damaged:
        # From the start, its first validation would replace the adapter that is still there.
        raise UserError(
            f"Every checkpoint of the run {folder.name} is damaged "
            f"({', '.join(path.name for path in damaged)}), so it cannot go on. Its best adapter "
            f"stays: begin a new run with it by --init-adapter {folder.path}, or replace the run "
            "by --overwrite."
        )
    # Without any it was interrupted before the first: from the start is the next step.
    if trainer.progress.step > trainer.steps:
        raise UserError(
            f"The run {folder.name} has done {trainer.progress.step} steps already, so it cannot "
            f"end at step {trainer.steps}. An earlier adapter is used by --checkpoint STEP."
        )
    return [
        f"the checkpoint {path.name} is damaged; going on from an older one" for path in damaged
    ]


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
