"""What one training step needs in memory, known before anything is read or downloaded.

The graph of one training step is built from the real model's modules at the real sizes, but of
few blocks and without computing anything (``graph.py``); its peak is found by playing through its
evaluation (``graph_memory.py``), and what one block more adds is known from a second graph. So
the plan follows the code: method, targets, checkpointing, the loss in chunks and every
architecture are in it because they are in the graph.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from dora_mlx.adapters.attach import attach
from dora_mlx.config import TrainConfig
from dora_mlx.data.batches import Batch
from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_weight import leading_shape, weight_shape
from dora_mlx.kernels.row_norm import AdaptedNorm, ColumnNorm
from dora_mlx.layers.dora import DoRA, hoisted_norms
from dora_mlx.skeleton import ModelFacts, build_skeleton
from dora_mlx.training.gpu_operations import planned_operations
from dora_mlx.training.graph import Graph, nothing_evaluated, trace
from dora_mlx.training.graph_memory import peak_of
from dora_mlx.training.lean_backward import lean_backward
from dora_mlx.training.loss import ChunkedLoss, loss_chunk, plain_loss_sum, why_not_chunked
from dora_mlx.training.optimizer import GroupedOptimizer
from dora_mlx.training.substitutes import standing_in

Sizes = Counter[str]

PARTS = (
    "weights", "adapter", "optimizer", "gradients", "activations", "output layer", "other",
    "in flight",
)  # fmt: skip
_LARGEST = "largest array"


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of a run: rows, tokens of a row, trained tokens in all of them."""

    rows: int
    width: int
    trained: int
    packed: bool = False


def predict(facts: ModelFacts, config: TrainConfig, batch: BatchShape) -> dict[str, int]:
    """Bytes of every part at the peak of a step, in the order of ``PARTS``."""
    with nothing_evaluated():
        model = build_skeleton(facts)
        kinds = [_kind_of(block) for block in model.layers]
    adapted = len(kinds) if config.num_layers is None else config.num_layers
    if adapted > len(kinds):
        raise UserError(f"--num-layers is {adapted}, but the model has only {len(kinds)} blocks.")
    # A block that is not adapted keeps nothing for the backward.
    first = len(kinds) - adapted
    kinds = [(kind, index >= first) for index, kind in enumerate(kinds)]
    # Where fewer things wait for each other, fewer blocks do not show what many need.
    depth = 2 if config.method == "dora" else 4
    while True:
        try:
            return _extrapolated(facts, config, batch, kinds, depth)
        except IndexError:
            # Some models look at a certain block, as the first with full attention.
            if depth >= len(kinds):
                raise
            depth *= 2


def _extrapolated(
    facts: ModelFacts, config: TrainConfig, batch: BatchShape, kinds: list[Any], depth: int
) -> dict[str, int]:
    """The parts for all blocks, from graphs with up to ``depth`` blocks of a kind, and more."""
    counts = Counter(kinds)
    base = {kind: min(count, depth) for kind, count in counts.items()}
    sizes = _sizes_with(facts, config, batch, kinds, base)
    total: dict[str, float] = {part: sizes[part] for part in PARTS}
    for kind, count in counts.items():
        missing = count - base[kind]
        added = min(missing, depth - 1)
        if added:
            more = _sizes_with(facts, config, batch, kinds, {**base, kind: base[kind] + added})
            for part in PARTS:
                total[part] += (more[part] - sizes[part]) * missing / added
    # The operation at which MLX sees that it has to wait.
    total["in flight"] = sizes[_LARGEST]
    return {part: round(max(0, size)) for part, size in total.items()}


def _kind_of(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that need the same memory."""
    shapes = [(name, a.shape, a.dtype) for name, a in _arrays(block.parameters()).items()]
    return type(block), tuple(shapes)


def _sizes_with(
    facts: ModelFacts,
    config: TrainConfig,
    batch: BatchShape,
    kinds: list[Any],
    wanted: dict[Any, int],
) -> Sizes:
    """Sizes of the parts for a model with so many blocks of every kind, and of an array."""
    left = Counter(wanted)
    with nothing_evaluated(), standing_in(AdaptedNorm, {"square_sums": _unknown_sums}):
        model = build_skeleton(facts)
        keep = []
        for index, kind in enumerate(kinds):
            if left[kind]:
                left[kind] -= 1
                keep.append(index)
        blocks = [model.layers[index] for index in keep]
        model.layers[:] = blocks
        adapted = sum(kinds[index][1] for index in keep)
        attach(
            model, config.method, config.rank, config.alpha, config.dropout,
            config.target_modules, adapted, config.rslora, config.rank_overrides,
        )  # fmt: skip
        model.train()
        return _sizes(model, config, batch)


def _sizes(model: nn.Module, config: TrainConfig, batch: BatchShape) -> Sizes:
    everything = _arrays(model.parameters())
    trained = _arrays(model.trainable_parameters())
    optimizer = GroupedOptimizer(config.optimizer, model.trainable_parameters())
    sizes: Sizes = Counter()
    adapter = trained if config.method != "full" else {}
    sizes["weights"] = sum(a.nbytes for name, a in everything.items() if name not in adapter)
    sizes["adapter"] = sum(a.nbytes for a in adapter.values())
    sizes["optimizer"] = sum(a.nbytes for a in _arrays(optimizer.state).values())
    gradients = sum(a.nbytes for a in trained.values())
    # Norms of the frozen weights, and of the adapted ones during a step.
    norms = sum(m.magnitude.nbytes for m in model.modules() if isinstance(m, DoRA))
    vocabulary = _vocabulary(model)
    # Chunks of the loss come one after the other: a few of them are as good as all.
    few = min(batch.trained, 3 * loss_chunk(vocabulary) - 1)
    graph = _step_graph(model, config, replace(batch, trained=few))
    peak = peak_of(graph)
    own = set(graph.outputs)
    for name, size in peak.held.items():
        if few in graph.shapes[name]:
            size = size * batch.trained // few
        if name in own:
            sizes["gradients"] += size
        elif vocabulary in graph.shapes[name]:
            sizes["output layer"] += size
        else:
            sizes["activations"] += size
    if config.grad_accumulation_steps > 1:
        sizes["gradients"] += gradients
    sizes["other"] = 2 * norms
    sizes[_LARGEST] = max(peak.held.values())
    return sizes


def _step_graph(model: nn.Module, config: TrainConfig, shape: BatchShape) -> Graph:
    """The graph of loss and gradients of one batch."""
    names, arrays = zip(*_arrays(model.parameters()).items(), strict=True)
    batch = _batch(shape)
    loss_sum = plain_loss_sum if why_not_chunked(model) else ChunkedLoss()
    checkpoint = config.grad_checkpoint is True

    def step(*arrays: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(zip(names, arrays, strict=True))))
        with hoisted_norms(model), lean_backward(model, checkpoint):
            loss, gradients = nn.value_and_grad(model, loss_sum)(model, batch)
        return [loss, *_arrays(gradients).values()]

    with planned_operations():
        return trace(step, arrays)


def _arrays(tree: Any) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], tree_flatten(tree, destination={}))


def _vocabulary(model: nn.Module) -> int:
    """Number of logits of a position: rows of the output layer, or of the embedding that is it."""
    weights = [(path, module) for path, module in model.named_modules() if "weight" in module]
    heads = [module for path, module in weights if "lm_head" in path.split(".")]
    embeddings = [module for _, module in weights if hasattr(module, "as_linear")]
    return weight_shape((heads or embeddings)[0])[0]


def _batch(shape: BatchShape) -> Batch:
    size = shape.rows, shape.width
    zeros = np.zeros(size, np.int32)
    weights = (np.arange(shape.rows * shape.width) < shape.trained).reshape(size)
    segments = zeros if shape.packed else None
    return Batch(zeros, zeros, weights.astype(np.float32), segments)


def _unknown_sums(norm: AdaptedNorm) -> mx.array:
    """In the place of sums of squares that would take the weights to compute."""
    shape = (
        weight_shape(norm.base)[1:] if isinstance(norm, ColumnNorm) else leading_shape(norm.base)
    )
    return mx.zeros(shape)
