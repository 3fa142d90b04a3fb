"""Keep for the backward what is dear to recompute, and recompute what is cheap.

Autodiff keeps every intermediate array. The results of matrix products are worth it; attention
probabilities (``[batch, heads, length, length]`` in every layer) and the insides of activation
functions are not: they cost a fraction of a block to compute again and most of its memory to keep.
Inside ``lean_backward`` the functions that mlx-lm's models call for them keep their inputs only,
and what norms, rotations and activations give is computed again where the gradient of an adapter
or of attention needs it (``kernels/recomputation.py``). A model that computes attention or its
activation by other means runs as it always does.

Attention in chunks of queries: the backward of flash attention (arXiv 2205.14135, section 3.1),
with MLX's own operations.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

from dora_mlx.kernels.device import on_cpu
from dora_mlx.kernels.recomputation import later, recipe_of, recomputed, remember, remembered
from dora_mlx.training import dear_exponentials
from dora_mlx.training.substitutes import standing_in

# Queries per chunk of the attention's backward; fewer save nothing that matters.
QUERIES_PER_CHUNK = 128

_ACTIVATIONS = ("silu", "gelu", "gelu_approx")
_NORMS_AND_ROPE = ("rms_norm", "layer_norm", "rope")

_attention = mx.fast.scaled_dot_product_attention
_swiglu = activations.swiglu


@contextmanager
def lean_backward() -> Iterator[None]:
    """Within the block, models keep the results of products for the backward, and little else.

    Works by standing in for the functions that the models look up while they run in this thread.
    """
    activation_functions = {name: _cheap(getattr(nn, name)) for name in _ACTIVATIONS}
    fast = {name: remembered(getattr(mx.fast, name)) for name in _NORMS_AND_ROPE}
    fast["scaled_dot_product_attention"] = lean_attention
    with ExitStack() as stack:
        stack.enter_context(standing_in(nn, activation_functions))
        stack.enter_context(standing_in(mx.fast, fast))
        models = [m for name, m in sys.modules.items() if name.startswith("mlx_lm.models.")]
        # They import swiglu by name, so each has a reference of its own.
        for module in models:
            if vars(module).get("swiglu") is _swiglu:
                stack.enter_context(standing_in(module, {"swiglu": lean_swiglu}))
        yield


def _cheap(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    return remembered(recomputed(function), function)


def lean_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """``silu(gate) * x`` that keeps its inputs; one sigmoid in the backward serves all of it.

    Args:
        gate: Of any shape.
        x: Shaped as ``gate``.
    """
    # From the recipe, which the layer that takes the result follows, to the backward, or from that
    # to the recipe: which of them a graph is built for first is not said.
    handed_over: list[mx.array] = []

    def sigmoid_of(gate: mx.array) -> mx.array:
        if handed_over:
            return handed_over.pop()
        handed_over.append(dear_exponentials.sigmoid(gate))
        return handed_over[0]

    @mx.custom_function
    def forward(gate: mx.array, x: mx.array) -> mx.array:
        return gate * dear_exponentials.sigmoid(gate) * x if on_cpu() else _swiglu(gate, x)

    @forward.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array
    ) -> tuple[mx.array, ...]:
        gate, x = later(list(primals), cotangent)
        return _swiglu_backward(gate, x, sigmoid_of(gate), cotangent)

    def recipe(cotangent: mx.array) -> mx.array:
        own_gate, own_x = later([gate, x], cotangent)
        return own_gate * sigmoid_of(own_gate) * own_x

    return remember(cast(mx.array, forward(gate, x)), recipe)


def _swiglu_backward(
    gate: mx.array, x: mx.array, sigmoid: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array]:
    silu = gate * sigmoid
    return cotangent * x * (sigmoid + silu * (1 - sigmoid)), cotangent * silu


def lean_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    mask: Any = None,
    sinks: mx.array | None = None,
    **options: Any,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention`` that keeps its inputs and recomputes the rest.

    Args:
        queries: ``[batch, heads, length, head_dim]``.
        keys: ``[batch, key_heads, key_length, head_dim]``.
        values: ``[batch, key_heads, key_length, value_dim]``.
        mask: ``None``, ``"causal"``, or an array ``[..., length or 1, key_length]``.
        sinks: As for the original, which then runs as it is.
        **options: As for the original.
    """
    if sinks is not None:
        return _attention(queries, keys, values, mask=mask, sinks=sinks, **options)

    recipes = [recipe_of(x) for x in (queries, keys, values)]
    attend, attend_backward = _attention_with(queries, options)

    @mx.custom_function
    def forward(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        # Where gradients are traced, MLX computes all probabilities at once in the forward too.
        results: list[mx.array] = []
        notes: list[mx.array] = []
        for rows, seen, part in _chunks(mask, queries.shape[2], keys.shape[2]):
            # One chunk at a time: its probabilities go before the next one's come.
            (q,) = mx.depends([queries[:, :, rows]], results[-1:])
            result, *own_notes = attend(q, keys[:, :, :seen], values[:, :, :seen], part)
            results.append(result)
            notes += own_notes
        return mx.concatenate(results, axis=2), *notes

    @forward.vjp
    def backward(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        cotangent, (whole, *notes) = cotangents[0], outputs
        queries, keys, values = (recipe(cotangent) for recipe in recipes)
        d_queries: list[mx.array] = []
        d_keys, d_values = keys[:, :, :0], values[:, :, :0]
        chunks = list(_chunks(mask, queries.shape[2], keys.shape[2]))
        for number, (rows, seen, part) in enumerate(chunks):
            # As in the forward.
            q = mx.depends([queries[:, :, rows]], [d_keys, d_values] if d_queries else [])[0]
            k, v, d = keys[:, :, :seen], values[:, :, :seen], cotangent[:, :, rows]
            found = whole[:, :, rows], *_share(notes, number, len(chunks))
            gradients = attend_backward(q, k, v, part, d, found)
            d_queries.append(gradients[0])
            d_keys, d_values = _sum(d_keys, gradients[1]), _sum(d_values, gradients[2])
        return mx.concatenate(d_queries, axis=2), d_keys, d_values

    return cast(tuple[mx.array, ...], forward(queries, keys, values))[0]


def _attention_with(
    queries: mx.array, options: dict[str, Any]
) -> tuple[Callable[..., tuple[mx.array, ...]], Callable[..., Any]]:
    """Attention of a chunk, and its backward, which takes what the first returned as well."""
    if dear_exponentials.serves(queries, options):
        scale = options["scale"]
        return (
            partial(dear_exponentials.attend, scale=scale),
            partial(dear_exponentials.attend_backward, scale=scale),
        )

    def attend(
        queries: mx.array, keys: mx.array, values: mx.array, mask: Any
    ) -> tuple[mx.array, ...]:
        return (_attention(queries, keys, values, mask=mask, **options),)

    def backward(
        queries: mx.array, keys: mx.array, values: mx.array, mask: Any, d: mx.array, found: Any
    ) -> list[mx.array]:
        return mx.vjp(partial(_attention, mask=mask, **options), [queries, keys, values], [d])[1]

    return attend, backward


def _share(items: list[mx.array], number: int, of: int) -> list[mx.array]:
    """The items of one of the parts that ``items`` was put together from."""
    size = len(items) // of
    return items[number * size : (number + 1) * size]


def _sum(total: mx.array, part: mx.array) -> mx.array:
    """Gradients of the first keys, of which later chunks see no fewer than earlier ones."""
    seen = total.shape[2]
    if seen == part.shape[2]:
        return total + part
    return mx.concatenate([total + part[:, :, :seen], part[:, :, seen:]], axis=2)


def _chunks(mask: Any, length: int, key_length: int) -> Iterator[tuple[slice, int, Any]]:
    """Chunks of queries: which, how many keys they may see, and their part of the mask."""
    for start in range(0, length, QUERIES_PER_CHUNK):
        rows = slice(start, start + QUERIES_PER_CHUNK)
        yield rows, *_visible(mask, rows, length, key_length)


def _visible(mask: Any, rows: slice, length: int, key_length: int) -> tuple[int, Any]:
    """How many keys the queries in ``rows`` may see, and their part of the mask."""
    stop = min(rows.stop, length)
    if isinstance(mask, str):
        # Keys before the first query come from a cache and are seen by all.
        offset = key_length - length
        position = mx.arange(rows.start, stop)[:, None] + offset
        return stop + offset, mx.arange(stop + offset)[None] <= position
    if mask is None or mask.shape[-2] == 1:
        return key_length, mask
    return key_length, mask[..., rows, :]
