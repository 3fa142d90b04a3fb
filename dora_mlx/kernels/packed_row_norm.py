"""Row norms of a packed quantized weight plus a low-rank update, from the packed words.

    n_j = || w_j + s (A B)^T_j ||        W [out, in] packed; A [in, rank]; B [rank, out]

This is the direct form: a row that the update nearly cancels keeps its digits. The relative
error of n_j is of the order of 1e-7 (||w_j|| + s ||(A B)_j||) / n_j, where the factored form of
``row_norm`` has the square of that ratio.

By analysis, not by measurement: per weight, the packed words, scales and biases are read once,
0.5625 bytes at 4 bits in groups of 64 in 16-bit types. A is read ``out / 32`` times, 4 rank / 32
bytes per weight, which comes from the cache where A fits (128 KiB at rank 8 and 4096 inputs).
Dequantizing W to float32, adding the product and taking norms moves more than 20 bytes per
weight. The multiply-adds, ``in * out * rank``, are those of the factored form's cross term.
"""

import math
from functools import cache
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.frozen_weight import (
    BLOCK_VALUES,
    NVFP4_RANGE,
    is_quantized,
    weight_dtype,
    weight_rows,
)
from dora_mlx.kernels.metal_dispatch import kernel_runs

# Output rows per SIMD group: each value of A read from threadgroup memory serves this many.
ROWS = 4
# SIMD groups per threadgroup: each value of A read from memory serves this many times ROWS rows.
SIMD_GROUPS = 8
# Columns of A in threadgroup memory at a time: with 256 inputs each in float32 a little over
# 8 KiB, a quarter of what a threadgroup may have, whatever the rank.
TILE_RANKS = 8

_SIMD_WIDTH = 32

_HEADER = r"""
#define DORA_UNROLL _Pragma("clang loop unroll(full)")

// Value j of eight that lie bit after bit in the 64 bits high:low, as MLX packs every width.
template <int BITS>
inline uint packed_value(uint low, uint high, int j) {
    const int first = j * BITS;
    uint value = first < 32 ? low >> (first & 31) : high >> (first & 31);
    if (first < 32 && first + BITS > 32) {
        value |= high << (32 - first);
    }
    return value & ((1u << BITS) - 1u);
}

// 2^(exponent - 127) * (1 + fraction / 2^23): no step goes through a float32 denormal, which a
// GPU may flush to zero.
inline float float_of_parts(uint exponent, uint fraction) {
    return as_type<float>((exponent << 23) | fraction);
}

inline float decode_e2m1(uint code) {
    const uint exponent = (code >> 1) & 3u;
    const uint fraction = code & 1u;
    const float size = exponent == 0u ? 0.5f * float(fraction)
                                      : float_of_parts(exponent + 126u, fraction << 22);
    return (code & 8u) != 0u ? -size : size;
}

inline float decode_e4m3(uint code) {
    const uint exponent = (code >> 3) & 15u;
    const uint fraction = code & 7u;
    float size = exponent == 0u ? 0.001953125f * float(fraction)
                                : float_of_parts(exponent + 120u, fraction << 20);
    size = (code & 127u) == 127u ? as_type<float>(0x7fc00000u) : size;
    return (code & 128u) != 0u ? -size : size;
}

// 2^(code - 127). Code 0 is a denormal; as zero it would change no norm.
inline float decode_e8m0(uint code) {
    return as_type<float>(code == 0u ? 0x400000u : code << 23);
}
"""

# What a group needs, and what one value is, per quantization mode.
_AFFINE = (
    "const float scale = float(scales[group]); const float bias = float(biases[group]);",
    "metal::fma(scale, float(code), bias)",
)
_DECODING = {
    "affine": _AFFINE,
    "mxfp4": ("const float scale = decode_e8m0(scales[group]);", "scale * decode_e2m1(code)"),
    "mxfp8": ("const float scale = decode_e8m0(scales[group]);", "scale * decode_e4m3(code)"),
    "nvfp4": (
        "const float scale = decode_e4m3(scales[group]) * expert_scale[expert];",
        "scale * decode_e2m1(code)",
    ),
}

# One SIMD group: ROWS output rows. One lane, per step: eight neighbouring inputs, which are BITS
# bytes of packed words whatever the width, so that a SIMD group reads 32 * BITS bytes in a row.
# A has the same 256 inputs for all rows of the threadgroup and is staged for them, transposed.
_SOURCE = r"""
    constexpr int VALUES = 8;
    constexpr int LANES = 32;
    // One more than the lanes: staging writes down the columns, which would fall into one bank.
    constexpr int PITCH = LANES + 1;
    threadgroup float staged_a[RANKS * VALUES * PITCH];

    const int expert = int(threadgroup_position_in_grid.y);
    const int inputs = lora_a_shape[1];
    const int rank = lora_a_shape[2];
    const int outputs = update_b_shape[2];
    const uint words_per_row = uint(weight_shape[2]);
    const uint groups_per_row = uint(scales_shape[2]);
    const uint rows_before = uint(expert) * uint(outputs);
    const int lane = int(thread_index_in_simdgroup);
    const int member = int(thread_index_in_threadgroup);
    const int first_row =
        int(threadgroup_position_in_grid.x * SIMD_GROUPS + simdgroup_index_in_threadgroup) * ROWS;

    int rows[ROWS];
    float squares[ROWS];
    DORA_UNROLL
    for (int i = 0; i < ROWS; ++i) {
        // Rows past the end repeat the last one: every thread has to reach every barrier.
        rows[i] = metal::min(first_row + i, outputs - 1);
        squares[i] = 0.0f;
    }

    for (int start = 0; start < inputs; start += LANES * VALUES) {
        const int column = start + lane * VALUES;
        float sums[ROWS][VALUES];
        DORA_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            DORA_UNROLL
            for (int j = 0; j < VALUES; ++j) {
                sums[i][j] = 0.0f;
            }
            if (column < inputs) {
                const uint row = rows_before + uint(rows[i]);
                const uint group = row * groups_per_row + uint(column / GROUP);
                const uint word = row * words_per_row + uint(column * BITS / 32);
                const int shift = column * BITS % 32;
                uint low = weight[word];
                // Only where the eight values reach into it: it may lie past the last word.
                uint high = shift + VALUES * BITS > 32 ? weight[word + 1] : 0u;
                if (shift > 0) {
                    low = (low >> shift) | (high << (32 - shift));
                    high >>= shift;
                }
                @GROUP@
                DORA_UNROLL
                for (int j = 0; j < VALUES; ++j) {
                    const uint code = packed_value<BITS>(low, high, j);
                    sums[i][j] = @VALUE@;
                }
            }
        }

        for (int first_rank = 0; first_rank < rank; first_rank += RANKS) {
            const int ranks = metal::min(RANKS, rank - first_rank);
            threadgroup_barrier(metal::mem_flags::mem_threadgroup);
            for (int e = member; e < RANKS * VALUES * LANES; e += SIMD_GROUPS * LANES) {
                const int k = e % RANKS;
                const int c = e / RANKS;
                const bool inside = k < ranks && start + c < inputs;
                staged_a[(k * VALUES + c % VALUES) * PITCH + c / VALUES] =
                    inside ? lora_a[(expert * inputs + start + c) * rank + first_rank + k] : 0.0f;
            }
            threadgroup_barrier(metal::mem_flags::mem_threadgroup);
            for (int k = 0; k < ranks; ++k) {
                float b[ROWS];
                DORA_UNROLL
                for (int i = 0; i < ROWS; ++i) {
                    b[i] = update_b[(expert * rank + first_rank + k) * outputs + rows[i]];
                }
                DORA_UNROLL
                for (int j = 0; j < VALUES; ++j) {
                    const float a = staged_a[(k * VALUES + j) * PITCH + lane];
                    DORA_UNROLL
                    for (int i = 0; i < ROWS; ++i) {
                        sums[i][j] = metal::fma(b[i], a, sums[i][j]);
                    }
                }
            }
        }

        DORA_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            DORA_UNROLL
            for (int j = 0; j < VALUES; ++j) {
                squares[i] = metal::fma(sums[i][j], sums[i][j], squares[i]);
            }
        }
    }

    DORA_UNROLL
    for (int i = 0; i < ROWS; ++i) {
        const float total = metal::simd_sum(squares[i]);
        if (lane == 0 && first_row + i < outputs) {
            norms[rows_before + uint(first_row + i)] = metal::sqrt(total);
        }
    }
"""


def packed_row_norm(base: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float) -> mx.array:
    """``||w_j + s (A B)^T_j||`` for every row j: ``[out]`` float32, without a gradient.

    Args:
        base: Quantized layer: ``weight`` ``[out, in * bits / 32]`` uint32, ``scales`` and, if the
            mode is affine, ``biases`` ``[out, in / group_size]``. Affine 2, 3, 4, 5, 6, 8 bits in
            groups of 32, 64, 128 with float32, float16 or bfloat16 scales; mxfp4, mxfp8, nvfp4.
        lora_a: A ``[in, rank]``, any floating type.
        lora_b: B ``[rank, out]``, any floating type.
        scale: s.

    With experts, all arrays and the result have the experts as leading axis.

    Everything is float32: the dequantized values (whatever the type of the scales), the update
    and the squares, which each of 32 lanes adds up before the lanes are added. A row of zeros has
    norm 0. With B = 0 the result does not depend on A or its rank, bit for bit, and is that of W
    alone: take the initial magnitude from this function and the gain starts at exactly 1.

    The norm is a constant of the backward pass (DoRA, arXiv 2402.09353, section 4.3).

    The tests run the kernel's own source thread by thread on the host. What that cannot show:
    that Apple's compiler takes it, how many registers it needs and so how many threadgroups run
    beside each other, and how long it takes.
    """
    lora_a = mx.stop_gradient(lora_a).astype(mx.float32)
    update_b = scale * mx.stop_gradient(lora_b).astype(mx.float32)
    if kernel_serves(base):
        return metal_packed_row_norm(base, lora_a, update_b)
    return reference_packed_row_norm(base, lora_a, update_b)


def kernel_serves(base: nn.Module) -> bool:
    """Whether ``packed_row_norm`` runs its kernel for ``base``, here and now.

    Then it costs what the factored form does and is exact. Its reference costs more than the
    factored form, so elsewhere only rows that cancel should be given to it.
    """
    if not is_quantized(base) or base.mode not in _DECODING:
        return False
    return kernel_runs(
        f"packed_row_norm {base.mode} {base.bits} {base.group_size} {base['scales'].dtype}",
        lambda: _trial(base),
    )


def reference_packed_row_norm(base: nn.Module, lora_a: mx.array, update_b: mx.array) -> mx.array:
    """``||w_j + (A update_b)^T_j||`` in plain ops, in blocks of rows: ``[out]`` float32.

    Args:
        base: As in ``packed_row_norm``.
        lora_a: A ``[in, rank]`` float32; with experts, ``[experts, in, rank]``.
        update_b: s B ``[rank, out]`` float32; with experts, ``[experts, rank, out]``.
    """
    experts = zip(_per_expert(lora_a), _per_expert(update_b), strict=True)
    inputs, outputs = lora_a.shape[-2], update_b.shape[-1]
    size = max(1, BLOCK_VALUES // inputs)
    # Two levels of sums keep float32 rounding near that of a pairwise sum.
    partial = math.gcd(inputs, 64)
    norms: list[mx.array] = []
    for expert, (a, b) in enumerate(experts):
        for start in range(0, outputs, size):
            stop = min(start + size, outputs)
            if norms:
                # The dependency keeps one dequantized block alive at a time.
                a = mx.depends([a], [norms[-1]])[0]
            before = expert * outputs
            rows = weight_rows(base, before + start, before + stop, mx.float32)
            squares = mx.square(rows + b[:, start:stop].T @ a.T)
            sums = squares.reshape(stop - start, -1, partial).sum(axis=2).sum(axis=1)
            norms.append(mx.sqrt(sums))
    return mx.concatenate(norms).reshape(*update_b.shape[:-2], outputs)


def metal_packed_row_norm(base: nn.Module, lora_a: mx.array, update_b: mx.array) -> mx.array:
    """``reference_packed_row_norm`` in one pass over the packed words; needs Metal to evaluate."""
    experts, outputs = math.prod(update_b.shape[:-2]), update_b.shape[-1]
    inputs = [base["weight"], base["scales"]]
    if base.mode == "affine":
        inputs.append(base["biases"])
    inputs += [lora_a, update_b]
    inputs = [_per_expert(array) for array in inputs]
    if base.mode == "nvfp4":
        inputs.append(_expert_scale(base, experts))
    threads = _SIMD_WIDTH * SIMD_GROUPS
    threadgroups = -(-outputs // (ROWS * SIMD_GROUPS))
    template = [
        ("BITS", base.bits),
        ("GROUP", base.group_size),
        ("ROWS", ROWS),
        ("SIMD_GROUPS", SIMD_GROUPS),
        ("RANKS", TILE_RANKS),
    ]
    (norms,) = _kernel(base.mode)(
        inputs=inputs,
        template=template,
        grid=(threadgroups * threads, experts, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*update_b.shape[:-2], outputs)],
        output_dtypes=[mx.float32],
    )
    return norms


def _per_expert(array: mx.array) -> mx.array:
    """With a leading axis of experts, of which a layer without them has one."""
    return array if array.ndim == 3 else array[None]


def _expert_scale(base: nn.Module, experts: int) -> mx.array:
    """What every value of an nvfp4 weight is multiplied with: ``[experts]`` float32."""
    scale = base.get("global_scale")
    if scale is None:
        return mx.ones(experts)
    return mx.broadcast_to(scale.astype(mx.float32).flatten() / NVFP4_RANGE, (experts,))


def _trial(base: nn.Module) -> float:
    """Error of the kernel for weights quantized as in ``base``, by what rounding explains.

    Rows, inputs and ranks are one tile and a part of the next.
    """
    outputs, inputs, rank = ROWS * SIMD_GROUPS + 1, 3 * 128, TILE_RANKS + 1
    wave = mx.sin(mx.arange(outputs * inputs, dtype=mx.float32)).reshape(outputs, inputs)
    tiny = nn.Module()
    tiny.mode, tiny.bits, tiny.group_size = base.mode, base.bits, base.group_size
    tiny.weight, tiny.scales, *biases = mx.quantize(
        wave.astype(weight_dtype(base)), base.group_size, base.bits, mode=base.mode
    )
    tiny.biases = biases[0] if biases else None
    lora_a, update_b = wave.T[:, :rank] / rank, wave[-rank:, :outputs]
    ours = metal_packed_row_norm(tiny, lora_a, update_b)
    with mx.stream(mx.cpu):
        # A GPU may multiply matrices with fewer digits than the kernel has.
        theirs = reference_packed_row_norm(tiny, lora_a, update_b)
    return cast(float, mx.abs(ours / theirs - 1).max().item()) / 1e-5


@cache
def _kernel(mode: str) -> Any:
    group, value = _DECODING[mode]
    names = ["weight", "scales", *(["biases"] if mode == "affine" else []), "lora_a", "update_b"]
    if mode == "nvfp4":
        names.append("expert_scale")
    return mx.fast.metal_kernel(
        name=f"dora_packed_row_norm_{mode}",
        input_names=names,
        output_names=["norms"],
        source=_SOURCE.replace("@GROUP@", group).replace("@VALUE@", value),
        header=_HEADER,
    )
