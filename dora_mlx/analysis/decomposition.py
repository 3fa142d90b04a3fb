"""How far a weight moved in magnitude and in direction (arXiv 2402.09353, section 3.2).

    dM = mean_n |m_n' - m_n|              equation 3
    dD = mean_n (1 - cos(v_n', w_n))      equation 4

w_n are the vectors of W that DoRA keeps one magnitude for: its output rows, in MLX's layout
``[out, in]`` of the paper's columns; the columns of an embedding ``[tokens, dims]``. v' is the
trained vector, or the direction of DoRA, W + s (A B)^T, which is the same up to its length.

1 - cos of a small update d is far below the rounding of a cosine. It is taken from the part of d
at right angles to w, which is small by itself:

    sin^2 = (||d||^2 - <w, d>^2 / ||w||^2) / ||w + d||^2,     1 - cos = sin^2 / (1 + cos)

and a change of length from (2 <w, d> + ||d||^2) / (||w + d|| + ||w||). The three sums are float64
over blocks of rows, so nothing of the size of W is held for a low-rank update.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from dora_mlx.kernels.frozen_weight import row_blocks, row_shape, weight_dtype, weight_rows
from dora_mlx.kernels.row_norm import Update
from dora_mlx.layers import DoRAEmbedding, LoRAEmbedding
from dora_mlx.layers.lora import LowRankLayer

Floats = NDArray[np.float64]

_LONGEST_CHUNK = 1 << 20


@dataclass(frozen=True)
class ChangedWeight:
    """A weight W ``[rows, width]`` of the base model and what was added to it.

    Attributes:
        base: The layer that holds W.
        dtype: Precision in which W was when training began.
        added: Rows ``start`` to ``stop`` of what was added, float32.
        singular_values: Those of what was added: ``[count]``, or ``[experts, count]``.
        magnitude: DoRA's m, one per vector; ``None`` where lengths are those of the sum.
        by_column: Whether the vectors are the columns of W.
    """

    base: nn.Module
    dtype: mx.Dtype
    added: Callable[[int, int], mx.array]
    singular_values: Callable[[], Floats]
    magnitude: Floats | None = None
    by_column: bool = False


@dataclass(frozen=True)
class VectorChanges:
    """What happened to every vector of a weight; all float64 ``[vectors]``.

    ``before`` and ``after`` are lengths, ``direction`` is 1 - cos, from 0 to 2, and ``relative``
    the length of the whole change as a share of ``before``.
    """

    before: Floats
    after: Floats
    direction: Floats
    relative: Floats


def low_rank_change(layer: LowRankLayer) -> ChangedWeight:
    """What a LoRA or DoRA layer has learned."""
    update = layer._update()
    magnitude = layer.get("magnitude")
    return ChangedWeight(
        layer.base,
        mx.float32,
        lambda start, stop: update.rows(slice(start, stop)),
        lambda: _low_rank_singular_values(update),
        None if magnitude is None else _float64(magnitude).reshape(-1),
        isinstance(layer, LoRAEmbedding | DoRAEmbedding),
    )


def dense_change(base: nn.Module, trained: mx.array) -> ChangedWeight:
    """What full fine-tuning made of the weight of ``base``: ``trained`` has the shape of W.

    Unlike that of a low-rank layer this holds the whole difference, float32.
    """
    dtype = weight_dtype(base)
    trained = trained.reshape(row_shape(base))
    difference = np.empty(trained.shape, np.float32)
    for start, stop in row_blocks(base):
        rows = weight_rows(base, start, stop, dtype).astype(mx.float32)
        difference[start:stop] = trained[start:stop].astype(mx.float32) - rows
    return ChangedWeight(
        base,
        dtype,
        lambda start, stop: mx.array(difference[start:stop]),
        lambda: _dense_singular_values(difference),
        by_column=isinstance(base, nn.Embedding | nn.QuantizedEmbedding),
    )


def vector_changes(weight: ChangedWeight) -> VectorChanges:
    """Lengths and angles before and after, computed in blocks of rows."""
    own, cross, added = _sums(weight)
    length = np.sqrt(own)
    direction_length = np.sqrt(np.maximum(own + 2 * cross + added, 0))
    cosine = _divide(own + cross, length * direction_length)
    across = np.maximum(added - _divide(np.square(cross), own), 0)
    sine_squared = _divide(across, np.square(direction_length))
    # Only for an acute angle is the numerator the small number; otherwise 1 - cos is exact.
    turned = np.where(cosine > 0, sine_squared / (1 + np.maximum(cosine, 0)), 1 - cosine)
    # A vector of zeros has no direction: it stayed where it was, or its cosine counts as 0.
    turned = np.where((added == 0) & (own == 0), 0, turned)
    if weight.magnitude is None:
        gain = np.ones_like(length)
        after = length + _divide(2 * cross + added, direction_length + length)
    else:
        gain = _divide(weight.magnitude, direction_length)
        after = np.abs(weight.magnitude)
        turned = np.where(weight.magnitude < 0, 2 - turned, turned)
    # ||g (w + d) - w||^2
    moved = np.square(gain - 1) * own + 2 * gain * (gain - 1) * cross + np.square(gain) * added
    return VectorChanges(length, after, turned, _divide(np.sqrt(np.maximum(moved, 0)), length))


def effective_rank(weight: ChangedWeight) -> float:
    """Effective rank of what was added to W: exp of the entropy of its singular values.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007:
    exp(-sum p_k log p_k) with p_k = sigma_k / sum sigma. It is k for k equal singular values and
    0 where nothing was added. For DoRA it is that of s (A B)^T, before the magnitude; for experts
    the mean over them.
    """
    values = np.atleast_2d(weight.singular_values())
    shares = _divide(values, values.sum(axis=-1, keepdims=True))
    logs = np.log(np.where(shares > 0, shares, 1))
    ranks = np.exp(-(shares * logs).sum(axis=-1))
    return float(np.where(shares.any(axis=-1), ranks, 0).mean())


def _sums(weight: ChangedWeight) -> tuple[Floats, Floats, Floats]:
    """``||w||^2``, ``<w, d>`` and ``||d||^2`` of every vector."""
    by_column = weight.by_column
    parts: list[Floats] = []
    for start, stop in row_blocks(weight.base):
        rows = weight_rows(weight.base, start, stop, weight.dtype)
        w, d = _float64(rows), _float64(weight.added(start, stop))
        axes = "ij,ij->j" if by_column else "ij,ij->i"
        sums = np.stack([np.einsum(axes, w, w), np.einsum(axes, w, d), np.einsum(axes, d, d)])
        parts = [parts[0] + sums] if by_column and parts else [*parts, sums]
        # Buffers of the host, and MLX does not know that they are done with.
        del rows, w, d
        mx.clear_cache()
    own, cross, added = np.concatenate(parts, axis=1)
    return own, cross, added


def _low_rank_singular_values(update: Update) -> Floats:
    """Of s (A B)^T, from the triangles of A and B^T: ``[..., rank]``."""
    a, b = _float64(update.a), _float64(update.b)
    triangle_a = np.linalg.qr(a, mode="r")
    triangle_b = np.linalg.qr(np.swapaxes(b, -1, -2), mode="r")
    product = triangle_a @ np.swapaxes(triangle_b, -1, -2)
    values: Floats = abs(update.scale) * np.linalg.svd(product, compute_uv=False)
    return values


def _dense_singular_values(difference: NDArray[np.float32]) -> Floats:
    """Through the Gram matrix of the shorter side, summed in float64 over the longer."""
    tall = difference if difference.shape[0] >= difference.shape[1] else difference.T
    side = tall.shape[1]
    gram = np.zeros((side, side))
    chunk = max(1, _LONGEST_CHUNK // side)
    for start in range(0, tall.shape[0], chunk):
        rows = tall[start : start + chunk].astype(np.float64)
        gram += rows.T @ rows
    squares = np.linalg.eigvalsh(gram)
    # What is below the rounding of the largest is noise around zero.
    floor = squares[-1] * side * np.finfo(np.float64).eps
    values: Floats = np.sqrt(np.where(squares > floor, squares, 0))
    return values


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient, and 0 where it has none."""
    result = np.zeros(np.broadcast_shapes(numerator.shape, denominator.shape))
    np.divide(numerator, denominator, out=result, where=denominator != 0)
    return result


def _float64(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32)).astype(np.float64)
