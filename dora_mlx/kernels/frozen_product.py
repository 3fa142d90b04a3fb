"""Products with a frozen weight W that leave nothing of its size behind for the backward.

On a GPU a quantized product is one fused kernel. MLX's CPU kernel for it is 20 to 70 times
slower than dequantizing a block of rows and calling the dense product, so with more than a few
rows of input the CPU takes blocks. The switch is ``_in_blocks``, and there is no other.
"""

from typing import cast

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.device import on_cpu, planning_for_cpu
from dora_mlx.kernels.frozen_weight import (
    NVFP4_RANGE,
    chosen_rows,
    column_blocks,
    is_convolution,
    is_quantized,
    row_blocks,
    row_shape,
    weight_rows,
    weight_shape,
)

# Up to this many input rows (decoding) the quantized kernel beats dequantizing all of W.
FEW_ROWS = 3
_DEPTH_OF_DEQUANTIZING = 14  # Operations one after the other, and some.


def frozen_product(x: mx.array, base: nn.Module, gain: mx.array | None = None) -> mx.array:
    """``x W^T``: ``[..., in] -> [..., out]`` in the dtype of x; differentiable in x only.

    With experts, each multiplies its own: ``[experts, rows, in] -> [experts, rows, out]``; on the
    CPU without a gradient.

    Args:
        x: The input.
        base: The layer that holds W.
        gain: What every output is multiplied by: ``[out]``.

    Raises:
        ValueError: For a gain where ``takes_gain`` does not hold.
    """
    if gain is not None and not takes_gain(x, base):
        raise ValueError("only packed rows that are dequantized for a product take a gain")
    if not is_quantized(base):
        weight = mx.stop_gradient(base["weight"])
        if is_convolution(base):
            weight = weight.reshape(row_shape(base))
        return x @ weight.swapaxes(-1, -2)
    if not _in_blocks(x):
        return _quantized_product(x, base, transpose=True)

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return _blocked_product(x, base, gain)

    @product.vjp
    def product_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _blocked_product_transposed(cotangent, base, gain)

    return cast(mx.array, product(x))


def frozen_product_transposed(d: mx.array, base: nn.Module) -> mx.array:
    """``d W``: ``[..., out] -> [..., in]``, the backward of ``frozen_product``."""
    if not is_quantized(base):
        return d @ base["weight"]
    if not _in_blocks(d):
        return _quantized_product(d, base, transpose=False)
    return _blocked_product_transposed(d, base, None)


class SharedReading:
    """Products of W with a constant and then with x from one dequantization of every block.

    For the forward of an ``mx.custom_function``; its backward must not use it, because what
    autodifferentiation would keep is all of W, dequantized.

    Args:
        base: A quantized layer for which ``shares_reading`` holds.
        constant: ``[in, n]`` float32.

    Attributes:
        constant_product: ``W constant``: ``[out, n]``. It depends on nothing else.
    """

    def __init__(self, base: nn.Module, constant: mx.array):
        self._weights = [weight_rows(base, *block, mx.float32) for block in row_blocks(base)]
        self._parts = [weight @ constant for weight in self._weights]
        self.constant_product = mx.concatenate(self._parts)

    def product(self, x: mx.array) -> mx.array:
        """``x W^T``: ``[..., in] -> [..., out]``, as ``frozen_product`` computes it; once.

        No block waits for the product of x with the one before, or the constant product would hang
        on x. But MLX runs first what is most operations away from the result, so each product is
        as many away from the next one as dequantizing takes.
        """
        columns: list[mx.array] = []
        while self._weights:
            # Taken from the lists: whatever refers to a block keeps it in memory.
            column, part = x @ self._weights.pop(0).T, self._parts.pop(0)
            columns += mx.depends([column], [part])
            for _ in range(_DEPTH_OF_DEQUANTIZING):
                (x,) = mx.depends([x], [columns[-1]])
        return _joined(columns)


def shares_reading(x: mx.array, base: nn.Module) -> bool:
    """Whether to read W costs so much that two products with it should share it.

    So it is where a packed weight is dequantized for a product. The rows would be rounded to a
    16-bit type of x, so these do not share.
    """
    packed = is_quantized(base) and len(weight_shape(base)) == 2
    return packed and _in_blocks(x) and x.dtype == mx.float32


def takes_gain(x: mx.array, base: nn.Module) -> bool:
    """Whether a product with W scales its outputs for less than a pass over them costs.

    So it is where packed rows with floating scales are dequantized for it, for there is a scale for
    32 values or more. In 16 bits the scales would be rounded once more.
    """
    return shares_reading(x, base) and mx.issubdtype(base["scales"].dtype, mx.floating)


def frozen_convolution(x: mx.array, weight: mx.array, base: nn.Module) -> mx.array:
    """``x`` convolved with ``weight`` the way ``base`` does it, without the bias.

    Args:
        x: ``[batch, *places, channels]``.
        weight: ``[out, *kernel, channels / groups]``; ``out`` may differ from that of ``base``.
        base: ``nn.Conv1d`` or ``nn.Conv2d``, for stride, padding, dilation and groups.
    """
    convolve = mx.conv1d if isinstance(base, nn.Conv1d) else mx.conv2d
    return convolve(x, weight, base.stride, base.padding, base.dilation, base.groups)


def gathered_product(
    x: mx.array, base: nn.Module, experts: mx.array, sorted_indices: bool
) -> mx.array:
    """``x W_e^T`` with the expert e of each row, without the bias; differentiable in x only.

    Args:
        x: ``[..., 1, in]``, as mlx-lm's ``SwitchLinear`` takes it.
        base: The experts, ``[experts, out, in]``.
        experts: Index of the expert of each row, ``[...]``.
        sorted_indices: Whether ``experts`` ascend.
    """
    if not is_quantized(base):
        weight = mx.stop_gradient(base["weight"]).swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=experts, sorted_indices=sorted_indices)
    return mx.gather_qmm(
        x,
        base["weight"],
        base["scales"],
        base.get("biases"),
        rhs_indices=experts,
        transpose=True,
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
        global_scale=base.get("global_scale"),
        sorted_indices=sorted_indices,
    )


def _in_blocks(x: mx.array) -> bool:
    return on_cpu() and x.size > FEW_ROWS * x.shape[-1]


def _quantized_product(x: mx.array, base: nn.Module, transpose: bool) -> mx.array:
    if base.get("global_scale") is not None:
        # Only the gathered product takes one; as a factor of x it serves both directions.
        x = (base["global_scale"] / NVFP4_RANGE).reshape(-1, 1, 1) * x
    return mx.quantized_matmul(
        x,
        base["weight"],
        scales=base["scales"],
        biases=base.get("biases"),
        transpose=transpose,
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    )


def _blocked_product(x: mx.array, base: nn.Module, gain: mx.array | None) -> mx.array:
    if planning_for_cpu():
        return _planned(_quantized_product(x, base, transpose=True))
    columns: list[mx.array] = []
    *experts, out, _ = weight_shape(base)
    if experts:
        for start in range(0, experts[0] * out, out):
            weight = weight_rows(base, start, start + out, x.dtype, columns[-1] if columns else x)
            columns.append(x[start // out] @ weight.T)
        return mx.stack(columns)
    for start, stop in row_blocks(base):
        # One dequantized block at a time.
        weight = weight_rows(base, start, stop, x.dtype, columns[-1] if columns else x, gain)
        columns.append(x @ weight.T)
    return _joined(columns)


def _joined(columns: list[mx.array]) -> mx.array:
    return columns[0] if len(columns) == 1 else mx.concatenate(columns, axis=-1)


def _planned(y: mx.array) -> mx.array:
    """In few operations what takes as much memory as joined columns, but for a block of W."""
    return mx.concatenate([y[..., :1], y[..., 1:]], axis=-1)


def _blocked_product_transposed(d: mx.array, base: nn.Module, gain: mx.array | None) -> mx.array:
    rows, width = row_shape(base)
    # The sum over blocks of rows is read and written for each of them.
    by_columns = width > rows
    if planning_for_cpu():
        d_x = _quantized_product(d, base, transpose=False)
        return _planned(d_x) if by_columns else d_x
    if by_columns:
        columns: list[mx.array] = []
        for block in column_blocks(base):
            after = columns[-1] if columns else d
            columns.append(d @ chosen_rows(base, slice(None), d.dtype, after, gain, block))
        return _joined(columns)
    total: mx.array | None = None
    for start, stop in row_blocks(base):
        part = d[..., start:stop]
        weight = weight_rows(base, start, stop, d.dtype, d if total is None else total, gain)
        total = part @ weight if total is None else mx.addmm(total, part, weight)
    if total is None:
        raise ValueError("a weight with no rows has no product")
    return total
