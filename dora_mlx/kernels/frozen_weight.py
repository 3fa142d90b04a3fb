"""How to read a frozen weight W, whichever layer holds it.

W lives in an ``nn.Linear`` or ``nn.Embedding`` ``[out, in]``, in the experts of mlx-lm's
``SwitchLinear`` ``[experts, out, in]``, in their quantized forms, or in a convolution
``[out, *kernel, in]``; this file is the only one that knows how to read it. Its *rows* are the
vectors over the last axis, for a convolution over all axes but the first.
"""

import copy
import math
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.device import on_cpu

# Dequantized values alive at a time, 4 MiB in float32: the fastest of 2^17 to 2^21, measured.
BLOCK_VALUES = 1 << 20
# What mx.quantize divides a global scale by: the largest products of e4m3 scales and e2m1 values.
NVFP4_RANGE = 448 * 6


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
    return shape[:1] if is_convolution(base) else shape[:-1]


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


def column_blocks(base: nn.Module) -> Iterator[tuple[int, int]]:
    """The same of columns, in whole groups of a packed weight."""
    rows, width = row_shape(base)
    size = max(1, BLOCK_VALUES // rows // base.group_size) * base.group_size
    for start in range(0, width, size):
        yield start, min(start + size, width)


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


def is_convolution(base: nn.Module) -> bool:
    """Whether ``base`` is an ``nn.Conv1d`` or ``nn.Conv2d``."""
    return isinstance(base, nn.Conv1d | nn.Conv2d)
