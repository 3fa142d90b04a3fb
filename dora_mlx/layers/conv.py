"""LoRA and DoRA around ``nn.Conv1d`` and ``nn.Conv2d``.

W ``[out, *kernel, channels / groups]`` is taken as a matrix ``[out, in]`` whose row holds all
weights of one output channel, with in = kernel * channels / groups. A ``[in, rank]`` is then a
convolution like that of the base with ``rank`` outputs, B ``[rank, out]`` a mixing of channels,
and the norm runs over all axes of W but the first, as in PEFT.

Groups share A: each convolves its channels with it and mixes with its own columns of B. PEFT's
LoRA gives groups an A over all channels, whose update is not one of W; for one group both agree.
"""

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.frozen_product import frozen_convolution
from dora_mlx.kernels.frozen_weight import row_shape
from dora_mlx.layers.dora import DoRA
from dora_mlx.layers.lora import LoRA, LowRankLayer, uniform


class _AdaptedConvolution(LowRankLayer):
    def _add_parameters(self, base: nn.Module, rank: int) -> None:
        out, width = row_shape(base)
        self.lora_a = uniform(width, (width, rank))
        self.lora_b = mx.zeros((rank, out))

    def __call__(self, x: mx.array) -> mx.array:
        """``[batch, *places, channels] -> [batch, *places, out]`` in the dtype of ``x``."""
        rank, groups = self.lora_b.shape[0], self.base.groups
        kernel = self.lora_a.T.reshape(rank, *self.base.weight.shape[1:]).astype(x.dtype)
        kernel = mx.concatenate([kernel] * groups)
        low_rank = frozen_convolution(self.dropout(x), kernel, self.base)
        y = self._combine(self._terms, (x, low_rank, self.lora_b))
        return y + self.base.bias if "bias" in self.base else y

    def _terms(self, x: mx.array, low_rank: mx.array, lora_b: mx.array) -> list[mx.array]:
        frozen = frozen_convolution(x, mx.stop_gradient(self.base.weight), self.base)
        mixing = (self.scale * lora_b).astype(x.dtype)
        if self.base.groups == 1:
            return [frozen, low_rank @ mixing]
        rank, groups = lora_b.shape[0], self.base.groups
        # [groups, rank, out / groups] against [..., groups, 1, rank]
        mixing = mixing.reshape(rank, groups, -1).swapaxes(0, 1)
        grouped = low_rank.reshape(*low_rank.shape[:-1], groups, 1, rank)
        return [frozen, (grouped @ mixing).reshape(frozen.shape)]


class LoRAConv1d(LoRA, _AdaptedConvolution):
    """LoRA around ``nn.Conv1d``.

    Parameters: ``lora_a [kernel * channels / groups, rank]`` and ``lora_b [rank, out]``, float32.
    """


class DoRAConv1d(DoRA, _AdaptedConvolution):
    """DoRA around ``nn.Conv1d``.

    Parameters: ``lora_a [kernel * channels / groups, rank]``, ``lora_b [rank, out]`` and
    ``magnitude [out]``, float32.
    """


class LoRAConv2d(LoRA, _AdaptedConvolution):
    """LoRA around ``nn.Conv2d``.

    Parameters: ``lora_a [height * width * channels / groups, rank]``, where height and width are
    those of the kernel, and ``lora_b [rank, out]``, float32.
    """


class DoRAConv2d(DoRA, _AdaptedConvolution):
    """DoRA around ``nn.Conv2d``.

    Parameters: ``lora_a [height * width * channels / groups, rank]``, where height and width are
    those of the kernel, ``lora_b [rank, out]`` and ``magnitude [out]``, float32.
    """
