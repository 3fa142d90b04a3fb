"""The whole story of a training run on one page: options in, run folder out."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import dora_mlx
from dora_mlx.adapters.adapter_folder import trainable_arrays
from dora_mlx.adapters.attach import AdapterSpec
from dora_mlx.atomic import file_problem
from dora_mlx.config import SMALL_MODEL, TrainConfig
from dora_mlx.data.batches import Batch, BatchStream, make_batch, validation_batches
from dora_mlx.data.examples import Examples
from dora_mlx.data.preparation import PreparedData, prepare, training_source
from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_weight import parameter_count
from dora_mlx.loading import LoadedModel, fingerprint, load_base, load_tokenizer
from dora_mlx.registry import resolve
from dora_mlx.run_folder import DEFAULT_RUNS_DIR, RunFolder, checkpoints_newest_first
from dora_mlx.skeleton import find_facts
from dora_mlx.training.beginning import attach_as_told, changes_since, restore_newest
from dora_mlx.training.checkpoints import check_space
from dora_mlx.training.device_limits import memory_held_to
from dora_mlx.training.events import EventLog, Listener
from dora_mlx.training.loop import Trainer
from dora_mlx.training.memory_figures import MemoryPlan
from dora_mlx.training.memory_plan import MemoryWatch, fit, gigabytes, plan_for
from dora_mlx.training.notices import data_notices
from dora_mlx.training.packed_attention import why_not_packed
from dora_mlx.training.workers import Workers

_PAUSE_POLL_S = 0.2


@dataclass(frozen=True)
class _Prepared:
    """A model ready to train and the data to do it with."""

    config: TrainConfig
    base: LoadedModel
    spec: AdapterSpec
    data: PreparedData
    batches: BatchStream
    packing_refused: str | None
    total_parameters: int
    description: dict[str, Any]
    plan: MemoryPlan
    chosen: dict[str, Any]
    memory_before: int


def finetune(
    config: TrainConfig,
    folder: RunFolder,
    *,
    resume: bool = False,
    overwrite: bool = False,
    fit: bool = False,
    ignore_memory: bool = False,
    accept_changes: bool = False,
    listener: Listener | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train as ``config`` says and leave everything in ``folder``.

    Args:
        config: The options. With ``resume`` they must be those of the run, but for the ones
            marked ``on_resume``.
        folder: Where the run lives. It appears when model and data are known to be good.
        resume: Go on from the newest checkpoint in ``folder``.
        overwrite: Replace a run that is there.
        fit: Change batch size, accumulation, checkpointing and window so that the run fits into
            memory; what was changed is in the ``start`` event.
        ignore_memory: Start although the plan says that the run does not fit.
        accept_changes: Resume also if the model's or the data's files are not what they were.
        listener: Called with every event as it is written.
        should_stop: Asked before every step; true ends the run with everything saved.

    Another process stops the run by making its ``stop`` file, and makes it wait by its ``pause``
    file. Started by ``mlx.launch`` it trains together with the other workers, of which the first
    has the folder and the listener.

    Returns:
        ``completed``, ``stopped`` or ``early_stopped``.

    Raises:
        UserError: For anything that is the person's to mend; nothing half-made stays behind.
    """
    workers = Workers()
    with ExitStack() as held:
        if resume:
            if workers.leads:
                held.enter_context(folder.lock())
                # Whoever made it meant the process that trained before.
                folder.stop_file.unlink(missing_ok=True)
            saved = workers.leads and bool(checkpoints_newest_first(folder.checkpoints_dir))
            # It has fitted before, or someone wanted it all the same.
            prepared = _prepare(config, workers, ignore_memory=True, saved=workers.share(saved))
            changes: list[str] = []
            if workers.leads:
                changes = changes_since(folder, prepared.description, accept_changes)
        else:
            with folder.creating(overwrite) if workers.leads else nullcontext():
                prepared = _prepare(config, workers, fit, ignore_memory)
                if workers.leads:
                    check_space(folder.path, _trained_bytes(prepared), config.keep_checkpoints)
                    folder.write_config(prepared.description)
            changes = []
            if workers.leads:
                held.enter_context(folder.lock())
        held.enter_context(_saying_how_to_go_on(folder))
        log = held.enter_context(EventLog(folder.path if workers.leads else None, listener))
        before, plan = prepared.memory_before, prepared.plan
        held.enter_context(memory_held_to(before + plan.peak, before + plan.counted))
        trainer = _trainer(prepared, folder, log, workers)
        if resume and workers.leads:
            changes += restore_newest(trainer, folder)
            folder.write_config(prepared.description)
        trainer.agree()
        return _train(trainer, prepared, resume, changes, should_stop)


def _trained_bytes(prepared: _Prepared) -> int:
    return sum(array.nbytes for array in trainable_arrays(prepared.base.model).values())


def _train(
    trainer: Trainer,
    prepared: _Prepared,
    resume: bool,
    notices: list[str],
    should_stop: Callable[[], bool],
) -> str:
    """Run the trainer between a ``start`` and an ``end`` event."""
    log = trainer.log
    calibrated = _calibrate(trainer, prepared)
    log.watch(MemoryWatch(log, max(prepared.plan.peak, calibrated or 0), prepared.memory_before))
    log.write("start", **_start_event(trainer, prepared, resume, calibrated))
    for message in [*notices, *_warnings(prepared, trainer)]:
        log.write("warning", step=trainer.progress.step, message=message)
    try:
        reason = trainer.run(lambda: _told_to_stop(trainer, should_stop))
    except BaseException as error:
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        # Nor can this be written where the disk is what failed.
        with suppress(OSError):
            log.write("end", step=trainer.progress.step, reason=reason, message=str(error))
        raise
    log.write("end", step=trainer.progress.step, reason=reason)
    return reason


@contextmanager
def _saying_how_to_go_on(folder: RunFolder) -> Iterator[None]:
    """Let a run that the disk has ended say so, and how to resume it."""
    try:
        yield
    except OSError as error:
        problem = file_problem(error)
        if problem is None:
            raise
        runs = folder.path.parent
        where = "" if runs == Path(DEFAULT_RUNS_DIR) else f" --runs-dir {runs}"
        kept = checkpoints_newest_first(folder.checkpoints_dir)
        what = "everything up to the last checkpoint is kept" if kept else "no step was saved yet"
        raise UserError(
            f"{problem}. Mend that and go on by --resume {folder.name}{where}: {what}."
        ) from error


def _told_to_stop(trainer: Trainer, should_stop: Callable[[], bool]) -> bool:
    """Whether to stop now; waits as long as the run is paused."""
    workers, folder = trainer.workers, RunFolder(trainer.folder)
    paused = False
    while True:
        stop, pause = workers.any(
            should_stop() or (workers.leads and _taken(folder.stop_file)),
            workers.leads and folder.pause_file.exists(),
        )
        if stop or not pause:
            return stop
        if not paused:
            # Nothing is lost if a paused run is never continued.
            trainer.save()
            trainer.log.write(
                "warning",
                step=trainer.progress.step,
                message=f"paused until {folder.pause_file} is removed",
                pause=True,
            )
        paused = True
        time.sleep(_PAUSE_POLL_S)


def _taken(request: Path) -> bool:
    """Whether there is a request; it is obeyed once, so that the run can be resumed."""
    there = request.exists()
    request.unlink(missing_ok=True)
    return there


def _prepare(
    config: TrainConfig,
    workers: Workers,
    fit_it: bool = False,
    ignore_memory: bool = False,
    saved: bool = False,
) -> _Prepared:
    """Read the data, load the model, attach the adapter and settle what was left open.

    ``saved`` says that a checkpoint will put its arrays into the adapter.
    """
    init_adapter = config.init_adapter
    if saved:
        # What it decided is in the options of the run, and the folder may be gone or another.
        config = replace(config, init_adapter=None)
    path = resolve(config.model)
    # Bad data is reported before the weights are read.
    tokenizer = load_tokenizer(path)
    data = prepare(config, training_source(config), tokenizer)
    train = data.train
    if not len(train.examples):
        raise UserError(
            f"{data.files.train} has no example to train on: of its {data.reports[0].rows} rows "
            "none that is for training has an answer within --max-seq-length tokens."
        )
    asked = config.max_seq_length
    config, plan, chosen = _planned(config, train.examples, path, fit_it, ignore_memory)
    # What fits on the leader's machine is done on all.
    told = TrainConfig.from_dict(workers.share(config.to_dict()))
    if told != config:
        config, plan, chosen = _planned(told, train.examples, path, ignore_memory=True)
    if config.max_seq_length != asked:
        data = prepare(config, training_source(config), tokenizer)
        train = data.train
    memory_before = mx.get_active_memory()
    base = load_base(path, tokenizer=tokenizer)
    refused = why_not_packed(base.model) if config.pack else None
    window = config.max_seq_length if config.pack and refused is None else None
    batches = BatchStream(train.examples, config.batch_size, config.seed, window)
    total_parameters = parameter_count(base.model)
    mx.random.seed(config.seed)
    config, spec = attach_as_told(config, base)
    per_step = config.batch_size * config.grad_accumulation_steps * workers.count
    settled = _settle(config, batches.rows / per_step, total_parameters < SMALL_MODEL)
    settled = replace(settled, init_adapter=init_adapter)
    description = {
        "options": settled.to_dict(),
        "model": {"path": str(base.path), "fingerprint": fingerprint(base.path)},
        "data": {
            "files": [str(report.source) for report in data.reports],
            "fingerprint": data.fingerprint,
        },
        "versions": {
            "dora-mlx": dora_mlx.__version__,
            **{package: version(package) for package in ("mlx", "mlx-lm", "numpy")},
            "python": platform.python_version(),
        },
    }
    for part in ("model", "data"):
        workers.check_same(description[part]["fingerprint"], part)
    return _Prepared(
        settled, base, spec, data, batches, refused, total_parameters, description, plan, chosen,
        memory_before,
    )  # fmt: skip


def _planned(
    config: TrainConfig,
    examples: Examples,
    path: Path,
    fit_it: bool = False,
    ignore_memory: bool = False,
) -> tuple[TrainConfig, MemoryPlan, dict[str, Any]]:
    """The options to train with, their plan, and what was changed in them to fit.

    Raises:
        UserError: If the run does not fit and is not to start all the same.
    """
    facts = find_facts(str(path))
    if fit_it:
        fitted = fit(config, facts, examples)
        return fitted.config, fitted.plan, fitted.changes
    plan = plan_for(config, facts, examples)
    if plan.verdict == "does not fit" and not ignore_memory:
        raise UserError(
            f"The run needs {gigabytes(plan.peak)} of memory and this machine gives "
            f"{gigabytes(plan.limit)}. {' '.join(plan.advice)} --fit chooses for you, and "
            "--ignore-memory starts all the same."
        )
    return replace(config, grad_checkpoint=plan.grad_checkpoint), plan, {}


def _calibrate(trainer: Trainer, prepared: _Prepared) -> int | None:
    """Peak of the largest batch, tried out and thrown away; ``None`` for models that are small.

    Small ones need so little that it is not worth the time.
    """
    if prepared.total_parameters < SMALL_MODEL:
        return None
    examples, rows = prepared.data.train.examples, prepared.config.batch_size
    longest = np.argsort(examples.lengths)[-rows:].tolist()
    mx.reset_peak_memory()
    trainer.rehearse(make_batch([examples[index] for index in longest]))
    return mx.get_peak_memory() - prepared.memory_before


def _settle(config: TrainConfig, steps_per_epoch: float, small_model: bool) -> TrainConfig:
    """The options with those filled in that depend on the model and the data."""
    steps = config.steps
    if steps is None:
        steps = max(1, round(config.epochs * steps_per_epoch))
    rate = config.learning_rate
    if rate is None:
        rate = default_learning_rate(config.method, small_model)
    return replace(config, steps=steps, learning_rate=rate)


def default_learning_rate(method: str, small_model: bool) -> float:
    """The peak rate of a run that names none."""
    rate = 2e-3 if small_model else 2e-4
    return rate / 10 if method == "full" else rate


def _trainer(prepared: _Prepared, folder: RunFolder, log: EventLog, workers: Workers) -> Trainer:
    config = prepared.config
    validation: list[Batch] = validation_batches(prepared.data.valid.examples, config.batch_size)
    return Trainer(
        prepared.base.model,
        prepared.spec,
        config,
        prepared.batches,
        validation,
        folder.path,
        log,
        workers,
    )


def _start_event(
    trainer: Trainer, prepared: _Prepared, resume: bool, calibrated: int | None
) -> dict[str, Any]:
    plan = {name: value for name, value in asdict(prepared.plan).items() if name != "advice"}
    trainable = sum(array.size for array in trainable_arrays(prepared.base.model).values())
    return {
        "resumed_from": trainer.progress.step if resume else None,
        "run": trainer.folder.name,
        "model": prepared.config.model,
        "method": prepared.config.method,
        "steps": trainer.steps,
        "train_examples": len(prepared.data.train.examples),
        "valid_examples": len(prepared.data.valid.examples),
        "trained_tokens": prepared.data.train.trained_tokens,
        "trainable_parameters": trainable,
        "total_parameters": prepared.total_parameters,
        "plan": {**plan, "calibrated_peak": calibrated, "chosen": prepared.chosen},
        "workers": trainer.workers.count,
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
    }


def _warnings(prepared: _Prepared, trainer: Trainer) -> list[str]:
    messages: list[str] = []
    if dora_mlx.blas_notice and mx.default_device().type == mx.DeviceType.cpu:
        messages.append(dora_mlx.blas_notice)
    messages += trainer.notices
    messages += data_notices(prepared.data, prepared.config, prepared.packing_refused)
    if not len(prepared.data.valid.examples):
        messages.append("there is nothing to validate on, so the last adapter counts as the best")
    return messages
