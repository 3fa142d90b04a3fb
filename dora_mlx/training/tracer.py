"""MLX's transformations of functions, by placeholders where a gradient is a custom one.

MLX exports graphs, but none with custom gradients, which a training step is full of. So while a
``Tracer`` is installed a call with a custom gradient leaves two kinds of placeholder: one for its
results and one for the gradients of its arguments. Autodiff runs once around them, and what the
call's own backward makes is traced beside it. ``graph.py`` puts the two together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx

from dora_mlx.kernels.recomputation import flattened
from dora_mlx.training.substitutes import standing_in

Arrays = list[mx.array]

# Values of placeholders, which nothing else in a graph has.
_FIRST_MARK = 1_000_003
_MARKS_END = 1 << 24


@dataclass
class _Call:
    """One call of a function with a custom gradient."""

    arguments: Arrays
    results: Arrays
    backward: Callable[[Arrays, Arrays, Arrays], Arrays]


@dataclass
class _OtherCalls(Exception):
    """A function was run again, and its calls were not those of the time before.

    So it is with a layer that computes its norm once in a step: the next time it has fewer.
    """

    found: list[_Call]


@dataclass(frozen=True)
class _Placeholder:
    """An array that says by its values which other array it stands for."""

    mark: int
    array: mx.array


class Tracer:
    """MLX's transformations of functions, through custom gradients by placeholders.

    Attributes:
        resolved: Marks of placeholders, each with the array that it stands for.
    """

    def __init__(self) -> None:
        self.resolved: list[tuple[int, mx.array]] = []
        self._marks = count(_FIRST_MARK)
        self._calls: list[_Call] | None = None
        self._replies: Iterator[Arrays] | None = None
        self._plain_vjp = mx.vjp
        self._plain_gather_mm = mx.gather_mm

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block MLX's transformations in this thread are those of this object."""
        substitutes = {
            "custom_function": lambda function: _CustomFunction(self, function),
            "checkpoint": self._checkpoint,
            "vjp": self._vjp,
            "value_and_grad": self._value_and_grad,
            "gather_mm": self._gather_mm,
            "eval": _refuse_to_evaluate,
        }
        with standing_in(mx, substitutes):
            yield

    def call(
        self,
        function: Callable[..., Arrays],
        arguments: Arrays,
        backward: Callable[[Arrays, Arrays, Arrays], Arrays],
    ) -> Arrays:
        """Results of a function with a custom gradient, or what stands for them."""
        # No gradient is taken of what is inside.
        with self._recording(None, None) as (calls, replies):
            results = function(*arguments)
        if calls is not None:
            calls.append(_Call(arguments, results, backward))
        reply = None if replies is None else next(replies, None)
        return results if reply is None or _shapes(reply) != _shapes(results) else reply

    def _vjp(self, function: Any, primals: Any, cotangents: Any) -> tuple[Arrays, Arrays]:
        """``mx.vjp``."""
        with self._recording(None, None):
            calls, _ = self._recorded(function, primals, None)
            while calls:
                try:
                    return self._vjp_around(function, list(primals), list(cotangents), calls)
                except _OtherCalls as error:
                    calls = error.found
            return self._plain_vjp(function, primals, cotangents)

    def _vjp_around(
        self, function: Any, primals: Arrays, cotangents: Arrays, calls: list[_Call]
    ) -> tuple[Arrays, Arrays]:
        """The gradients of ``function``, in which ``calls`` were found.

        Raises:
            _OtherCalls: If it has other calls now.
        """
        replies = [[self._placeholder(array) for array in call.results] for call in calls]
        wanted = [[self._placeholder(a) for a in _floats(call.arguments)] for call in calls]

        def around(*arrays: mx.array) -> Arrays:
            given = iter(arrays[len(primals) :])
            stand_ins = [[next(given).squeeze(0) for _ in reply] for reply in replies]
            found, outputs = self._recorded(function, arrays[: len(primals)], iter(stand_ins))
            if [_shapes(call.results) for call in found] != [_shapes(c.results) for c in calls]:
                raise _OtherCalls(found)
            calls[:] = found
            # An axis more, because a result that is an argument itself gets no gradient.
            return [*outputs, *(a[None] for call in found for a in _floats(call.arguments))]

        outputs, gradients = self._plain_vjp(
            around,
            [*primals, *(stand_in.array for reply in replies for stand_in in reply)],
            [*cotangents, *(stand_in.array for part in wanted for stand_in in part)],
        )
        arriving = iter(gradients[len(primals) :])
        arrived_at = [[next(arriving).squeeze(0) for _ in reply] for reply in replies]
        parts = list(zip(calls, replies, wanted, arrived_at, strict=True))
        # Last calls first, as in a backward: one may leave to the next what it has computed.
        for call, reply, gradient, arrived in reversed(parts):
            self._resolve(reply, call.results)
            found = call.backward(call.arguments, arrived, [r.array.squeeze(0) for r in reply])
            kinds = zip(call.arguments, found, strict=True)
            self._resolve(gradient, [g for a, g in kinds if _is_float(a)])
        return outputs[: len(cotangents)], gradients[: len(primals)]

    @contextmanager
    def _recording(
        self, calls: list[_Call] | None, replies: Iterator[Arrays] | None
    ) -> Iterator[tuple[list[_Call] | None, Iterator[Arrays] | None]]:
        """Calls go to ``calls`` and are answered by ``replies``; gives what was so before."""
        before = self._calls, self._replies
        self._calls, self._replies = calls, replies
        try:
            yield before
        finally:
            self._calls, self._replies = before

    def _recorded(
        self, function: Any, primals: Any, replies: Iterator[Arrays] | None
    ) -> tuple[list[_Call], Arrays]:
        """The outermost calls in ``function`` and its results."""
        calls: list[_Call] = []
        with self._recording(calls, replies):
            outputs = function(*primals)
        return calls, [outputs] if isinstance(outputs, mx.array) else list(outputs)

    def _value_and_grad(self, function: Any, argnums: int = 0) -> Any:
        """``mx.value_and_grad`` for one argument, an array or a tree."""

        def call(*arguments: Any) -> tuple[mx.array, Any]:
            before, argument, after = (
                arguments[:argnums], arguments[argnums], arguments[argnums + 1 :],
            )  # fmt: skip
            arrays, rebuild = flattened(argument)

            def of_arrays(*arrays: mx.array) -> Any:
                return function(*before, rebuild(list(arrays)), *after)

            (value, *_), gradients = self._vjp(of_arrays, arrays, [mx.array(1.0)])
            return value, rebuild(gradients)

        return call

    def _checkpoint(self, function: Any) -> Any:
        """``mx.checkpoint``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            arrays, rebuild = flattened([args, kwargs])
            rebuild_output: Any = None

            def of_arrays(*arrays: mx.array) -> Arrays:
                nonlocal rebuild_output
                filled_args, filled_kwargs = rebuild(list(arrays))
                outputs, rebuild_output = flattened(function(*filled_args, **filled_kwargs))
                return outputs

            def backward(arguments: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
                # What MLX does; the outputs hold the second forward back until the first is done.
                return self._vjp(of_arrays, mx.depends(arguments, outputs), cotangents)[1]

            results = self.call(of_arrays, arrays, backward)
            return rebuild_output(results)

        return call

    def _gather_mm(self, a: mx.array, b: mx.array, *rest: Any, **options: Any) -> mx.array:
        """``mx.gather_mm``, whose own backward MLX cannot export where the indices are sorted."""
        if not options.get("sorted_indices"):
            return self._plain_gather_mm(a, b, *rest, **options)

        def function(a: mx.array, b: mx.array) -> Arrays:
            return [self._plain_gather_mm(a, b, *rest, **options)]

        def backward(arguments: Arrays, cotangents: Arrays, _: Arrays) -> Arrays:
            a, b = arguments
            d_a = self._plain_gather_mm(cotangents[0], b.swapaxes(-1, -2), *rest, **options)
            return [d_a, mx.depends([mx.zeros(b.shape, b.dtype)], [a, *cotangents])[0]]

        return self.call(function, [a, b], backward)[0]

    def _placeholder(self, array: mx.array) -> _Placeholder:
        """Something shaped as ``array`` with an axis more."""
        mark = next(self._marks)
        if mark >= _MARKS_END:
            raise ValueError("there are no more marks for a graph of this size")
        stand_in = mx.broadcast_to(mx.array(float(mark)), (1, *array.shape)).astype(array.dtype)
        return _Placeholder(mark, stand_in)

    def _resolve(self, placeholders: list[_Placeholder], arrays: Arrays) -> None:
        marks = [placeholder.mark for placeholder in placeholders]
        self.resolved += zip(marks, arrays, strict=True)


class _CustomFunction:
    """``mx.custom_function``."""

    def __init__(self, tracer: Tracer, function: Callable[..., Any]):
        self._tracer = tracer
        self._function = function
        self._backward: Callable[..., Any]

    def vjp(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator of the backward."""
        self._backward = backward
        return backward

    def __call__(self, *arguments: mx.array) -> Any:
        single = False

        def function(*arguments: mx.array) -> Arrays:
            nonlocal single
            outputs = self._function(*arguments)
            single = isinstance(outputs, mx.array)
            return [outputs] if single else list(outputs)

        def backward(arguments: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
            primals = arguments[0] if len(arguments) == 1 else tuple(arguments)
            found = self._backward(
                primals,
                cotangents[0] if single else tuple(cotangents),
                outputs[0] if single else tuple(outputs),
            )
            return [found] if isinstance(found, mx.array) else list(found)

        results = self._tracer.call(function, list(arguments), backward)
        return results[0] if single else tuple(results)


def _shapes(arrays: Arrays) -> list[tuple[int, ...]]:
    return [array.shape for array in arrays]


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _floats(arrays: Arrays) -> Arrays:
    return [array for array in arrays if _is_float(array)]


def _refuse_to_evaluate(*_: Any) -> None:
    # As inside mx.compile.
    raise ValueError("what is traced has no values")
