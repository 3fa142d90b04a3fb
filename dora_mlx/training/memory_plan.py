"""Whether a run fits into a machine's memory, and what to change if it does not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dora_mlx.config import TrainConfig, flag_of
from dora_mlx.data.batches import padded_width
from dora_mlx.data.cache import is_worth_keeping
from dora_mlx.data.examples import Examples
from dora_mlx.data.preparation import prepare, training_source
from dora_mlx.data.records import find_data
from dora_mlx.errors import UserError
from dora_mlx.kernels.device import assuming_device, on_cpu
from dora_mlx.loading import load_tokenizer
from dora_mlx.skeleton import ModelFacts, find_facts
from dora_mlx.training.beginning import as_begun
from dora_mlx.training.device_limits import memory_limit
from dora_mlx.training.events import Event, EventLog
from dora_mlx.training.memory_figures import MemoryPlan, Verdict
from dora_mlx.training.step_memory import BatchShape, predict

_TIGHT = 0.9
# Beyond the error of a plan, and worth a word on any machine.
_GROWTH, _GROWTH_BYTES = 1.15, 100e6
# Shorter windows than this cut most conversations.
_SHORTEST_WINDOW = 256


@dataclass(frozen=True)
class Machine:
    """What a run is planned for.

    Attributes:
        limit: Bytes that MLX may hold.
        cpu: Whether MLX runs on the CPU.
    """

    limit: int
    cpu: bool

    @classmethod
    def here(cls) -> "Machine":
        """The machine this runs on, as it is now."""
        return cls(memory_limit(), on_cpu())

    @classmethod
    def mac(cls, gigabytes: float) -> "Machine":
        """A Mac sold with so many gigabytes, of 2^30 bytes each.

        Metal recommends a GPU to work with two thirds of it up to 36 GB, and three quarters above.

        Raises:
            UserError: If it is not a size above 0.
        """
        if not 0 < gigabytes < float("inf"):
            raise UserError(f"A Mac has no {gigabytes:g} GB of memory: give a number such as 16.")
        share = 2 / 3 if gigabytes <= 36 else 3 / 4
        return cls(round(share * gigabytes * 2**30), cpu=False)


@dataclass(frozen=True)
class FittedPlan:
    """Options that fit, their plan, and what was changed, by option."""

    config: TrainConfig
    plan: MemoryPlan
    changes: dict[str, Any]


def plan_memory(
    config: TrainConfig, *, machine: Machine | None = None, thorough: bool = False
) -> MemoryPlan:
    """The memory that a run with these options needs, for models not downloaded yet as well.

    Args:
        config: The options.
        machine: What to plan for. Default: this machine.
        thorough: Ask the Hub about models of the registry too, and read large data files: exact,
            but it may take seconds. Without it ``max_seq_length`` stands for such data.

    Raises:
        UserError: If the model is unknown, the Hub has to be asked and does not answer, or the
            data is bad.
    """
    facts = find_facts(config.model, ask_hub=thorough)
    return plan_for(config, facts, _examples(config, facts, thorough), machine)


def fit_to_memory(
    config: TrainConfig, *, machine: Machine | None = None, thorough: bool = False
) -> FittedPlan:
    """The options changed as little as it takes to fit; ``fit`` says in which order.

    Args:
        config: The options.
        machine: What they have to fit. Default: this machine.
        thorough: As for ``plan_memory``.

    Raises:
        UserError: As ``plan_memory`` does, or if not even one short example fits.
    """
    facts = find_facts(config.model, ask_hub=thorough)
    return fit(config, facts, _examples(config, facts, thorough), machine)


def plan_for(
    config: TrainConfig,
    facts: ModelFacts,
    examples: Examples | None,
    machine: Machine | None = None,
) -> MemoryPlan:
    """The plan for known examples; ``None``: rows of ``max_seq_length`` tokens, all trained.

    Where the options leave checkpointing open, the plan decides: it takes a third more time, so
    only what would be tight or not fit without it has it.
    """
    machine = Machine.here() if machine is None else machine
    config = as_begun(config, facts)
    plans = []
    for candidate in _decided(config):
        plans.append(_plan(candidate, facts, examples, machine))
        if plans[-1].verdict == "fits":
            return plans[-1]
    # Where both are tight it wins nothing, and of what does not fit the least is told.
    plan = next((plan for plan in plans if plan.verdict == "tight"), plans[-1])
    config = replace(config, grad_checkpoint=plan.grad_checkpoint)
    return replace(plan, advice=tuple(_advice(plan, config, facts, examples, machine)))


def fit(
    config: TrainConfig,
    facts: ModelFacts,
    examples: Examples | None,
    machine: Machine | None = None,
) -> FittedPlan:
    """The first of these that fits: smaller batches, checkpointing, both, and a shorter window.

    The global batch stays the same: what a batch loses, ``grad_accumulation_steps`` gains.
    Examples are not cut for a reserve: before that, the smallest batch may be ``tight``.

    Raises:
        UserError: If not even one short example fits, with the least that is needed.
    """
    machine = Machine.here() if machine is None else machine
    config = as_begun(config, facts)
    plan, fitted = None, None
    for candidate in _candidates(config):
        if fitted is not None and candidate.max_seq_length < config.max_seq_length:
            return fitted
        plan = _plan(candidate, facts, examples, machine)
        if plan.verdict == "does not fit":
            continue
        before, after = config.to_dict(), candidate.to_dict()
        if config.grad_checkpoint is None:
            before["grad_checkpoint"] = candidate.grad_checkpoint
        changes = {name: after[name] for name in after if after[name] != before[name]}
        fitted = FittedPlan(candidate, plan, changes)
        if plan.verdict == "fits":
            return fitted
    if fitted is not None:
        return fitted
    if plan is None:
        raise ValueError("the options themselves are the first candidate")
    raise UserError(
        f"Nothing that --fit may change makes this fit: one example of {plan.width} tokens with "
        f"checkpointing still needs {gigabytes(plan.peak)} of the {gigabytes(plan.limit)} that "
        "there are. Choose a smaller model, or one of fewer bits."
    )


class MemoryWatch:
    """Reader of a run's events that warns, once, when memory grows beyond the plan.

    Args:
        log: Where the warning goes.
        planned: Bytes that the run was planned, or found, to need.
        before: Bytes that MLX held before the run.
    """

    def __init__(self, log: EventLog, planned: int, before: int):
        self._log = log
        self._planned = planned
        self._before = before
        self._warned = False

    def __call__(self, event: Event) -> None:
        """Look at one event."""
        needed = event.get("peak_memory_bytes", 0) - self._before
        if self._warned or needed <= max(_GROWTH * self._planned, self._planned + _GROWTH_BYTES):
            return
        self._warned = True
        self._log.write(
            "warning",
            step=event["step"],
            message=f"the run needs {gigabytes(needed)} of memory, more than the "
            f"{gigabytes(self._planned)} that were planned; a smaller --batch-size or "
            "--max-seq-length needs less",
        )


def gigabytes(size: int) -> str:
    """A size as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def largest_batch(config: TrainConfig, examples: Examples | None) -> BatchShape:
    """The largest batch that a run can meet: its longest examples together."""
    rows, window = config.batch_size, config.max_seq_length
    if examples is None or not len(examples) or config.pack:
        width = padded_width(window - 1)
        return BatchShape(rows, width, rows * width, config.pack)
    lengths = examples.lengths
    longest = np.argsort(lengths)[-rows:]
    return BatchShape(
        len(longest),
        padded_width(int(lengths[longest[-1]]) - 1),
        max(1, int(np.sort(examples.targets)[-rows:].sum())),
    )


def _plan(
    config: TrainConfig, facts: ModelFacts, examples: Examples | None, machine: Machine
) -> MemoryPlan:
    """The plan without advice."""
    batch = largest_batch(config, _cut(examples, config))
    with assuming_device(machine.cpu):
        parts = predict(facts, config, batch)
    peak = sum(parts.values())
    verdict: Verdict = "fits" if peak <= _TIGHT * machine.limit else "tight"
    if peak > machine.limit:
        verdict = "does not fit"
    checkpoint = config.grad_checkpoint is True
    return MemoryPlan(parts, peak, machine.limit, verdict, (), batch.rows, batch.width, checkpoint)


def _cut(examples: Examples | None, config: TrainConfig) -> Examples | None:
    """The examples, no longer than the window: they may have been made for a longer one."""
    if examples is None or not len(examples):
        return examples
    lengths = np.minimum(examples.lengths, config.max_seq_length)
    targets = np.minimum(examples.targets, lengths)
    empty = np.zeros(0, np.int32)
    return Examples(empty, empty.astype(bool), np.zeros(len(lengths), np.int64), lengths, targets)


def _decided(config: TrainConfig) -> Iterator[TrainConfig]:
    """Options that say whether to checkpoint, what is faster first where they leave it open."""
    open_to = [False, True] if config.grad_checkpoint is None else [config.grad_checkpoint]
    return (replace(config, grad_checkpoint=checkpoint) for checkpoint in open_to)


def _candidates(config: TrainConfig) -> Iterator[TrainConfig]:
    """Options in the order in which ``fit`` tries them, those as they are first."""
    rows_in_all = config.batch_size * config.grad_accumulation_steps
    batches = [n for n in range(config.batch_size, 0, -1) if rows_in_all % n == 0]
    if config.grad_checkpoint is None:
        yield from _decided(config)
    for checkpoint in [True] if config.grad_checkpoint else [False, True]:
        for rows in batches:
            smallest = replace(
                config,
                batch_size=rows,
                grad_accumulation_steps=rows_in_all // rows,
                grad_checkpoint=checkpoint,
            )
            yield smallest
    window = config.max_seq_length // 2
    while window >= _SHORTEST_WINDOW:
        yield replace(smallest, max_seq_length=window)
        window //= 2


def _advice(
    now: MemoryPlan,
    config: TrainConfig,
    facts: ModelFacts,
    examples: Examples | None,
    machine: Machine,
) -> Iterator[str]:
    """What to change in a plan, each with the peak it would give; only what helps."""
    rows_in_all = config.batch_size * config.grad_accumulation_steps
    changes: list[dict[str, Any]] = [
        {"grad_checkpoint": True},
        {"batch_size": 1, "grad_accumulation_steps": rows_in_all},
        {"max_seq_length": max(8, now.width // 2)},
        {"batch_size": 1, "grad_accumulation_steps": rows_in_all, "grad_checkpoint": True},
    ]
    offered: set[int] = set()
    for change in changes:
        other = _plan(replace(config, **change), facts, examples, machine)
        # With checkpoints already two of the changes are none, or one.
        if other.peak > 0.97 * now.peak or other.peak in offered:
            continue
        offered.add(other.peak)
        flags = " ".join(
            flag_of(name) if value is True else f"{flag_of(name)} {value}"
            for name, value in change.items()
        )
        yield f"{flags} would need {gigabytes(other.peak)}."
    if other.verdict == "does not fit":
        yield (
            f"{gigabytes(now.parts['weights'])} of it are weights: take a smaller model, or one of "
            "fewer bits."
        )


def _examples(config: TrainConfig, facts: ModelFacts, thorough: bool) -> Examples | None:
    """The examples of a run, if its tokenizer is here and reading them takes no time."""
    source = training_source(config)
    if facts.folder is None:
        if thorough and isinstance(source, Path):
            # Nothing can be read without a tokenizer, but a name that is wrong can be told.
            find_data(source)
        return None
    if isinstance(source, Path):
        # What is missing is said where the data are read.
        large = source.exists() and is_worth_keeping(source)
        changed = source.stat().st_mtime_ns if source.exists() else 0
    else:
        large, changed = True, 0
    if large and not thorough:
        return None
    # What the examples do not depend on must not make them anew.
    relevant = TrainConfig(
        **{
            name: getattr(config, name)
            for name in (
                "model", "data", "valid_data", "valid_fraction", "data_form", "columns",
                "skip_bad_rows", "train_on", "mask_prompt", "max_seq_length", "long_examples",
                "seed",
            )
        }
    )  # fmt: skip
    return _prepared(relevant, facts.folder, changed)


@lru_cache(maxsize=4)
def _prepared(config: TrainConfig, folder: Path, changed: int) -> Examples:
    return prepare(config, training_source(config), load_tokenizer(folder)).train.examples
