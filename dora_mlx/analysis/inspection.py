"""The weight-decomposition analysis of a run: every adapted weight, at every kept checkpoint."""

from collections.abc import Callable, Iterator
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from dora_mlx.adapters.adapter_folder import WEIGHTS_FILE
from dora_mlx.adapters.attach import adaptable_layers, adapted_layers
from dora_mlx.adapters.trained import load_base_of, load_run
from dora_mlx.analysis.decomposition import (
    ChangedWeight,
    VectorChanges,
    dense_change,
    effective_rank,
    low_rank_change,
    vector_changes,
)
from dora_mlx.analysis.findings import Inspection, RowChange, WeightChange, WeightState
from dora_mlx.errors import UserError
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.checkpoints import checkpoint_steps, load_trained_parameters
from dora_mlx.training.events import read_events

ROWS_KEPT = 5
# Two points always lie on a line.
_FEWEST_POINTS = 3

Progress = Callable[[int, int], None]


def inspect_run(
    folder: RunFolder, checkpoint: int | None = None, progress: Progress | None = None
) -> Inspection:
    """Measure how far every trained weight of a run moved from the base model.

    Memory beyond the base model: a block of rows for LoRA and DoRA, one weight at a time for full
    fine-tuning.

    Args:
        folder: The run.
        checkpoint: Look at the checkpoint of this step alone. ``None``: at the best adapter and
            at every checkpoint that is kept.
        progress: Called with weights done and weights in all, over all states.

    Raises:
        UserError: If the run has no adapter yet, or no such checkpoint, or its base model is gone
            or has changed.
    """
    steps = checkpoint_steps(folder.checkpoints_dir)
    if checkpoint is not None and checkpoint not in steps:
        kept = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"The run {folder.name} keeps no checkpoint of step {checkpoint}; it keeps {kept}."
        )
    config = folder.read_config()
    method = config["options"]["method"]
    sources = _full_states(folder) if method == "full" else _low_rank_states(folder)
    wanted: list[tuple[int | None, bool]] = [(None, True)] if checkpoint is None else []
    best = _best_step(folder, steps)
    # The best adapter often is a checkpoint as well, and counts once.
    chosen = [s for s in steps if s != best] if checkpoint is None else [checkpoint]
    wanted += [(step, False) for step in chosen]
    done = 0
    states = []
    for step, is_best in wanted:
        weights = []
        places, changed = sources(step)
        for name, weight in changed:
            weights.append(_weight_change(name, places[name], weight))
            done += 1
            if progress is not None:
                progress(done, len(places) * len(wanted))
        after = best if is_best else step
        states.append(WeightState(after, is_best, tuple(weights), correlation(weights)))
    states.sort(key=lambda state: (state.step is None, state.step or 0))
    points = [weight for state in states for weight in state.weights]
    modules = dict.fromkeys(point.module for point in points)
    return Inspection(
        folder.name,
        config["options"]["model"],
        method,
        tuple(states),
        correlation(points),
        {m: correlation([point for point in points if point.module == m]) for m in modules},
    )


# Where each weight is (block and path within it), and the weights one after the other.
_Places = dict[str, tuple[int | None, str]]
_State = tuple[_Places, Iterator[tuple[str, ChangedWeight]]]


def _low_rank_states(folder: RunFolder) -> Callable[[int | None], _State]:
    model = load_run(folder).base.model
    layers = adapted_layers(model)
    places = _places(model, [path for path, _ in layers])

    def state(step: int | None) -> _State:
        if step is not None:
            arrays = load_trained_parameters(folder.checkpoints_dir, step)
            model.update(tree_unflatten(list(arrays.items())))
        found = dict(layers)
        return places, ((name, low_rank_change(found[name])) for name in places)

    return state


def _full_states(folder: RunFolder) -> Callable[[int | None], _State]:
    base, _ = load_base_of(folder)
    layers = dict(adaptable_layers(base.model))

    def state(step: int | None) -> _State:
        if step is None:
            arrays = cast(dict[str, mx.array], mx.load(str(folder.path / WEIGHTS_FILE)))
        else:
            arrays = load_trained_parameters(folder.checkpoints_dir, step)
        # Not read from the file before they are used, and dropped after.
        trained = {n: arrays[f"{n}.weight"] for n in layers if f"{n}.weight" in arrays}
        places = _places(base.model, list(trained))
        del arrays
        return places, ((n, dense_change(layers[n], trained.pop(n))) for n in places)

    return state


def _places(model: nn.Module, names: list[str]) -> _Places:
    """Block and path within it of the named layers, in the order of the model."""
    blocks = {id(block): index for index, block in enumerate(model.layers)}
    paths = {path: blocks[id(m)] for path, m in model.named_modules() if id(m) in blocks}
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}

    def place(name: str) -> tuple[int | None, str]:
        for path, index in paths.items():
            if name.startswith(f"{path}."):
                return index, name.removeprefix(f"{path}.")
        return None, name

    found = {name: place(name) for name in names}
    # MLX walks the modules backwards.
    key = {name: (found[name][0] is None, found[name][0] or 0, -order[name]) for name in names}
    return {name: found[name] for name in sorted(names, key=key.__getitem__)}


def _weight_change(name: str, place: tuple[int | None, str], weight: ChangedWeight) -> WeightChange:
    changes = vector_changes(weight)
    return WeightChange(
        name,
        *place,
        float(np.abs(changes.after - changes.before).mean()),
        float(changes.before.mean()),
        float(changes.direction.mean()),
        effective_rank(weight),
        _largest_rows(changes),
    )


def _largest_rows(changes: VectorChanges) -> tuple[RowChange, ...]:
    largest = np.argsort(-changes.relative, kind="stable")[:ROWS_KEPT].tolist()
    return tuple(
        RowChange(
            row,
            float(changes.relative[row]),
            float(changes.before[row]),
            float(changes.after[row]),
            float(changes.direction[row]),
        )
        for row in largest
    )


def _best_step(folder: RunFolder, steps: list[int]) -> int | None:
    """The step that the best adapter is from: without a validation, the last one."""
    validations = [e for e in read_events(folder.path) if e["event"] == "validation" and e["step"]]
    losses = {e["step"]: e["loss"] for e in validations if e["loss"] is not None}
    if losses:
        return min(losses, key=losses.__getitem__)
    return steps[-1] if steps else None


def correlation(points: list[WeightChange]) -> float | None:
    """Pearson's correlation between dM and dD, or ``None`` where it says nothing."""
    if len(points) < _FEWEST_POINTS:
        return None
    pairs = np.array([(p.magnitude_change, p.direction_change) for p in points])
    if (np.ptp(pairs, axis=0) == 0).any():
        return None
    return float(np.corrcoef(pairs.T)[0, 1])
