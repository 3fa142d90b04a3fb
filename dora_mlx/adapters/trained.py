"""A trained model from its run folder: the base model with the adapter in it."""

from dataclasses import dataclass
from pathlib import Path

from dora_mlx.adapters.adapter_folder import WEIGHTS_FILE
from dora_mlx.adapters.attach import AdapterSpec
from dora_mlx.adapters.reading import read_adapter
from dora_mlx.config import TrainConfig
from dora_mlx.errors import UserError
from dora_mlx.loading import LoadedModel, fingerprint, load_base
from dora_mlx.registry import resolve
from dora_mlx.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedModel:
    """A base model with a run's adapter attached, in evaluation mode."""

    base: LoadedModel
    spec: AdapterSpec
    config: TrainConfig


def load_run(folder: RunFolder, checkpoint: str | None = None) -> TrainedModel:
    """Load the base model of a run and attach an adapter of the run.

    Args:
        folder: The run.
        checkpoint: ``None`` for the best adapter, ``last`` or a step's number for a checkpoint's.

    Raises:
        UserError: If the run has no such adapter, or its base model is gone or has changed.
    """
    adapter = adapter_of(folder, checkpoint)
    base, config = load_base_of(folder)
    spec = read_adapter(adapter, base).attach_to(base.model)
    base.model.eval()
    return TrainedModel(base, spec, config)


def adapter_of(folder: RunFolder, checkpoint: str | None = None) -> Path:
    """The folder that holds an adapter of a run.

    Args:
        folder: The run.
        checkpoint: ``None`` for the best adapter, ``last`` or a step's number for a checkpoint's.

    Raises:
        UserError: If the run has no such adapter.
    """
    adapter = folder.adapter_dir(checkpoint)
    if not (adapter / WEIGHTS_FILE).is_file():
        raise UserError(
            f"The run {folder.name} has no adapter yet: it stopped before its first validation. "
            f"Go on with it by `dora-mlx train --resume {folder.name}`."
        )
    return adapter


def load_base_of(folder: RunFolder) -> tuple[LoadedModel, TrainConfig]:
    """The base model of a run, without its adapter, and the run's options.

    Raises:
        UserError: If the base model is gone or has changed.
    """
    saved = folder.read_config()
    config = TrainConfig.from_dict(saved["options"], where=str(folder.config_file))
    path = resolve(config.model)
    if fingerprint(path) != saved["model"]["fingerprint"]:
        raise UserError(
            f"The base model {config.model} in {path} is not the one that run {folder.name} was "
            "trained on, so its adapter does not belong to it. Put the old files back, or train "
            "again."
        )
    return load_base(path), config
