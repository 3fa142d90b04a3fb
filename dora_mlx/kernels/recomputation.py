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


def later(arrays: list[mx.array], cotangent: mx.array) -> list[mx.array]:
    """The same arrays, available only when the backward has come to ``cotangent``."""
    return cast(list[mx.array], mx.depends(arrays, [cotangent]))


def product(x: mx.array, a: mx.array) -> mx.array:
    """``x @ a``: ``[..., in] x [in, out] -> [..., out]``; its backward follows the recipe of x."""
    recipe, width = recipe_of(x), x.shape[-1]

    @mx.custom_function
    def forward(x: mx.array, a: mx.array) -> mx.array:
        return x @ a

    @forward.vjp
    def backward(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        rows = recipe(cotangent).reshape(-1, width)
        return cotangent @ primals[1].T, rows.T @ cotangent.reshape(len(rows), -1)

    return cast(mx.array, forward(x, a))
