"""LoRA and DoRA around mlx-lm's ``SwitchLinear`` and ``QuantizedSwitchLinear``: experts.

W ``[experts, out, in]``; every expert has an A ``[rank, in]`` and a B ``[out, rank]``, laid out
as in mlx-lm's ``LoRASwitchLinear``, so its adapters load here; and a row of m ``[experts, out]``.
"""

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.device import on_cpu
from dora_mlx.kernels.frozen_product import gathered_product
from dora_mlx.kernels.frozen_weight import weight_shape
from dora_mlx.kernels.recomputation import dear
from dora_mlx.kernels.row_norm import Update
from dora_mlx.layers.dora import DoRA
from dora_mlx.layers.lora import LoRA, LowRankLayer, uniform


class _AdaptedSwitchLinear(LowRankLayer):
    def _add_parameters(self, base: nn.Module, rank: int) -> None:
        experts, out, width = weight_shape(base)
        self.lora_a = uniform(width, (experts, rank, width))
        self.lora_b = mx.zeros((experts, out, rank))

    def _update(self) -> Update:
        return Update(self.lora_a.swapaxes(-1, -2), self.lora_b.swapaxes(-1, -2), self.scale)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """``[..., 1, in] -> [..., 1, out]`` in the dtype of ``x``, each row by its expert.

        Args:
            x: ``[..., 1, in]``.
            indices: Index of the expert of each row.
            sorted_indices: Whether the indices ascend.
        """

        def gathered(x: mx.array, factor: mx.array, indices: mx.array) -> mx.array:
            # MLX's CPU backend gathers in float32 alone.
            dtype = mx.float32 if on_cpu() else x.dtype
            return mx.gather_mm(
                x.astype(dtype),
                factor.swapaxes(-1, -2).astype(dtype),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            ).astype(x.dtype)

        def terms(
            x: mx.array, low_rank: mx.array, lora_b: mx.array, indices: mx.array
        ) -> list[mx.array]:
            indices = mx.stop_gradient(indices)
            frozen = gathered_product(x, self.base, indices, sorted_indices)
            return [frozen, gathered(low_rank, self.scale * lora_b, indices)]

        low_rank = dear(gathered)(self.dropout(x), self.lora_a, indices)
        y = self._combine(terms, (x, low_rank, self.lora_b, indices), experts=indices)
        return y + self.base["bias"][indices][..., None, :] if "bias" in self.base else y


class LoRASwitchLinear(LoRA, _AdaptedSwitchLinear):
    """LoRA around experts.

    Parameters: ``lora_a [experts, rank, in]`` and ``lora_b [experts, out, rank]``, float32.
    """


class DoRASwitchLinear(DoRA, _AdaptedSwitchLinear):
    """DoRA around experts.

    Parameters: ``lora_a [experts, rank, in]``, ``lora_b [experts, out, rank]`` and ``magnitude
    [experts, out]``, float32.
    """
