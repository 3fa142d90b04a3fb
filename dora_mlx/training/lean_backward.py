"""Keep for the backward what is dear to recompute, and recompute what is cheap.

Autodiff keeps every intermediate array. The results of matrix products are worth it; attention
probabilities (``[batch, heads, length, length]`` in every layer), norms, rotations and the insides
of activation functions are not: they take a fraction of a block's time to compute again and most of
its memory to keep. Inside ``lean_backward`` a transformer block keeps its input and the results of
its products, whatever else it is made of (``kernels/recomputation.py``), and two functions that
most of mlx-lm's models call have a backward of their own. What a block computes by products that no
layer makes is computed again.

Attention in chunks of queries: the backward of flash attention (arXiv 2205.14135, section 3.1),
with MLX's own operations.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from operator import itemgetter
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import activations, mla, switch_layers

from dora_mlx.data.batches import Batch
from dora_mlx.kernels.blocked_layers import BlockedQuantizedLinear
from dora_mlx.kernels.device import on_cpu, planning_for_gpu
from dora_mlx.kernels.recomputation import dear, gradients_of, kept
from dora_mlx.layers.dora import hoisted_norms
from dora_mlx.training import dear_exponentials
from dora_mlx.training.recomputed_blocks import recomputed_blocks
from dora_mlx.training.substitutes import standing_in

# Queries per chunk of the attention's backward; fewer save nothing that matters.
QUERIES_PER_CHUNK = 128

# Layers that are little else than a product with their weight. Those with an adapter say
# themselves what is dear in them.
_PRODUCTS = (
    nn.Linear, nn.QuantizedLinear, BlockedQuantizedLinear, nn.Conv1d, nn.Conv2d,
    switch_layers.SwitchLinear, switch_layers.QuantizedSwitchLinear,
    mla.MultiLinear, mla.QuantizedMultiLinear,
)  # fmt: skip

# How far gradients may differ by rounding and by the experts that it chooses, and the share of the
# whole gradient's norm that tells a parameter's gradient from nothing.
_AGREEMENT, _NEGLIGIBLE = 0.2, 0.05

_attention = mx.fast.scaled_dot_product_attention
_swiglu = activations.swiglu


@contextmanager
def lean_backward(model: nn.Module, checkpoint: bool = False) -> Iterator[None]:
    """Within the block, ``model`` keeps results of products for the backward, and little else.

    Works by standing in for the functions that models look up while they run in this thread.

    Args:
        model: Its blocks are ``model.layers``.
        checkpoint: Whether blocks compute their products again as well.
    """
    with ExitStack() as stack:
        stack.enter_context(recomputed_blocks(model, keep=not checkpoint))
        for layer in _PRODUCTS:
            stack.enter_context(standing_in(layer, {"__call__": _dear_call(layer.__call__)}))
        fast = {"scaled_dot_product_attention": lean_attention}
        stack.enter_context(standing_in(mx.fast, fast))
        models = [m for name, m in sys.modules.items() if name.startswith("mlx_lm.models.")]
        # They import swiglu by name, so each has a reference of its own.
        for module in models:
            if vars(module).get("swiglu") is _swiglu:
                stack.enter_context(standing_in(module, {"swiglu": lean_swiglu}))
        yield


def why_not_lean(
    model: nn.Module, loss_sum: Callable[[nn.Module, Batch], mx.array], batch: Batch
) -> str | None:
    """What a model's gradients show against ``lean_backward``: they are others with it.

    So they would be if a block left to another what autodiff is to find: gradients flow through
    arguments and results of blocks alone.

    Args:
        model: In training, with its adapter.
        loss_sum: The loss.
        batch: A small one.
    """

    def gradients(context: AbstractContextManager[None]) -> dict[str, mx.array]:
        with hoisted_norms(model), context:
            found = nn.value_and_grad(model, partial(loss_sum, model))(batch)[1]
        flat = cast(dict[str, mx.array], tree_flatten(found, destination={}))
        arrays = {name: array.astype(mx.float32) for name, array in flat.items()}
        mx.eval(arrays)
        return arrays

    # Dropout would be another each time.
    with standing_in(nn.Dropout, {"__call__": lambda _, x: x}):
        plain, lean = gradients(nullcontext()), gradients(lean_backward(model))
    norms = {name: mx.linalg.norm(array) for name, array in plain.items()}
    least = _NEGLIGIBLE * mx.linalg.norm(mx.stack(list(norms.values()))) + mx.finfo(mx.float32).eps
    errors = {
        name: mx.linalg.norm(lean[name] - plain[name]) / (norms[name] + least) for name in norms
    }
    mx.eval(errors)
    # Not a number is no agreement either.
    sizes = {
        name: cast(float, mx.nan_to_num(e, nan=float("inf")).item()) for name, e in errors.items()
    }
    name, error = max(sizes.items(), key=itemgetter(1))
    return None if error <= _AGREEMENT else f"that of {name} would be another by {error:.0%}"


def _dear_call(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The call of a layer, whose result is kept for the backward of its block."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        def product(parameters: dict[str, Any], args: Any, kwargs: Any) -> mx.array:
            # Gradients flow to what is passed in, not to what the module holds.
            self.update(parameters)
            return original(self, *args, **kwargs)

        return dear(product)(self.trainable_parameters(), args, kwargs)

    return call


def lean_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """``silu(gate) * x``; result and gradient share a sigmoid on a CPU, elsewhere each is fused.

    Args:
        gate: Of any shape.
        x: Shaped as ``gate``.
    """

    @mx.custom_function
    def forward(gate: mx.array, x: mx.array) -> list[mx.array]:
        if not on_cpu():
            return [_swiglu(gate, x)]
        # One sigmoid, which is dear there, serves result and gradient.
        sigmoid = dear_exponentials.sigmoid(gate)
        return [gate * sigmoid * x, sigmoid]

    @forward.vjp
    def backward(
        primals: tuple[mx.array, mx.array], cotangents: list[mx.array], results: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        if planning_for_gpu():
            # A plan has the operations that are fused one by one, and these make as many arrays.
            return cotangents[0] * primals[1], cotangents[0] * primals[0]
        if on_cpu():
            return _swiglu_backward(*primals, cotangents[0], results[1])
        return _fused_swiglu_backward(*primals, cotangents[0])

    return cast(list[mx.array], forward(gate, x))[0]


def _swiglu_backward(
    gate: mx.array, x: mx.array, d: mx.array, sigmoid: mx.array
) -> tuple[mx.array, mx.array]:
    silu = gate * sigmoid
    return d * x * (sigmoid + silu * (1 - sigmoid)), d * silu


@partial(mx.compile, shapeless=True)
def _fused_swiglu_backward(gate: mx.array, x: mx.array, d: mx.array) -> tuple[mx.array, mx.array]:
    return _swiglu_backward(gate, x, d, mx.sigmoid(gate))


def lean_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    mask: Any = None,
    sinks: mx.array | None = None,
    **options: Any,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention`` whose probabilities are there a chunk at a time.

    Args:
        queries: ``[batch, heads, length, head_dim]``.
        keys: ``[batch, key_heads, key_length, head_dim]``.
        values: ``[batch, key_heads, key_length, value_dim]``.
        mask: ``None``, ``"causal"``, or booleans ``[..., length or 1, key_length]``.
        sinks: As for the original, which runs as it is with these, and with a mask that is to be
            added: it may have a gradient, as that of multi-head latent attention has.
        **options: As for the original.
    """
    added = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    if sinks is not None or added:
        return _attention(queries, keys, values, mask=mask, sinks=sinks, **options)

    attend, attend_backward = _attention_with(queries, options)

    @mx.custom_function
    def forward(*inputs: mx.array) -> list[mx.array]:
        compute = partial(in_chunks, *inputs)
        return kept(compute) if on_cpu() else compute()

    def in_chunks(queries: mx.array, keys: mx.array, values: mx.array) -> list[mx.array]:
        # Where gradients are traced, MLX computes all probabilities at once in the forward too.
        results: list[mx.array] = []
        notes: list[mx.array] = []
        for rows, seen, part in _chunks(mask, queries.shape[2], keys.shape[2]):
            # One chunk at a time: its probabilities go before the next one's come.
            (q,) = mx.depends([queries[:, :, rows]], results[-1:])
            result, *own_notes = attend(q, keys[:, :, :seen], values[:, :, :seen], part)
            results.append(result)
            notes += own_notes
        return [mx.concatenate(results, axis=2), *notes]

    @forward.vjp
    def backward(
        primals: tuple[mx.array, ...],
        cotangents: tuple[mx.array, ...],
        outputs: tuple[mx.array, ...],
    ) -> tuple[mx.array, ...]:
        cotangent, (whole, *notes) = cotangents[0], outputs
        queries, keys, values = primals
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
        queries: mx.array, keys: mx.array, values: mx.array, mask: Any, d: mx.array, _: Any
    ) -> list[mx.array]:
        def function(*inputs: mx.array) -> list[mx.array]:
            own_mask = inputs[3] if inputs[3:] else None
            return [_attention(*inputs[:3], mask=own_mask, **options)]

        constants = [] if mask is None else [mask]
        return gradients_of(function, [queries, keys, values], [d], constants)

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
