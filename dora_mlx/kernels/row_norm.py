"""Norms of the rows of W + s (A B)^T without building the sum.

    ||w_j + s d_j||^2 = ||w_j||^2 + 2 s <w_j, d_j> + s^2 b_j^T (A^T A) b_j,    d_j = A b_j

With U = A^T W^T ``[rank, out]`` the cross term is sum_k B_kj U_kj, so one product of W with
``rank`` rows replaces the dequantized weight and the full ``out x in`` update.
"""

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.frozen_product import frozen_product, row_blocks, weight_rows

# Partial sums of this many squares keep float32 rounding near that of a pairwise sum.
_PARTIAL_SUM = 64
# Floor of a squared norm: rounding can push that of a nearly cancelling row below zero.
_SMALLEST_SQUARE = 1e-24


def row_square_sums(base: nn.Module) -> mx.array:
    """``||w_j||^2`` of every row of W: ``[out]`` float32, in blocks of rows.

    Squares are summed in float32 on two levels, groups of 64 and then the groups.
    """
    sums = []
    for start, stop in row_blocks(base):
        squares = mx.square(weight_rows(base, start, stop, mx.float32))
        rows, width = squares.shape
        if width % _PARTIAL_SUM == 0:
            squares = squares.reshape(rows, -1, _PARTIAL_SUM).sum(axis=-1)
        sums.append(squares.sum(axis=-1))
        mx.eval(sums[-1])
    return mx.concatenate(sums)


def adapted_row_norm(
    square_sums: mx.array, base: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float
) -> mx.array:
    """``||w_j + s (A B)^T_j||`` for every row j: ``[out]`` float32, without a gradient.

    Args:
        square_sums: ``row_square_sums(base)``, ``[out]`` float32.
        base: The frozen layer that holds W ``[out, in]``.
        lora_a: A ``[in, rank]``.
        lora_b: B ``[rank, out]``.
        scale: s.

    The norm is a constant of the backward pass (DoRA, arXiv 2402.09353, section 4.3). All of it
    is float32: in bfloat16 a change of the norm below 0.4 % would be rounded away.
    """
    a = mx.stop_gradient(lora_a).astype(mx.float32)
    b = mx.stop_gradient(lora_b).astype(mx.float32)
    cross = frozen_product(a.T, base)
    squared = square_sums + scale * (b * (2 * cross + scale * ((a.T @ a) @ b))).sum(axis=0)
    return mx.sqrt(mx.maximum(squared, _SMALLEST_SQUARE))
