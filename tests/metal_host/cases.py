"""Arguments of the kernels: every type and width, at sizes that fill tiles and that do not."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, product

import mlx.core as mx
import mlx.nn as nn
import numpy as np


@dataclass(frozen=True)
class RowNormCase:
    """A weight and an update, from which arrays are made."""

    mode: str
    bits: int
    group: int
    scales: mx.Dtype
    outputs: int
    inputs: int
    rank: int
    seed: int = 0

    def __str__(self) -> str:
        mode = f"affine{self.bits}" if self.mode == "affine" else self.mode
        kind = f"{mode}-group{self.group}-{str(self.scales).removeprefix('mlx.core.')}"
        return f"{kind}-{self.outputs}x{self.inputs}-rank{self.rank}"

    def base(self) -> nn.Module:
        mx.random.seed(self.inputs + self.rank + self.seed)
        base = nn.QuantizedLinear(
            self.inputs, self.outputs, False, self.group, self.bits, mode=self.mode
        )
        # Random words hold every code, which quantized normal numbers do not. MLX's random
        # integers go through float32 and leave the low bits of a word zero.
        words = np.random.default_rng(self.inputs + self.seed).integers(
            2**32, size=base.weight.shape
        )
        base.weight = mx.array(words.astype(np.uint32))
        if self.mode == "affine":
            base.scales = mx.random.uniform(-0.02, 0.02, base.scales.shape).astype(self.scales)
            base.biases = mx.random.uniform(-0.1, 0.1, base.scales.shape).astype(self.scales)
            return base
        if self.mode == "mxfp8":
            # The codes of NaN are no weights.
            codes = np.array(base.weight).view(np.uint8)
            codes[codes & 127 == 127] ^= 1
            base.weight = mx.array(codes.view(np.uint32))
        low, high = (0, 127) if self.mode == "nvfp4" else (118, 130)
        base.scales = mx.random.randint(low, high, base.scales.shape, mx.uint32).astype(mx.uint8)
        return base

    def update(self) -> tuple[mx.array, mx.array]:
        lora_a = mx.random.normal((self.inputs, self.rank)) * self.inputs**-0.5
        return lora_a, 0.3 * mx.random.normal((self.rank, self.outputs))


def row_norm_cases() -> Iterator[RowNormCase]:
    """Every width, group and type of scales; sizes and ranks take turns."""
    # One row; less and more than a threadgroup's 32 rows; one and several groups of 256 inputs.
    outputs, blocks = cycle([1, 3, 37, 64, 65]), cycle([1, 2, 5, 7])
    ranks = cycle([1, 2, 7, 8, 9, 16, 33, 64, 3])
    scales = mx.float32, mx.float16, mx.bfloat16
    for bits, group, dtype in product((2, 3, 4, 5, 6, 8), (32, 64, 128), scales):
        yield RowNormCase(
            "affine", bits, group, dtype, next(outputs), group * next(blocks), next(ranks)
        )
    for (mode, bits, group), _ in product(
        [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)], range(4)
    ):
        # mx.quantize wants nvfp4's groups of 16 in pairs.
        inputs = 32 * (2 * next(blocks) + 3)
        yield RowNormCase(mode, bits, group, mx.uint8, next(outputs), inputs, next(ranks))


ROW_NORM_CASES = list(row_norm_cases())

GAIN_TYPES = mx.float32, mx.float16, mx.bfloat16
# One token and one column; blocks of 64 tokens and tiles of 128 columns, full, and partly full.
GAIN_SHAPES = (1, 1), (64, 128), (2, 37, 130), (3, 65, 333), (7, 5)


def gain_arguments(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """Cotangent, y, magnitude and norm; one magnitude is zero where there are several."""
    mx.random.seed(sum(shape))
    cotangent, y = (mx.random.normal(shape).astype(dtype) for _ in range(2))
    magnitude, norm = (mx.random.uniform(0.5, 2, shape[-1:]) for _ in range(2))
    if shape[-1] > 1:
        magnitude[1], y[..., 1] = 0, 0
    return cotangent, y, magnitude, norm
