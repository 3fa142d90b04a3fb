"""Rows of float32 as the bytes of a GGUF type."""

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from dora_mlx.exporting.gguf import kquants
from dora_mlx.exporting.precision import check_finite, encode

_DTYPES = {Type.F32: mx.float32, Type.F16: mx.float16, Type.BF16: mx.bfloat16}
_K_QUANTS = {
    Type.Q4_K: kquants.pack_q4_k,
    Type.Q5_K: kquants.pack_q5_k,
    Type.Q6_K: kquants.pack_q6_k,
}
_Q4_1_WIDTH = 32
# Blocks of 256 weights searched at once: what a search holds of them fits a processor's cache.
_SEARCHED = 2048


def encode_block(block: mx.array, tensor_type: Type, name: str) -> NDArray[np.generic]:
    """The data of some rows of a tensor in a file.

    Args:
        block: ``[rows, width]`` float32, the width a multiple of the length of the type's blocks.
        tensor_type: One that ``QUANTS`` choose.
        name: For the message.

    Raises:
        UserError: When the tensor holds NaN or infinity, or a value too large for the type.
    """
    if tensor_type in _DTYPES:
        return encode(block, _DTYPES[tensor_type], name)
    # The scales of all quantized types are float16.
    check_finite(block, mx.float16, name)
    pack = _K_QUANTS.get(tensor_type)
    if pack is not None:
        rows = block.reshape(-1, kquants.BLOCK)
        starts = range(0, rows.shape[0], _SEARCHED)
        return np.concatenate([pack(rows[start : start + _SEARCHED]) for start in starts])
    quantized: NDArray[np.generic] = gguf.quantize(np.array(block), tensor_type)
    return quantized


def fits_q4_1(layer: nn.Module) -> bool:
    """Whether the quantized weight of ``layer`` has the form of Q4_1: scale times level, plus bias.

    MLX's groups are Q4_1's blocks of 32, or several of them with equal scales.
    """
    return bool(layer.bits == 4 and layer.mode == "affine" and layer.group_size % _Q4_1_WIDTH == 0)


def encode_q4_1(levels: mx.array, scales: mx.array, biases: mx.array) -> NDArray[np.uint8]:
    """A packed affine 4-bit weight as Q4_1, level by level.

    Args:
        levels: ``[..., in / 8]`` uint32, eight levels a word.
        scales: ``[..., in / group_size]``.
        biases: Like ``scales``.

    Returns:
        ``[blocks, 20]``: scale and bias in float16, then 32 levels.
    """
    words = np.array(levels).reshape(-1).view(np.uint8).reshape(-1, _Q4_1_WIDTH // 2)
    # A byte holds neighbours here, and weights 16 apart there.
    single = np.stack([words & 15, words >> 4], axis=-1).reshape(-1, 2, _Q4_1_WIDTH // 2)
    nibbles = single[:, 0] | (single[:, 1] << 4)
    pair = mx.stack([scales, biases], axis=-1).astype(mx.float16)
    heads = np.repeat(np.array(pair).reshape(-1, 2), len(nibbles) // scales.size, axis=0)
    return np.concatenate([heads.view(np.uint8), nibbles], axis=1)


def largest_rounding(values: mx.array) -> float:
    """The largest change that float16 makes to one of ``values``, over the value."""
    exact = values.astype(mx.float32)
    change = mx.abs(exact.astype(mx.float16).astype(mx.float32) - exact)
    return float(np.array(change / mx.maximum(mx.abs(exact), 1e-30)).max())
