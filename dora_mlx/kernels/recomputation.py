"""Inputs that a backward computes again instead of keeping.

The gradient of A needs the input of the layer. That is often the result of a norm or of an
activation, cheap to compute from what the backward keeps anyway, and as large as the products. So
who computes it leaves a recipe, and who needs it in the backward follows that.
"""

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_map

# From the cotangent at which a backward has come to need an array, to the array.
Recipe = Callable[[mx.array], mx.array]

# By identity of the array, for as long as the model's code refers to it.
_recipes: dict[int, tuple[weakref.ref[mx.array], Recipe]] = {}


def remembered(
    function: Callable[..., mx.array], anew: Callable[..., mx.array] | None = None
) -> Callable[..., mx.array]:
    """``function``, whose results ``recipe_of`` knows.

    Args:
        function: Its arguments are kept by the recipe; positional arrays are what it depends on.
        anew: What the recipe computes with the same arguments; ``function`` itself by default.
    """

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> mx.array:
        sources = [recipe_of(x) if isinstance(x, mx.array) else None for x in arguments]

        def recipe(cotangent: mx.array) -> mx.array:
            own = [
                x if source is None else source(cotangent)
                for x, source in zip(arguments, sources, strict=True)
            ]
            return (anew or function)(*own, **options)

        return remember(function(*arguments, **options), recipe)

    return call


def remember(result: mx.array, recipe: Recipe) -> mx.array:
    """``result``, which ``recipe_of`` knows for as long as anything in Python refers to it."""
    key = id(result)
    _recipes[key] = weakref.ref(result, lambda _: _recipes.pop(key, None)), recipe
    return result


def recipe_of(x: mx.array) -> Recipe:
    """How a backward gets ``x``: computed again if its maker was ``remembered``, else as it is.

    Either way it depends on the cotangent. Without that, mx.compile finds the operations of the
    forward again and keeps their results after all.
    """
    known = _recipes.get(id(x))
    if known is not None and known[0]() is x:
        return known[1]
    return lambda cotangent: later([x], cotangent)[0]


def later(arrays: list[mx.array], *cotangents: mx.array) -> list[mx.array]:
    """The same arrays, available only when the backward has come to ``cotangents``."""
    return cast(list[mx.array], mx.depends(arrays, list(cotangents)))


def together(gradients: list[mx.array]) -> tuple[mx.array, ...]:
    """The same arrays, none of them available before all are.

    A backward goes on with the gradient of an input, and may come to those of parameters at its
    end: until then what they need, such as the inputs of every layer, is kept.
    """
    return tuple(mx.depends(gradients, gradients))


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, whose backward computes it again from its arguments alone.

    ``mx.checkpoint`` lets that begin as soon as the forward has ended, and MLX then has the insides
    of several blocks in memory at a time. Here it begins when the cotangents are there.

    Args:
        function: Arguments and result are trees of arrays and other things.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        arrays, rebuild = flattened([args, kwargs])
        rebuild_result: Any = None

        def of_arrays(*arrays: mx.array) -> list[mx.array]:
            nonlocal rebuild_result
            own_args, own_kwargs = rebuild(list(arrays))
            results, rebuild_result = flattened(function(*own_args, **own_kwargs))
            return results

        forward = mx.custom_function(of_arrays)

        @forward.vjp
        def backward(primals: Any, cotangents: list[mx.array], _: Any) -> Any:
            inputs = [primals] if isinstance(primals, mx.array) else list(primals)
            gradients = mx.vjp(of_arrays, later(inputs, *cotangents), cotangents)[1]
            return tuple(gradients) if len(gradients) > 1 else gradients[0]

        results = forward(*arrays)
        return rebuild_result(results)

    return call


def flattened(tree: Any) -> tuple[list[mx.array], Callable[[list[mx.array]], Any]]:
    """The arrays in a tree, in order, and how to build a tree like it from others."""
    leaves: list[mx.array] = []

    def take(value: Any) -> Any:
        if isinstance(value, mx.array):
            leaves.append(value)
        return value

    tree_map(take, tree)

    def rebuild(arrays: list[mx.array]) -> Any:
        left = iter(arrays)
        return tree_map(lambda v: next(left) if isinstance(v, mx.array) else v, tree)

    return leaves, rebuild


def product(x: mx.array, a: mx.array) -> tuple[mx.array, mx.array]:
    """``x @ a``: ``[..., in] x [in, out] -> [..., out]``, and x for who else needs it.

    The backward follows the recipe of x. To what the other makes of the second result the gradient
    of x adds that of the product in place, where two uses of x would be two arrays and their sum.
    """
    recipe, width = recipe_of(x), x.shape[-1]

    @mx.custom_function
    def forward(x: mx.array, a: mx.array) -> tuple[mx.array, mx.array]:
        return x @ a, x

    @forward.vjp
    def backward(
        primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, mx.array], _: Any
    ) -> tuple[mx.array, ...]:
        cotangent, others = cotangents
        rows = recipe(cotangent).reshape(-1, width)
        d_x = mx.addmm(others, cotangent, primals[1].T)
        return together([d_x, rows.T @ cotangent.reshape(len(rows), -1)])

    return cast(tuple[mx.array, mx.array], forward(x, a))
