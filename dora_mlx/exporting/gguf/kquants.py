"""K-quants of llama.cpp: Q4_K, Q5_K and Q6_K, searched with MLX and packed with NumPy.

A block of 256 weights holds 8 groups of 32 (Q4_K, Q5_K; w = scale level - minimum) or 16 groups
of 16 (Q6_K; w = scale level). The scales and minima of the groups are integers of 6 or 8 bits,
which share one or two float16 numbers per block. Which scale suits a group best is searched, as
in llama.cpp's reference quantizer (ggml-quants.c, MIT): levels for a row of candidate scales,
then the weighted least-squares scale for those levels, and the best of all is kept.

All of it in float32. What llama.cpp rounds to even, MLX's ``round`` does too.
"""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

BLOCK = 256
# Groups whose weights are all smaller are zero.
_TINY = 1e-15

Bytes = NDArray[np.uint8]


def pack_q4_k(weights: mx.array) -> Bytes:
    """``[blocks, 256]`` float32 to ``[blocks, 144]`` bytes."""
    steps = [-1 + 0.1 * step for step in range(21)]
    levels, head = _with_minima(weights, 15, steps)
    return np.concatenate([head, _nibbles(levels)], axis=1)


def pack_q5_k(weights: mx.array) -> Bytes:
    """``[blocks, 256]`` float32 to ``[blocks, 176]`` bytes."""
    steps = [-0.5 + 0.1 * step for step in range(16)]
    levels, head = _with_minima(weights, 31, steps)
    # Bit g of byte i is the fifth bit of weight i of group g.
    high = np.packbits(levels.reshape(-1, 8, 32) >> 4, axis=1, bitorder="little")[:, 0]
    return np.concatenate([head, high, _nibbles(levels % np.uint8(16))], axis=1)


def pack_q6_k(weights: mx.array) -> Bytes:
    """``[blocks, 256]`` float32 to ``[blocks, 210]`` bytes."""
    groups = weights.reshape(-1, 16, 16)
    scales = _symmetric_scales(groups)
    largest = mx.take_along_axis(scales, mx.argmax(mx.abs(scales), axis=1, keepdims=True), axis=1)
    empty = mx.abs(largest) < _TINY
    unit = mx.where(empty, 1, largest) / -128
    packed_scales = mx.where(empty, 0, mx.minimum(mx.round(scales / unit), 127))
    unit = mx.where(empty, 0, unit).astype(mx.float16)
    levels = _levels(groups, unit.astype(mx.float32) * packed_scales, -32, 31) + 32
    return _q6_bytes(_bytes(levels), np.array(packed_scales.astype(mx.int8)), np.array(unit))


def _with_minima(weights: mx.array, top: int, steps: list[float]) -> tuple[Bytes, Bytes]:
    """Levels ``[blocks, 256]``, and what precedes them in the file: ``[blocks, 16]``."""
    groups = weights.reshape(-1, 8, 32)
    scales, minima = _scales_and_minima(groups, top, steps)
    packed_scales, unit = _six_bits(scales)
    packed_minima, minimum_unit = _six_bits(minima)
    lowered = groups + (minimum_unit.astype(mx.float32) * packed_minima)[..., None]
    levels = _levels(lowered, unit.astype(mx.float32) * packed_scales, 0, top)
    units = np.concatenate([np.array(unit), np.array(minimum_unit)], axis=1).view(np.uint8)
    head = np.concatenate([units, _twelve(_bytes(packed_scales), _bytes(packed_minima))], axis=1)
    return _bytes(levels).reshape(-1, BLOCK), head


def _scales_and_minima(groups: mx.array, top: int, steps: list[float]) -> tuple[mx.array, mx.array]:
    """Scale and minimum ``[blocks, groups]`` that fit ``groups`` best with levels up to ``top``.

    A weight's error counts by its size and the size of its group.
    """
    importance = mx.sqrt(mx.mean(groups * groups, axis=-1, keepdims=True)) + mx.abs(groups)
    weighted = importance * groups
    w, wx = importance.sum(-1), weighted.sum(-1)
    low = mx.minimum(groups.min(-1), 0)
    span = groups.max(-1) - low
    flat = span == 0
    span = mx.where(flat, 1, span)

    lifted = groups - low[..., None]
    scale, minimum = span / top, low
    first = mx.round(lifted / scale[..., None])
    off = scale[..., None] * first + low[..., None] - groups
    # By how much it is better than no level at all: for a least-squares fit, see below, that
    # takes no pass over the weights.
    best = (weighted * groups - importance * off * off).sum(-1)
    for step in steps:
        levels = mx.minimum(mx.round(((step + top) / span)[..., None] * lifted), top)
        wl = importance * levels
        l1, l2, lx = wl.sum(-1), (wl * levels).sum(-1), (wl * groups).sum(-1)
        determinant = w * l2 - l1 * l1
        usable = determinant > 0
        safe = mx.where(usable, determinant, 1)
        candidate = (w * lx - wx * l1) / safe
        candidate_low = (l2 * wx - l1 * lx) / safe
        # A minimum is subtracted, so it cannot be above zero.
        above = candidate_low > 0
        candidate = mx.where(above, lx / mx.where(l2 > 0, l2, 1), candidate)
        candidate_low = mx.where(above, 0, candidate_low)
        found = candidate * lx + candidate_low * wx
        better = usable & (found > best)
        scale = mx.where(better, candidate, scale)
        minimum = mx.where(better, candidate_low, minimum)
        best = mx.where(better, found, best)
    return mx.where(flat, 0, scale), -mx.where(flat, low, minimum)


def _symmetric_scales(groups: mx.array) -> mx.array:
    """Scales ``[blocks, groups]`` that fit ``groups`` best with levels from -32 to 31.

    A weight's error counts by its square.
    """
    importance = groups * groups
    where = mx.argmax(mx.abs(groups), axis=-1, keepdims=True)
    peak = mx.take_along_axis(groups, where, axis=-1)
    empty = mx.abs(peak) < _TINY
    peak = mx.where(empty, 1, peak)
    scale = best = mx.zeros(groups.shape[:-1])
    # The scale that makes the largest weight -32 comes first, so that it wins a draw.
    for step in [0, *range(-9, 0), *range(1, 10)]:
        levels = mx.clip(mx.round(-(32 + 0.1 * step) / peak * groups), -32, 31)
        wl = importance * levels
        lx, l2 = (wl * groups).sum(-1), (wl * levels).sum(-1)
        candidate = lx / mx.where(l2 > 0, l2, 1)
        better = (l2 > 0) & (lx * candidate > best)
        scale = mx.where(better, candidate, scale)
        best = mx.where(better, lx * candidate, best)
    return mx.where(empty[..., 0], 0, scale)


def _six_bits(values: mx.array) -> tuple[mx.array, mx.array]:
    """``[blocks, 8]`` as integers up to 63, and the float16 unit ``[blocks, 1]`` they count in."""
    largest = mx.maximum(values.max(axis=1, keepdims=True), 0)
    counted = mx.round(values * mx.where(largest > 0, 63 / mx.where(largest > 0, largest, 1), 0))
    return mx.clip(counted, 0, 63), (largest / 63).astype(mx.float16)


def _levels(groups: mx.array, scales: mx.array, low: int, high: int) -> mx.array:
    """The nearest levels of ``groups``; any will do where the scale is zero."""
    scales = scales[..., None]
    return mx.clip(mx.round(groups / mx.where(scales == 0, 1, scales)), low, high)


def _bytes(values: mx.array) -> Bytes:
    return np.array(values.astype(mx.uint8))


def _nibbles(levels: Bytes) -> Bytes:
    """``[blocks, 256]`` levels below 16, two groups of 32 to 32 bytes: ``[blocks, 128]``."""
    pairs = levels.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << np.uint8(4))).reshape(-1, BLOCK // 2)


def _twelve(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and eight minima of six bits in twelve bytes a block."""
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    third = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=1).astype(np.uint8)


def _q6_bytes(levels: Bytes, scales: NDArray[np.int8], unit: NDArray[np.float16]) -> Bytes:
    """Low four bits, high two bits, scales, unit: ``[blocks, 210]``."""
    # Two halves of 128 weights, each four runs of 32.
    runs = levels.reshape(-1, 2, 4, 32)
    low = runs & 15
    low_bytes = low[:, :, :2] | (low[:, :, 2:] << 4)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high_bytes = np.bitwise_or.reduce((runs >> 4) << shifts, axis=2)
    parts = low_bytes, high_bytes, scales.view(np.uint8), unit.view(np.uint8)
    return np.concatenate([part.reshape(len(runs), -1) for part in parts], axis=1, dtype=np.uint8)
