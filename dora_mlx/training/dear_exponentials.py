"""Attention, activations and cross-entropy on the CPU, where exponentials are dear.

For 1.8 million float32 values MLX's CPU backend takes 26 ms for exponentials, 10 ms for powers, 11
ms to choose by a mask and 1 ms to add (one core, x86-64). So attention in chunks of queries, which
skips the keys that none of them sees, adds its mask and takes powers of e, costs less than the
fused operation, forward and backward; and one power of every logit serves loss and gradient.
"""

import math
from typing import Any

import mlx.core as mx

from dora_mlx.kernels.device import on_cpu


def serves(queries: mx.array, options: dict[str, Any]) -> bool:
    """Whether an attention is better computed here."""
    return on_cpu() and queries.dtype == mx.float32 and not options.keys() - {"scale"}


def sigmoid(x: mx.array) -> mx.array:
    """``mx.sigmoid``, up to the last digits on the CPU."""
    return 1 / (1 + mx.power(math.e, -x)) if on_cpu() else mx.sigmoid(x)


def attend(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, scale: float
) -> tuple[mx.array, mx.array, mx.array]:
    """Attention ``[batch, heads, length, value_dim]``, and what ``attend_backward`` needs of it.

    Args:
        queries: ``[batch, heads, length, head_dim]``.
        keys: ``[batch, key_heads, key_length, head_dim]``.
        values: ``[batch, key_heads, key_length, value_dim]``.
        mask: Boolean or to be added, broadcast to ``[batch, heads, length, key_length]``.
        scale: Of the products of queries and keys.

    Returns:
        The result; the largest score of every query and the sum of its powers relative to that,
        each ``[batch, key_heads, heads / key_heads * length, 1]``.
    """
    scores = _scores(_by_key_head(scale * queries, keys), keys, mask, queries.shape)
    largest = scores.max(axis=-1, keepdims=True)
    powers = mx.power(math.e, scores - largest)
    totals = powers.sum(axis=-1, keepdims=True)
    # Divided here there are head_dim values of a query to divide, and not one for every key.
    result = (powers @ values) / totals
    return result.reshape(*queries.shape[:3], values.shape[-1]), largest, totals


def attend_backward(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | None,
    cotangent: mx.array,
    found: tuple[mx.array, mx.array, mx.array],
    scale: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of ``attend`` for queries, keys and values, given that of its result.

    ``found`` is what ``attend`` returned. With U the powers and t their sums, P = U / t, so
    dS = P (dP - sum_k P dP) = U (d V^T - sum d y) for d = dy / t: nothing is divided that has a
    value for every key, and y gives the sum (FlashAttention, arXiv 2205.14135, appendix B.2).
    """
    result, largest, totals = found
    rows, d = _by_key_head(scale * queries, keys), _by_key_head(cotangent, keys) / totals
    powers = mx.power(math.e, _scores(rows, keys, mask, queries.shape) - largest)
    own = (d * _by_key_head(result, keys)).sum(axis=-1, keepdims=True)
    d_values = powers.swapaxes(-1, -2) @ d
    d_scores = powers * (d @ values.swapaxes(-1, -2) - own)
    d_queries = (scale * (d_scores @ keys)).reshape(queries.shape)
    return d_queries, d_scores.swapaxes(-1, -2) @ rows, d_values


def cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Sum of the cross-entropies, and its gradient with respect to the logits.

    Args:
        logits: ``[n, vocabulary]`` float32.
        targets: ``[n]``, indices into the vocabulary.

    Returns:
        A float32 scalar, and ``[n, vocabulary]`` float32.
    """
    largest = logits.max(axis=-1, keepdims=True)
    powers = mx.power(math.e, logits - largest)
    totals = powers.sum(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
    gradient = (powers / totals).at[mx.arange(len(targets)), targets].subtract(1)
    return (mx.log(totals) + largest - chosen).sum(), gradient


def _by_key_head(x: mx.array, keys: mx.array) -> mx.array:
    """``[batch, heads, length, n] -> [batch, key_heads, heads / key_heads * length, n]``."""
    return x.reshape(x.shape[0], keys.shape[1], -1, x.shape[-1])


def _scores(
    rows: mx.array, keys: mx.array, mask: mx.array | None, shape: tuple[int, ...]
) -> mx.array:
    """``[batch, key_heads, rows, key_length]`` for scaled queries that were of ``shape``."""
    scores = rows @ keys.swapaxes(-1, -2)
    if mask is None:
        return scores
    grouped = scores.reshape(shape[0], keys.shape[1], -1, shape[2], scores.shape[-1])
    return (grouped + _added(mask, grouped.shape)).reshape(scores.shape)


def _added(mask: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The mask as something to add to scores of ``[batch, key_heads, group, length, keys]``."""
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, mx.finfo(mx.float32).min)
    if mask.ndim < 3:
        return mask
    groups = shape[1:3] if mask.shape[-3] > 1 else (1, 1)
    return mask.reshape(*mask.shape[:-3], *groups, *mask.shape[-2:])
