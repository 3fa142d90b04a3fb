"""Products with a frozen weight that leave nothing of its size behind for the backward.

A frozen weight W lives in an ``nn.Linear`` or ``nn.Embedding`` ``[out, in]``, in the experts of
mlx-lm's ``SwitchLinear`` ``[experts, out, in]``, in their quantized forms, or in a convolution
``[out, *kernel, in]``; this file is the only one that knows how to read it. Its *rows* are the
vectors over the last axis, for a convolution over all axes but the first.

On a GPU a quantized product is one fused kernel. MLX's CPU kernel for it is 20 to 70 times
slower than dequantizing a block of rows and calling the dense product, so with more than a few
rows of input the CPU takes blocks. The switch is ``_in_blocks``, and there is no other.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import mlx.core as mx
import mlx.nn as nn

# Dequantized values alive at a time, 4 MiB in float32: the fastest of 2^17 to 2^21, measured.
BLOCK_VALUES = 1 << 20
# Up to this many input rows (decoding) the quantized kernel beats dequantizing all of W.
FEW_ROWS = 3
_DEPTH_OF_DEQUANTIZING = 14  # Operations one after the other, and some.
# What mx.quantize divides a global scale by: the largest products of e4m3 scales and e2m1 values.
NVFP4_RANGE = 448 * 6

_assumed_cpu: ContextVar[bool | None] = ContextVar("assumed_cpu", default=None)


def is_quantized(base: nn.Module) -> bool:
    """Whether the weight of ``base`` is packed (it then has ``scales``)."""
    return "scales" in base


def weight_shape(base: nn.Module) -> tuple[int, ...]:
    """Shape of the weight of ``base``, unpacked, for every bit width."""
    *leading, width = base["weight"].shape
    if is_quantized(base):
        # Scales are never packed, which spares the arithmetic of 3, 5 and 6 bits.
        width = base["scales"].shape[-1] * base.group_size
    return *leading, width


def leading_shape(base: nn.Module) -> tuple[int, ...]:
    """Shape of what there is one of per row of W: ``[out]``, or ``[experts, out]``."""
    shape = weight_shape(base)
    return shape[:1] if _is_convolution(base) else shape[:-1]


def row_shape(base: nn.Module) -> tuple[int, int]:
    """``(rows, width)`` of W as a list of rows."""
    rows = math.prod(leading_shape(base))
    return rows, math.prod(weight_shape(base)) // rows


def weight_dtype(base: nn.Module) -> mx.Dtype:
    """The floating type that W has, or would have dequantized."""
    source = base["scales"] if is_quantized(base) else base["weight"]
    if mx.issubdtype(source.dtype, mx.floating):
        return source.dtype
    # The scales of mxfp4, mxfp8 and nvfp4 are bytes and say nothing of the activations.
    return mx.float32 if on_cpu() else mx.bfloat16


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of ``model``; a packed weight counts its values, not its words."""
    total = 0
    for _, module in model.named_modules():
        own = {k: v for k, v in module.items() if isinstance(v, mx.array) and k[0] != "_"}
        if is_quantized(module):
            total += math.prod(weight_shape(module))
            own = {k: v for k, v in own.items() if k not in ("weight", "scales", "biases")}
        total += sum(array.size for array in own.values())
    return total


def weight_rows(
    base: nn.Module,
    start: int,
    stop: int,
    dtype: mx.Dtype,
    after: mx.array | None = None,
    gain: mx.array | None = None,
) -> mx.array:
    """Rows ``start`` to ``stop`` of W, dequantized: ``[stop - start, width]`` of ``dtype``.

    They are not computed before ``after`` is. Each is multiplied by its element of ``gain``
    ``[out]``, if given, for which ``takes_gain`` must hold.
    """
    return chosen_rows(base, slice(start, stop), dtype, after, gain)


def chosen_rows(
    base: nn.Module,
    chosen: slice | mx.array,
    dtype: mx.Dtype,
    after: mx.array | None = None,
    gain: mx.array | None = None,
    columns: tuple[int, int] | None = None,
) -> mx.array:
    """The rows of W that a slice or an array of indices names, as ``weight_rows`` gives them.

    All of their columns, or those from one multiple of the group size to another.
    """
    rows, width = row_shape(base)

    def part(name: str) -> mx.array:
        own = base[name].reshape(rows, -1)
        if columns is not None:
            first, end = (column * own.shape[1] // width for column in columns)
            own = own[:, first:end]
        own = own[chosen]
        return own if after is None else mx.depends([own], [after])[0]

    def factors(name: str) -> mx.array:
        # In the type asked for: 16-bit scales would round every value of the row to 16 bits.
        own = part(name).astype(dtype)
        return own if gain is None else gain[chosen, None].astype(dtype) * own

    if not is_quantized(base):
        return part("weight").astype(dtype)
    affine = mx.issubdtype(base["scales"].dtype, mx.floating)
    if affine and on_cpu() and 32 % base.bits == 0:
        return _dequantized(part("weight"), factors("scales"), factors("biases"), base.bits)
    values = mx.dequantize(
        part("weight"),
        factors("scales") if affine else part("scales"),
        None if base.get("biases") is None else factors("biases"),
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    )
    if base.get("global_scale") is not None:
        per_row = mx.repeat(base["global_scale"], rows // base["global_scale"].size)[chosen]
        values = (per_row / NVFP4_RANGE)[:, None] * values
    return values.astype(dtype)


def _dequantized(words: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """``mx.dequantize``, bit for bit, in two thirds of the time that it takes on a CPU."""
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    values = ((words[..., None] >> shifts) & (2**bits - 1)).astype(scales.dtype)
    values = values.reshape(*scales.shape, -1) * scales[..., None] + biases[..., None]
    return values.reshape(len(words), -1)


def row_blocks(base: nn.Module) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of blocks of rows with at most ``BLOCK_VALUES`` values each."""
    rows, width = row_shape(base)
    size = max(1, BLOCK_VALUES // width)
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def with_weight(base: nn.Module, weight: mx.array, dequantize: bool) -> nn.Module:
    """A layer like ``base`` with another weight, given dense; parameters are shared otherwise.

    It is quantized as ``base`` is, unless ``dequantize`` is set.
    """
    if is_quantized(base) and dequantize:
        layer = _dense_twin(base)
    else:
        layer = copy.copy(base)
        # Frozen names belong to a layer, and copying it copied only the reference.
        layer._no_grad = set(base._no_grad)
    if is_quantized(layer):
        layer.weight, layer.scales, *biases = mx.quantize(
            weight, layer.group_size, layer.bits, mode=layer.mode
        )
        layer.biases = biases[0] if biases else None
        if "global_scale" in layer:
            layer.global_scale = None
    else:
        layer.weight = weight
        layer.unfreeze()
    return layer


def _dense_twin(base: nn.Module) -> nn.Module:
    """A dense layer of the shape of the quantized ``base`` and with its bias; the weight is new."""
    *experts, out, width = weight_shape(base)
    twin: nn.Module
    if isinstance(base, nn.QuantizedEmbedding):
        return nn.Embedding(out, width)
    if experts:
        # Imported here because it takes seconds, and whoever has experts has paid for it.
        from mlx_lm.models.switch_layers import SwitchLinear

        twin = SwitchLinear(width, out, experts[0], bias=False)
    else:
        twin = nn.Linear(width, out, bias=False)
    if "bias" in base:
        twin.bias = base.bias
    return twin


def frozen_product(x: mx.array, base: nn.Module, gain: mx.array | None = None) -> mx.array:
    """``x W^T``: ``[..., in] -> [..., out]`` in the dtype of x; differentiable in x only.

    With experts, each multiplies its own: ``[experts, rows, in] -> [experts, rows, out]``.

    Args:
        x: The input.
        base: The layer that holds W.
        gain: What every output is multiplied by: ``[out]``; only where ``takes_gain`` holds.
    """
    if not is_quantized(base):
        weight = mx.stop_gradient(base["weight"])
        if _is_convolution(base):
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


def _is_convolution(base: nn.Module) -> bool:
    return isinstance(base, nn.Conv1d | nn.Conv2d)


def _in_blocks(x: mx.array) -> bool:
    return on_cpu() and x.size > FEW_ROWS * x.shape[-1]


def on_cpu() -> bool:
    """Whether MLX runs on its CPU backend, or is assumed to."""
    assumed = _assumed_cpu.get()
    return mx.default_device().type == mx.DeviceType.cpu if assumed is None else assumed


@contextmanager
def assuming_device(cpu: bool) -> Iterator[None]:
    """Within the block, layers build the graph that they would on a CPU or on a GPU.

    For planning: what is built for another device than this one is not to be evaluated.
    """
    token = _assumed_cpu.set(cpu)
    try:
        yield
    finally:
        _assumed_cpu.reset(token)


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
    if _assumed_cpu.get():
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
    if _assumed_cpu.get():
        d_x = _quantized_product(d, base, transpose=False)
        return _planned(d_x) if by_columns else d_x
    if by_columns:
        columns: list[mx.array] = []
        size = max(1, BLOCK_VALUES // rows // base.group_size) * base.group_size
        for start in range(0, width, size):
            block, after = (start, min(start + size, width)), columns[-1] if columns else d
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
