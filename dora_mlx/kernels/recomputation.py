"""Functions whose backward keeps what is dear to compute and computes the rest again.

Of what a transformer block makes, the results of matrix products are dear. Norms, rotations,
activations and sums take a fraction of its time to compute again and most of its memory to keep:
selective activation recomputation (arXiv 2205.05198, section 5), by what a block calls and not by
its architecture. With nothing kept it is gradient checkpointing (arXiv 1604.06174).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_map

Arrays = list[mx.array]
Compute = Callable[[], Arrays]

_LEAF = object()

# How the results of ``kept`` come about in a ``recomputed`` function.
_way: ContextVar[Callable[[Compute], Arrays] | None] = ContextVar("way", default=None)


def recomputed(function: Callable[..., Any], keep: bool = False) -> Callable[..., Any]:
    """``function``, whose backward computes it again from its arguments.

    ``mx.checkpoint`` lets that begin as soon as the forward has ended, and MLX then has the insides
    of several blocks in memory at a time. Here it begins when the cotangents are there.

    Args:
        function: Arguments and result are trees of arrays and other things. Gradients flow through
            these alone: not through what it refers to, nor through what it leaves elsewhere.
        keep: Whether the backward has what is ``kept`` in the function from its forward.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _Call(function, keep, args, kwargs).result()

    return call


class _Call:
    """One call of a function that is ``recomputed``."""

    def __init__(self, function: Callable[..., Any], keep: bool, args: Any, kwargs: Any):
        self._function, self._keep = function, keep
        self._arrays, self._rebuild = flattened([args, kwargs])
        self._count = 0
        self._rebuild_result: Callable[[Sequence[mx.array]], Any]
        self._rebuild_kept: Callable[[Sequence[mx.array]], Any]

    def result(self) -> Any:
        """What the function returns."""
        forward = mx.custom_function(self._forward)
        forward.vjp(self._backward)
        results = cast(Arrays, forward(*self._arrays))[: self._count]
        return self._rebuild_result(results)

    def _compute(self, arrays: Sequence[mx.array]) -> Arrays:
        args, kwargs = self._rebuild(arrays)
        results, self._rebuild_result = flattened(self._function(*args, **kwargs))
        return results

    def _forward(self, *arrays: mx.array) -> Arrays:
        with _noted(self._keep) as notes:
            results = self._compute(arrays)
        self._count = len(results)
        kept_arrays, self._rebuild_kept = flattened(notes)
        return results + kept_arrays

    def _backward(self, primals: Any, cotangents: Arrays, outputs: Arrays) -> Any:
        inputs = [primals] if isinstance(primals, mx.array) else list(primals)
        own, count = cotangents[: self._count], len(inputs)
        now = later([*inputs, *outputs[self._count :]], *own)

        def again(*arrays: mx.array) -> Arrays:
            notes = self._rebuild_kept(arrays[count:])
            with _found(notes) if self._keep else nullcontext():
                return self._compute(arrays[:count])

        gradients = gradients_of(again, now[:count], own, now[count:])
        return tuple(gradients) if count > 1 else gradients[0]


def kept(compute: Compute) -> Arrays:
    """``compute()``, which the backward of a ``recomputed`` function does not do again.

    For the forward of an ``mx.custom_function``: no gradient goes through what was kept.
    """
    way = _way.get()
    return compute() if way is None else way(compute)


def dear(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """``function``, whose result is ``kept``; its own backward computes what it needs again.

    Args:
        function: Arguments are trees of arrays and other things; the result is an array.
    """

    @wraps(function)
    def call(*args: Any) -> mx.array:
        if _way.get() is None:
            return function(*args)
        arrays, rebuild = flattened(list(args))

        def of_arrays(*arrays: mx.array) -> Arrays:
            # Of which expert there is no gradient.
            floats = [
                a if mx.issubdtype(a.dtype, mx.inexact) else mx.stop_gradient(a) for a in arrays
            ]
            return [function(*rebuild(floats))]

        @mx.custom_function
        def forward(*arrays: mx.array) -> Arrays:
            return kept(lambda: of_arrays(*arrays))

        @forward.vjp
        def backward(primals: Any, cotangents: Arrays, _: Any) -> Any:
            inputs = [primals] if isinstance(primals, mx.array) else list(primals)
            gradients = gradients_of(of_arrays, inputs, cotangents)
            return together(gradients) if len(gradients) > 1 else gradients[0]

        return cast(Arrays, forward(*arrays))[0]

    return call


@contextmanager
def _noted(wanted: bool) -> Iterator[list[Arrays]]:
    """Within the block what is ``kept`` is computed, and noted if that is wanted."""
    notes: list[Arrays] = []

    def note(compute: Compute) -> Arrays:
        with _by(None):
            notes.append(compute())
        return notes[-1]

    with _by(note if wanted else None):
        yield notes


@contextmanager
def _found(notes: list[Arrays]) -> Iterator[None]:
    """Within the block what is ``kept`` is what was noted in one like it.

    Raises:
        RuntimeError: If something else is asked for than was noted.
    """
    left = list(reversed(notes))

    def find(_: Compute) -> Arrays:
        if not left:
            raise RuntimeError("a function that is computed again has more products than before")
        return left.pop()

    with _by(find):
        yield
    if left:
        raise RuntimeError("a function that is computed again has fewer products than before")


@contextmanager
def _by(way: Callable[[Compute], Arrays] | None) -> Iterator[None]:
    token = _way.set(way)
    try:
        yield
    finally:
        _way.reset(token)


def later(arrays: Arrays, *cotangents: mx.array) -> Arrays:
    """The same arrays, available only when the backward has come to ``cotangents``."""
    return cast(Arrays, mx.depends(arrays, list(cotangents)))


def gradients_of(
    function: Callable[..., Arrays],
    inputs: Sequence[mx.array],
    cotangents: Arrays,
    constants: Sequence[mx.array] = (),
) -> Arrays:
    """Gradients of ``function(*inputs, *constants)`` with respect to the inputs.

    ``mx.vjp`` walks through all that a result was made of, down to its arguments. An array that a
    function has from elsewhere leads it, in the backward of a deep model, through all of the
    model; as a constant it does not.
    """
    count = len(inputs)

    def of_all(*arrays: mx.array) -> Arrays:
        return function(*arrays[:count], *map(mx.stop_gradient, arrays[count:]))

    return mx.vjp(of_all, [*inputs, *constants], cotangents)[1][:count]


def together(gradients: Arrays) -> tuple[mx.array, ...]:
    """The same arrays, none of them available before all are.

    A backward goes on with the gradient of an input, and may come to those of parameters at its
    end: until then what they need, such as the inputs of every layer, is kept.
    """
    return tuple(mx.depends(gradients, gradients))


def flattened(tree: Any) -> tuple[Arrays, Callable[[Sequence[mx.array]], Any]]:
    """The arrays in a tree, in order, and how to build a tree like it from others."""
    leaves: Arrays = []

    def take(value: Any) -> Any:
        if not isinstance(value, mx.array):
            return value
        leaves.append(value)
        return _LEAF

    # Who can build a tree need not hold the arrays of this one.
    shape = tree_map(take, tree)

    def rebuild(arrays: Sequence[mx.array]) -> Any:
        left = iter(arrays)
        return tree_map(lambda value: next(left) if value is _LEAF else value, shape)

    return leaves, rebuild


def product(x: mx.array, a: mx.array) -> tuple[mx.array, mx.array]:
    """``x @ a``: ``[..., in] x [in, out] -> [..., out]``, and x for who else needs it.

    To what the other makes of the second result the gradient of x adds that of the product in
    place, where two uses of x would be two arrays and their sum.
    """

    @mx.custom_function
    def forward(x: mx.array, a: mx.array) -> tuple[mx.array, mx.array]:
        return kept(lambda: [x @ a])[0], x

    @forward.vjp
    def backward(
        primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, mx.array], _: Any
    ) -> tuple[mx.array, ...]:
        x, a = primals
        cotangent, others = cotangents
        d_x = mx.addmm(others, cotangent, a.T)
        rows = x.reshape(-1, x.shape[-1])
        return together([d_x, rows.T @ cotangent.reshape(len(rows), -1)])

    return cast(tuple[mx.array, mx.array], forward(x, a))
