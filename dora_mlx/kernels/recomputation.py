"""Functions whose backward keeps what is dear to compute and computes the rest again.

Of what a transformer block makes, the results of matrix products are dear. Norms, rotations,
activations and sums take a fraction of its time to compute again and most of its memory to keep:
selective activation recomputation (arXiv 2205.05198, section 5), by what a block calls and not by
its architecture. With nothing kept it is gradient checkpointing (arXiv 1604.06174).
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_map

Arrays = list[mx.array]
Compute = Callable[[], Arrays]

# Arrays of fewer bytes than this are sooner kept than traced again, which takes milliseconds.
_WORTH_TRACING = 1 << 22
# Calls that may be traced again for an argument.
_LONGEST_RUN = 8

_LEAF = object()

# How the results of ``kept`` come about in a ``recomputed`` function.
_way: ContextVar[Callable[[Compute], Arrays] | None] = ContextVar("way", default=None)


def recomputed(function: Callable[..., Any], keep: bool = False) -> Callable[..., Any]:
    """``function``, whose backward computes it again from its arguments.

    ``mx.checkpoint`` lets that begin as soon as the forward has ended, and MLX then has the insides
    of several blocks in memory at a time. Here it begins when the cotangents are there.

    Args:
        function: Arguments and result are trees of arrays and other things.
        keep: Whether the backward has what is ``kept`` in the function from its forward. Then
            it also makes large arguments anew that are the results of another such call.
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
        self._origins = [_origin_of(array) for array in self._arrays]
        self._count = 0
        self._rebuild_result: Callable[[Sequence[mx.array]], Any]
        self._rebuild_kept: Callable[[Sequence[mx.array]], Any]

    def result(self) -> Any:
        """What the function returns."""
        forward = mx.custom_function(self._forward)
        forward.vjp(self._backward)
        outputs = cast(Arrays, forward(*self._arrays))
        results, kept_arrays = outputs[: self._count], outputs[self._count :]
        run = 1 + max((origin.run for origin in self._origins if origin), default=0)
        if self._keep and run < _LONGEST_RUN:
            for index, result in enumerate(results):
                if result.nbytes >= _WORTH_TRACING:
                    _remember(result, _Origin(self, kept_arrays, index, run))
        return self._rebuild_result(results)

    def _at(self, cotangents: Arrays, arrays: Arrays, kept_arrays: Arrays) -> tuple[Arrays, Arrays]:
        """Arguments and what was kept, when the backward has come to the cotangents."""
        pairs = list(zip(arrays, self._origins, strict=True))
        own = [array for array, origin in pairs if origin is None]
        left = iter(later([*own, *kept_arrays], *cotangents))
        inputs = [origin(cotangents) if origin else next(left) for _, origin in pairs]
        return inputs, list(left)

    def _again(self, arrays: Sequence[mx.array], kept_arrays: Sequence[mx.array]) -> Arrays:
        """The results, from arguments and what was kept."""
        with _found(self._rebuild_kept(kept_arrays)) if self._keep else nullcontext():
            return self._compute(arrays)

    def results_at(self, cotangents: Arrays, kept_arrays: Arrays) -> Arrays:
        """The results, when the backward has come to the cotangents."""
        return self._again(*self._at(cotangents, self._arrays, kept_arrays))

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
        own = cotangents[: self._count]
        inputs, kept_arrays = self._at(own, inputs, outputs[self._count :])
        count = len(inputs)

        def again(*arrays: mx.array) -> Arrays:
            return self._again(arrays[:count], arrays[count:])

        gradients = gradients_of(again, inputs, own, kept_arrays)
        return tuple(gradients) if count > 1 else gradients[0]


@dataclass(frozen=True)
class _Origin:
    """How an array came about: one of the results of a call.

    With the products of a transformer block at hand, its result takes two sums to make. So it is
    kept once in a run of blocks.

    Attributes:
        call: The call.
        kept_arrays: What was kept in it.
        index: Which of its results the array is.
        run: How many calls it takes to make it, the ones before for an argument included.
    """

    call: _Call
    kept_arrays: Arrays
    index: int
    run: int

    def __call__(self, cotangents: Arrays) -> mx.array:
        """The array, when the backward has come to the cotangents."""
        return self.call.results_at(cotangents, self.kept_arrays)[self.index]


# By identity of the array, for as long as the model's code refers to it.
_origins: dict[int, tuple[weakref.ref[mx.array], _Origin]] = {}


def _remember(result: mx.array, origin: _Origin) -> None:
    key, forget = id(result), _origins.pop
    _origins[key] = weakref.ref(result, lambda _: forget(key, None)), origin


def _origin_of(array: mx.array) -> _Origin | None:
    known = _origins.get(id(array))
    return known[1] if known is not None and known[0]() is array else None


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
