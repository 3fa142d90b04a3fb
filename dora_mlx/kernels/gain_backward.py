"""The backward of y = (m / n) h with respect to h and m, in one pass over dL/dy and y.

    dL/dh_tj = (m_j / n_j) d_tj            dL/dm_j = sum_t d_tj y_tj / m_j

y is linear in m, so y itself gives the gradient of m and h need not be kept; n is a constant
(DoRA, arXiv 2402.09353, section 4.3).

Bytes moved per element of y in 16-bit types, by analysis: the kernel reads d and y and writes
dL/dh, 6, plus an eighth for the partial sums. The same in ``mx.compile``d ops is 16, because
a product is not fused into the sum over its rows: the float32 products are written and read back.

The forward gets no kernel: fusing the gain into the sum of the base product and the update saves
one pass of 4 bytes per element, under 0.5 % of a training step by the same count.
"""

from functools import cache
from typing import Any, cast

import mlx.core as mx

from dora_mlx.kernels.metal_dispatch import kernel_runs, kernels_planned

# Tokens per threadgroup: its partial sums cost 4 / BLOCK_TOKENS bytes per element to write.
BLOCK_TOKENS = 64
# SIMD groups per threadgroup, each with its share of the tokens.
SLICES = 8
# Columns per lane, 32 apart, so that every read of a SIMD group is one run of memory.
LANE_COLUMNS = 4

_SIMD_WIDTH = 32

_SOURCE = r"""
    constexpr int LANES = 32;
    constexpr int WIDTH = LANES * LANE_COLUMNS;
    threadgroup float slice_sums[SLICES * WIDTH];

    const int tokens = cotangent_shape[0];
    const int outputs = cotangent_shape[1];
    const int lane = int(thread_position_in_threadgroup.x);
    const int slice = int(thread_position_in_threadgroup.y);
    const int block = int(threadgroup_position_in_grid.y);
    const int first_column = int(threadgroup_position_in_grid.x) * WIDTH;
    const int end = metal::min((block + 1) * BLOCK_TOKENS, tokens);

    for (int v = 0; v < LANE_COLUMNS; ++v) {
        const int column = first_column + v * LANES + lane;
        float sum = 0.0f;
        if (column < outputs) {
            const float column_gain = gain[column];
            for (int t = block * BLOCK_TOKENS + slice; t < end; t += SLICES) {
                // 64 bits: the logits of a long batch have more than 2^31 elements.
                const size_t at = size_t(t) * size_t(outputs) + size_t(column);
                const float d = float(cotangent[at]);
                sum = metal::fma(d, float(y[at]), sum);
                d_direction[at] = static_cast<T>(column_gain * d);
            }
        }
        slice_sums[slice * WIDTH + v * LANES + lane] = sum;
    }
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    for (int c = slice * LANES + lane; c < WIDTH; c += SLICES * LANES) {
        if (first_column + c < outputs) {
            float sum = 0.0f;
            for (int s = 0; s < SLICES; ++s) {
                sum += slice_sums[s * WIDTH + c];
            }
            block_sums[size_t(block) * size_t(outputs) + size_t(first_column + c)] = sum;
        }
    }
"""


def gain_backward(
    cotangent: mx.array, y: mx.array, magnitude: mx.array, norm: mx.array
) -> tuple[mx.array, mx.array]:
    """``(dL/dh, dL/dm)`` of ``y = (m / n) h``, for a given ``dL/dy``.

    Args:
        cotangent: dL/dy ``[..., out]``: float32, float16 or bfloat16.
        y: ``[..., out]``, of a floating type.
        magnitude: m ``[out]`` float32. Where it is 0, y is too and dL/dm is given as 0.
        norm: n ``[out]`` float32.

    Returns:
        dL/dh ``[..., out]`` in the dtype of ``cotangent``, each element one float32 product
        rounded once; dL/dm ``[out]`` float32, its products and sums float32, added in blocks of
        tokens.

    The tests run the kernel's own source thread by thread on the host. What that cannot show:
    that Apple's compiler takes it, and how long it takes.
    """
    if kernels_planned():
        return _planned_gain_backward(cotangent, y)
    if kernel_serves(cotangent, y):
        return metal_gain_backward(cotangent, y, magnitude, norm)
    return reference_gain_backward(cotangent, y, magnitude, norm)


def kernel_serves(cotangent: mx.array, y: mx.array) -> bool:
    """Whether ``gain_backward`` runs its kernel for these types, here and now."""
    return kernel_runs(f"gain_backward {cotangent.dtype} {y.dtype}", lambda: _trial(cotangent, y))


def reference_gain_backward(
    cotangent: mx.array, y: mx.array, magnitude: mx.array, norm: mx.array
) -> tuple[mx.array, mx.array]:
    """``gain_backward`` in plain ops."""
    d_magnitude = magnitude_gradient(cotangent, y, magnitude)
    # After that y is needed no more, and what follows may have its memory.
    (cotangent,) = mx.depends([cotangent], [d_magnitude])
    return ((magnitude / norm) * cotangent).astype(cotangent.dtype), d_magnitude


def magnitude_gradient(cotangent: mx.array, y: mx.array, magnitude: mx.array) -> mx.array:
    """The dL/dm of ``gain_backward`` alone, in plain ops."""
    products = cotangent.astype(mx.float32) * y.astype(mx.float32)
    return _per_magnitude(products.reshape(-1, y.shape[-1]).sum(axis=0), magnitude)


def metal_gain_backward(
    cotangent: mx.array, y: mx.array, magnitude: mx.array, norm: mx.array
) -> tuple[mx.array, mx.array]:
    """``gain_backward`` in one pass over ``cotangent`` and ``y``; needs Metal to evaluate."""
    outputs = y.shape[-1]
    tokens = y.size // outputs
    tiles = -(-outputs // (_SIMD_WIDTH * LANE_COLUMNS))
    blocks = -(-tokens // BLOCK_TOKENS)
    template = [
        ("T", cotangent.dtype),
        ("BLOCK_TOKENS", BLOCK_TOKENS),
        ("SLICES", SLICES),
        ("LANE_COLUMNS", LANE_COLUMNS),
    ]
    d_direction, block_sums = _kernel()(
        inputs=[
            cotangent.reshape(tokens, outputs),
            y.reshape(tokens, outputs),
            magnitude / norm,
        ],
        template=template,
        grid=(tiles * _SIMD_WIDTH, blocks * SLICES, 1),
        threadgroup=(_SIMD_WIDTH, SLICES, 1),
        output_shapes=[(tokens, outputs), (blocks, outputs)],
        output_dtypes=[cotangent.dtype, mx.float32],
    )
    sums = block_sums.sum(axis=0)
    return d_direction.reshape(cotangent.shape), _per_magnitude(sums, magnitude)


def _planned_gain_backward(cotangent: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    """Other values, in arrays of the sizes that the kernel reads and makes."""
    d_direction = mx.concatenate([cotangent[..., :1], y[..., 1:].astype(cotangent.dtype)], axis=-1)
    return d_direction, d_direction.reshape(-1, y.shape[-1])[0].astype(mx.float32)


def expert_gain_backward(
    cotangent: mx.array, y: mx.array, magnitude: mx.array, norm: mx.array, experts: mx.array
) -> tuple[mx.array, mx.array]:
    """``gain_backward`` where every ``[1, out]`` of y takes the row of m that ``experts`` names.

    Args:
        cotangent: dL/dy ``[..., 1, out]``.
        y: ``[..., 1, out]``.
        magnitude: m ``[experts, out]`` float32.
        norm: n ``[experts, out]`` float32.
        experts: Index of the expert of each row, ``[...]``.

    Returns:
        dL/dh ``[..., 1, out]`` in the dtype of ``cotangent``; dL/dm ``[experts, out]`` float32.
    """
    products = (cotangent.astype(mx.float32) * y.astype(mx.float32)).reshape(-1, y.shape[-1])
    sums = mx.zeros(magnitude.shape).at[experts.flatten()].add(products)
    d_direction = (magnitude / norm)[experts][..., None, :] * cotangent
    return d_direction.astype(cotangent.dtype), _per_magnitude(sums, magnitude)


def _per_magnitude(sums: mx.array, magnitude: mx.array) -> mx.array:
    """``sums / magnitude``, and 0 where m = 0: there y = 0, and the gradient would be NaN."""
    return mx.where(magnitude == 0, 0, sums / mx.where(magnitude == 0, 1, magnitude))


def _trial(cotangent: mx.array, y: mx.array) -> float:
    """Error of the kernel for these types, by what rounding explains: two blocks and tiles."""
    tokens, outputs = BLOCK_TOKENS + 3, _SIMD_WIDTH * LANE_COLUMNS + 5
    wave = mx.sin(mx.arange(tokens * outputs, dtype=mx.float32)).reshape(tokens, outputs)
    magnitude = 2 + mx.cos(mx.arange(outputs, dtype=mx.float32))
    arguments = wave.astype(cotangent.dtype), (wave[::-1] + 1).astype(y.dtype), magnitude, magnitude
    pairs = zip(metal_gain_backward(*arguments), reference_gain_backward(*arguments), strict=True)
    errors = [mx.abs(ours - theirs).max() / mx.abs(theirs).max() for ours, theirs in pairs]
    # Both round dL/dh alike; the sums differ in the order of their float32 terms.
    return cast(float, mx.maximum(errors[0] / 2**-7, errors[1] / 1e-5).item())


@cache
def _kernel() -> Any:
    return mx.fast.metal_kernel(
        name="dora_gain_backward",
        input_names=["cotangent", "y", "gain"],
        output_names=["d_direction", "block_sums"],
        source=_SOURCE,
        header="",
    )
