"""The operations of a function with their shapes, found by building its graph and computing none.

In the graph that MLX exports, every placeholder of the tracer (``tracer.py``) becomes the array
that it stood for. The outcome is the graph that MLX would evaluate.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from dora_mlx.training.substitutes import standing_in
from dora_mlx.training.tracer import Arrays, Tracer

# Kind of a node whose output is its input.
ALIAS = "Alias"


@dataclass(frozen=True)
class Node:
    """One operation: names of what it reads and of what it makes."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: list[Any]


@dataclass(frozen=True)
class Graph:
    """What a function does.

    Attributes:
        nodes: Operations in an order in which they can run.
        inputs: Names of the arguments, in order.
        outputs: Names of the results, in order.
        sizes: Bytes of every array, constants included.
        shapes: Shape of every array.
    """

    nodes: list[Node]
    inputs: list[str]
    outputs: list[str]
    sizes: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


@contextmanager
def nothing_evaluated() -> Iterator[None]:
    """Within the block ``mx.eval`` in this thread does nothing.

    So a model can be built and adapted whose weights would not fit into memory.
    """
    with standing_in(mx, {"eval": lambda *_: None}):
        yield


def trace(function: Callable[..., Arrays], arguments: Sequence[mx.array]) -> Graph:
    """The graph of ``function(*arguments)``, which returns a list of arrays.

    Neither the arguments nor anything else is evaluated, so they may be larger than memory.
    """
    items: list[dict[str, Any]] = []
    outputs = 0
    tracer = Tracer()

    def traced(*arguments: mx.array) -> Arrays:
        nonlocal outputs
        results = function(*arguments)
        outputs = len(results)
        return [*results, *(array for _, array in tracer.resolved)]

    with tracer.installed(), _random_state_kept():
        mx.export_function(items.append, traced, *arguments)
    return _graph(items, outputs, [mark for mark, _ in tracer.resolved])


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Random numbers drawn in the block are as if they had not been.

    MLX would go on from a key that is never computed, and is one more operation away each time.
    """
    high, low = cast(Any, mx.random.state)[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def _graph(items: list[dict[str, Any]], outputs: int, marks: list[int]) -> Graph:
    """The graph in what MLX exported, with every placeholder tied to what it stands for."""
    parts = {item["type"]: item for item in items if item["type"] != "primitive"}
    operations = [item for item in items if item["type"] == "primitive"]
    arrays = [*parts["inputs"]["inputs"], *parts["outputs"]["outputs"]]
    arrays += [array for operation in operations for array in operation["outputs"]]
    described = {name: (tuple(shape), dtype) for name, shape, dtype in arrays}
    results = [name for name, *_ in parts["outputs"]["outputs"]]
    stands_for = dict(zip(marks, results[outputs:], strict=True))
    marked: dict[str, str] = {}
    for name, value in parts["constants"]["constants"]:
        described[name] = tuple(value.shape), value.dtype
        if value.ndim == 0 and value.dtype == mx.float32 and value.item() in stands_for:
            marked[name] = stands_for[int(value.item())]
    nodes = []
    for operation in operations:
        read = tuple(name for name, *_ in operation["inputs"])
        made = tuple(name for name, *_ in operation["outputs"])
        kind = operation["name"]
        if kind in ("Broadcast", "AsType") and read[0] in marked:
            target = marked[read[0]]
            if described[made[0]][1] == described[target][1]:
                kind, read = ALIAS, (target,)
            else:
                marked[made[0]] = target
        nodes.append(Node(kind, read, made, operation["arguments"]))
    inputs = [name for name, *_ in parts["inputs"]["inputs"]]
    sizes = {name: math.prod(shape) * dtype.size for name, (shape, dtype) in described.items()}
    shapes = {name: shape for name, (shape, _) in described.items()}
    return Graph(nodes, inputs, results[:outputs], sizes, shapes)
