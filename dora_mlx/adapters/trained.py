"""A trained model from its run folder: the base model with the adapter in it."""

from dataclasses import dataclass

from dora_mlx.adapters.adapter_folder import WEIGHTS_FILE, load_adapter
from dora_mlx.adapters.attach import AdapterSpec
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


def load_run(folder: RunFolder) -> TrainedModel:
    """Load the base model of a run and attach the run's best adapter.

    Raises:
        UserError: If the run has no adapter yet, or its base model is gone or has changed.
    """
    base, config = load_base_of(folder)
    spec = load_adapter(folder.path, base.model)
    base.model.eval()
    return TrainedModel(base, spec, config)


def load_base_of(folder: RunFolder) -> tuple[LoadedModel, TrainConfig]:
    """The base model of a run that has an adapter, without it, and the run's options.

    Raises:
        UserError: If the run has no adapter yet, or its base model is gone or has changed.
    """
    saved = folder.read_config()
    config = TrainConfig.from_dict(saved["options"], where=str(folder.config_file))
    if not (folder.path / WEIGHTS_FILE).is_file():
        raise UserError(
            f"The run {folder.name} has no adapter yet: it stopped before its first validation. "
            f"Go on with it by `dora-mlx train --resume {folder.name}`."
        )
    path = resolve(config.model)
    if fingerprint(path) != saved["model"]["fingerprint"]:
        raise UserError(
            f"The base model {config.model} in {path} is not the one that run {folder.name} was "
            "trained on, so its adapter does not belong to it. Put the old files back, or train "
            "again."
        )
    return load_base(path), config
