"""Products with a frozen weight that leave nothing of its size behind for the backward.

A frozen weight W ``[out, in]`` lives in an ``nn.Linear``, ``nn.Embedding`` or one of their
quantized forms; this file is the only one that knows how to read it.

On a GPU a quantized product is one fused kernel. MLX's CPU kernel for it is 20 to 70 times
slower than dequantizing a block of rows and calling the dense product, so with more than a few
rows of input the CPU takes blocks. The switch is ``_in_blocks``, and there is no other.
"""

import math
from collections.abc import Iterator
from typing import cast

import mlx.core as mx
import mlx.nn as nn

# Dequantized values alive at a time: 8 MiB in float32, about what a CPU cache holds.
BLOCK_VALUES = 1 << 21
# Up to this many input rows (decoding) the quantized kernel beats dequantizing all of W.
FEW_ROWS = 8


def is_quantized(base: nn.Module) -> bool:
    """Whether the weight of ``base`` is packed (it then has ``scales``)."""
    return "scales" in base


def weight_shape(base: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of the weight of ``base``, unpacked, for every bit width."""
    out, width = base["weight"].shape
    if is_quantized(base):
        # Scales are never packed, which spares the arithmetic of 3, 5 and 6 bits.
        width = base["scales"].shape[-1] * base.group_size
    return out, width


def weight_dtype(base: nn.Module) -> mx.Dtype:
    """The floating type that W has, or would have dequantized."""
    source = base["scales"] if is_quantized(base) else base["weight"]
    if mx.issubdtype(source.dtype, mx.floating):
        return source.dtype
    # The scales of mxfp4, mxfp8 and nvfp4 are bytes and say nothing of the activations.
    return mx.float32 if _on_cpu() else mx.bfloat16


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


def weight_rows(base: nn.Module, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
    """Rows ``start`` to ``stop`` of W, dequantized: ``[stop - start, in]`` of ``dtype``."""
    if not is_quantized(base):
        return base["weight"][start:stop].astype(dtype)
    scales, biases = base["scales"][start:stop], base.get("biases")
    if mx.issubdtype(scales.dtype, mx.floating):
        # In the type asked for: 16-bit scales would round every value of the row to 16 bits.
        scales = scales.astype(dtype)
    rows = mx.dequantize(
        base["weight"][start:stop],
        scales,
        None if biases is None else biases[start:stop].astype(dtype),
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    )
    return rows.astype(dtype)


def row_blocks(base: nn.Module) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of blocks of rows with at most ``BLOCK_VALUES`` values each."""
    out, width = weight_shape(base)
    size = max(1, BLOCK_VALUES // width)
    for start in range(0, out, size):
        yield start, min(start + size, out)


def frozen_product(x: mx.array, base: nn.Module) -> mx.array:
    """``x W^T``: ``[..., in] -> [..., out]`` in the dtype of x; differentiable in x only."""
    if not is_quantized(base):
        return x @ mx.stop_gradient(base["weight"]).T
    if not _in_blocks(x):
        return _quantized_product(x, base, transpose=True)

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return _blocked_product(x, base)

    @product.vjp
    def product_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _blocked_product_transposed(cotangent, base)

    return cast(mx.array, product(x))


def frozen_product_transposed(d: mx.array, base: nn.Module) -> mx.array:
    """``d W``: ``[..., out] -> [..., in]``, the backward of ``frozen_product``."""
    if not is_quantized(base):
        return d @ base["weight"]
    if not _in_blocks(d):
        return _quantized_product(d, base, transpose=False)
    return _blocked_product_transposed(d, base)


def _in_blocks(x: mx.array) -> bool:
    return _on_cpu() and x.size > FEW_ROWS * x.shape[-1]


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _quantized_product(x: mx.array, base: nn.Module, transpose: bool) -> mx.array:
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


def _blocked_product(x: mx.array, base: nn.Module) -> mx.array:
    columns: list[mx.array] = []
    for start, stop in row_blocks(base):
        # The dependency keeps one dequantized block alive at a time.
        rows = x if not columns else mx.depends([x], [columns[-1]])[0]
        columns.append(rows @ weight_rows(base, start, stop, x.dtype).T)
    return columns[0] if len(columns) == 1 else mx.concatenate(columns, axis=-1)


def _blocked_product_transposed(d: mx.array, base: nn.Module) -> mx.array:
    total: mx.array | None = None
    for start, stop in row_blocks(base):
        part = d[..., start:stop]
        if total is None:
            total = part @ weight_rows(base, start, stop, d.dtype)
        else:
            part = mx.depends([part], [total])[0]
            total = mx.addmm(total, part, weight_rows(base, start, stop, d.dtype))
    if total is None:
        raise ValueError("a weight with no rows has no product")
    return total


class _BlockedProduct:
    """Mixin for MLX's quantized layers: the same parameters, the product of this file."""

    def __call__(self, x: mx.array) -> mx.array:
        y = frozen_product(x, self)  # type: ignore[arg-type]
        return y + self["bias"] if "bias" in self else y  # type: ignore[operator,index]


class BlockedQuantizedLinear(_BlockedProduct, nn.QuantizedLinear):
    """``nn.QuantizedLinear`` that multiplies with ``frozen_product``."""


class BlockedQuantizedEmbedding(nn.QuantizedEmbedding):
    """``nn.QuantizedEmbedding`` whose ``as_linear`` multiplies with ``frozen_product``."""

    def as_linear(self, x: mx.array) -> mx.array:
        """``x W^T``: ``[..., dims] -> [..., num_embeddings]``."""
        return frozen_product(x, self)


def use_blocked_products(model: nn.Module) -> None:
    """Give every quantized layer of ``model`` the products of this file, in place.

    Called once after loading on the CPU backend. Parameters, names and types as seen by
    ``isinstance`` stay what they were, and base and adapted model keep using the same product.
    """
    for _, module in model.named_modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = BlockedQuantizedLinear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = BlockedQuantizedEmbedding
