"""Packed weights in float64, unpacked bit by bit: what the kernels are compared with."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def to_float64(array: mx.array) -> np.ndarray:
    """Exact, for every floating type."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def exact_weight(base: nn.Module) -> np.ndarray:
    """W ``[out, in]`` of a quantized layer, without any rounding."""
    codes = _codes(np.array(base["weight"]), base.bits)
    if base.mode == "affine":
        scales, biases = to_float64(base["scales"]), to_float64(base["biases"])
        return _spread(scales, codes) * codes + _spread(biases, codes)
    scales = np.array(base["scales"])
    exact_scales = _e4m3(scales) if base.mode == "nvfp4" else 2.0 ** (scales.astype(int) - 127)
    values = _e4m3(codes) if base.mode == "mxfp8" else _e2m1(codes)
    return _spread(exact_scales, codes) * values


def exact_update(lora_a: mx.array, lora_b: mx.array, scale: float) -> np.ndarray:
    """``s (A B)^T``: ``[out, in]``."""
    return scale * (to_float64(lora_a) @ to_float64(lora_b)).T


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    # Little-endian bytes, and in each the low bit first: the values lie bit after bit.
    stream = np.unpackbits(
        np.ascontiguousarray(words, "<u4").view(np.uint8), axis=1, bitorder="little"
    )
    stream = stream.reshape(len(words), -1, bits).astype(int)
    return (stream << np.arange(bits)).sum(axis=-1)


def _spread(per_group: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.repeat(per_group, codes.shape[1] // per_group.shape[1], axis=1)


def _e2m1(codes: np.ndarray) -> np.ndarray:
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return np.where(codes & 8, -1, 1) * sizes[codes & 7]


def _e4m3(codes: np.ndarray) -> np.ndarray:
    codes = codes.astype(int)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, fraction / 512, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    size = np.where(codes & 127 == 127, np.nan, size)
    return np.where(codes & 128, -1, 1) * size
