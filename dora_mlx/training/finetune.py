"""The whole story of a training run on one page: options in, run folder out."""

import hashlib
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

import dora_mlx
from dora_mlx.adapters.adapter_folder import trainable_arrays
from dora_mlx.adapters.attach import AdapterSpec, attach
from dora_mlx.config import TrainConfig
from dora_mlx.data.batches import Batch, BatchStream, validation_batches
from dora_mlx.data.examples import ExampleSet, make_examples
from dora_mlx.data.records import find_data, read_records, split_records
from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_product import parameter_count
from dora_mlx.loading import LoadedModel, fingerprint, load_base
from dora_mlx.registry import resolve, samples_dir
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.checkpoints import check_space, load_newest_checkpoint
from dora_mlx.training.events import EventLog, Listener
from dora_mlx.training.loop import Trainer

SAMPLE = "pirate.jsonl"
# Models below this size need, and stand, a higher learning rate.
_SMALL_MODEL = 100_000_000


@dataclass(frozen=True)
class _Prepared:
    """A model ready to train and the data to do it with."""

    config: TrainConfig
    base: LoadedModel
    spec: AdapterSpec
    train: ExampleSet
    valid: ExampleSet
    total_parameters: int
    description: dict[str, Any]


def finetune(
    config: TrainConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train as ``config`` says and leave everything in ``folder``.

    Args:
        config: The options. With ``resume`` they must be those of the run.
        folder: Where the run lives. It appears when model and data are known to be good.
        resume: Go on from the newest checkpoint in ``folder``.
        overwrite: Replace a run that is there.
        listener: Called with every event as it is written.
        should_stop: Asked before every step; true ends the run with everything saved.

    Returns:
        ``completed`` or ``stopped``.

    Raises:
        UserError: For anything that is the person's to mend; nothing half-made stays behind.
    """
    if resume:
        prepared = _prepare(config)
        _check_unchanged(folder, prepared)
    else:
        with folder.creating(overwrite):
            prepared = _prepare(config)
            arrays = trainable_arrays(prepared.base.model).values()
            check_space(folder.path, sum(array.nbytes for array in arrays))
            folder.write_config(prepared.description)
    with folder.lock(), EventLog(folder.path, listener) as log:
        trainer = _trainer(prepared, folder, log)
        damaged: list[Path] = []
        if resume:
            damaged = _restore(trainer, folder)
        log.write("start", **_start_event(trainer, prepared, resume))
        for message in _warnings(prepared, trainer, damaged):
            log.write("warning", step=trainer.progress.step, message=message)
        try:
            reason = trainer.run(should_stop)
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            log.write("end", step=trainer.progress.step, reason=reason, message=str(error))
            raise
        log.write("end", step=trainer.progress.step, reason=reason)
    return reason


def _prepare(config: TrainConfig) -> _Prepared:
    """Read the data, load the model, attach the adapter and settle what was left open."""
    data = Path(config.data) if config.data is not None else samples_dir() / SAMPLE
    files = find_data(data, None if config.valid_data is None else Path(config.valid_data))
    records = read_records(files.train)
    if files.valid is None:
        records, valid_records = split_records(records, config.valid_fraction, config.seed)
    else:
        valid_records = read_records(files.valid)
    base = load_base(resolve(config.model))
    train, valid = (
        make_examples(part, base.tokenizer, config.max_seq_length, config.mask_prompt)
        for part in (records, valid_records)
    )
    if not train.examples:
        raise UserError(
            f"{files.train} has no example to train on: {len(records)} of its conversations are "
            "for training and none has an answer within --max-seq-length tokens."
        )
    total_parameters = parameter_count(base.model)
    mx.random.seed(config.seed)
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
    settled = _settle(config, len(train.examples), total_parameters < _SMALL_MODEL)
    description = {
        "options": settled.to_dict(),
        "model": {"path": str(base.path), "fingerprint": fingerprint(base.path)},
        "data": {
            "files": [str(path) for path in (files.train, files.valid) if path is not None],
            "fingerprint": _fingerprint_of_files(files.train, files.valid),
        },
        "versions": {
            "dora-mlx": dora_mlx.__version__,
            **{package: version(package) for package in ("mlx", "mlx-lm", "numpy")},
            "python": platform.python_version(),
        },
    }
    return _Prepared(settled, base, spec, train, valid, total_parameters, description)


def _settle(config: TrainConfig, examples: int, small_model: bool) -> TrainConfig:
    """The options with those filled in that depend on the model and the data."""
    steps = config.steps
    if steps is None:
        per_step = config.batch_size * config.grad_accumulation_steps
        steps = max(1, round(config.epochs * examples / per_step))
    rate = config.learning_rate
    if rate is None:
        rate = 1e-3 if small_model else 2e-4
        rate = rate / 10 if config.method == "full" else rate
    checkpoint = config.grad_checkpoint
    if checkpoint is None:
        checkpoint = not small_model
    return replace(config, steps=steps, learning_rate=rate, grad_checkpoint=checkpoint)


def _trainer(prepared: _Prepared, folder: RunFolder, log: EventLog) -> Trainer:
    config = prepared.config
    validation: list[Batch] = validation_batches(prepared.valid.examples, config.batch_size)
    batches = BatchStream(prepared.train.examples, config.batch_size, config.seed)
    return Trainer(
        prepared.base.model, prepared.spec, config, batches, validation, folder.path, log
    )


def _check_unchanged(folder: RunFolder, prepared: _Prepared) -> None:
    """Refuse to go on with another model or other data than the run began with."""
    before = folder.read_config()
    for part in ("model", "data"):
        if before[part]["fingerprint"] != prepared.description[part]["fingerprint"]:
            raise UserError(
                f"The {part} of run {folder.name} has changed since it began "
                f"({', '.join(before[part].get('files', [before[part].get('path')]))}). "
                "Put it back as it was, or start a new run."
            )


def _restore(trainer: Trainer, folder: RunFolder) -> list[Path]:
    """Go to the newest intact checkpoint; returns the damaged ones that were passed over."""
    found = load_newest_checkpoint(folder.checkpoints_dir)
    if found is None:
        # Interrupted before the first checkpoint: from the start is the next step.
        return []
    arrays, progress, damaged = found
    trainer.restore(arrays, progress)
    return damaged


def _start_event(trainer: Trainer, prepared: _Prepared, resume: bool) -> dict[str, Any]:
    trainable = sum(array.size for array in trainable_arrays(prepared.base.model).values())
    return {
        "resumed_from": trainer.progress.step if resume else None,
        "run": trainer.folder.name,
        "model": prepared.config.model,
        "method": prepared.config.method,
        "steps": trainer.steps,
        "train_examples": len(prepared.train.examples),
        "valid_examples": len(prepared.valid.examples),
        "trained_tokens": prepared.train.trained_tokens,
        "trainable_parameters": trainable,
        "total_parameters": prepared.total_parameters,
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
    }


def _warnings(prepared: _Prepared, trainer: Trainer, damaged: list[Path]) -> list[str]:
    messages = [
        f"the checkpoint {path.name} is damaged; going on from an older one" for path in damaged
    ]
    if dora_mlx.blas_notice and mx.default_device().type == mx.DeviceType.cpu:
        messages.append(dora_mlx.blas_notice)
    if trainer.loss_notice:
        messages.append(trainer.loss_notice)
    for kind, examples in (("training", prepared.train), ("validation", prepared.valid)):
        if examples.truncated:
            messages.append(
                f"{examples.truncated} {kind} examples are longer than --max-seq-length "
                f"{prepared.config.max_seq_length} and were cut at the end"
            )
        if examples.dropped:
            messages.append(
                f"{examples.dropped} {kind} examples have no answer within that length and are "
                "left out"
            )
    if not prepared.valid.examples:
        messages.append("there is nothing to validate on, so the last adapter counts as the best")
    return messages


def _fingerprint_of_files(*paths: Path | None) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path is not None:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
