"""LoRA and DoRA around ``nn.Embedding`` and ``nn.QuantizedEmbedding``.

    lookup      y = m / ||W + s A B||_column * (W_t + s A_t B)        of token t
    as_linear   y = (m / ||W + s A B||_column * x) (W + s A B)^T

W ``[tokens, dims]``; A ``[tokens, rank]``; B ``[rank, dims]``; m ``[dims]``. A lookup is the
linear layer of a one-hot vector, whose outputs are the dimensions: the norm runs over all tokens
and there is one magnitude per dimension. That is what PEFT does. mlx-lm has a magnitude per
token instead, so its DoRA embeddings are another method and their adapters do not load here.

There is no dropout in a lookup, as in PEFT; ``as_linear`` has it on the low-rank path.
"""

import mlx.core as mx
import mlx.nn as nn

from dora_mlx.kernels.frozen_weight import weight_shape
from dora_mlx.kernels.row_norm import ColumnNorm, Update, safe_norms
from dora_mlx.layers.dora import DoRA
from dora_mlx.layers.lora import LoRA, LowRankLayer, uniform


class _AdaptedEmbedding(LowRankLayer):
    def _add_parameters(self, base: nn.Module, rank: int) -> None:
        tokens, dims = weight_shape(base)
        self.lora_a = uniform(tokens, (tokens, rank))
        self.lora_b = mx.zeros((rank, dims))

    def _update(self) -> Update:
        # The rows of W are tokens here, so A and B change places.
        return Update(self.lora_b.T, self.lora_a.T, self.scale)

    def __call__(self, tokens: mx.array) -> mx.array:
        """``[...] -> [..., dims]`` in the dtype of the base."""

        def terms(low_rank: mx.array, lora_b: mx.array) -> list[mx.array]:
            frozen = mx.stop_gradient(self.base(tokens))
            update = low_rank.astype(frozen.dtype) @ (self.scale * lora_b).astype(frozen.dtype)
            return [frozen, update]

        return self._combine(terms, (self.lora_a[tokens], self.lora_b))

    def _as_linear(self, x: mx.array) -> mx.array:
        """``x (W + s A B)^T``."""
        low_rank = self.dropout(x) @ self.lora_b.T.astype(x.dtype)
        update = low_rank @ (self.scale * self.lora_a).T.astype(x.dtype)
        return self.base.as_linear(x) + update


class LoRAEmbedding(LoRA, _AdaptedEmbedding):
    """LoRA around an embedding.

    Parameters: ``lora_a [tokens, rank]`` and ``lora_b [rank, dims]``, float32.
    """

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as output layer: ``[..., dims] -> [..., tokens]`` in the dtype of x."""
        return self._as_linear(x)


class DoRAEmbedding(DoRA, _AdaptedEmbedding):
    """DoRA around an embedding.

    Parameters: ``lora_a [tokens, rank]``, ``lora_b [rank, dims]`` and ``magnitude [dims]``,
    float32.
    """

    norm_type = ColumnNorm

    def as_linear(self, x: mx.array) -> mx.array:
        """The embedding as output layer: ``[..., dims] -> [..., tokens]`` in the dtype of x.

        The gain is float32; a 16-bit x is rounded once after it. A change of all gains by less
        than that is lost, as it would be in the rounding of the logits.
        """
        scaled = (self.magnitude / self.norm()) * x.astype(mx.float32)
        return self._as_linear(scaled.astype(x.dtype))

    def _merged_gain(self) -> mx.array | None:
        (norm,) = safe_norms([(self._adapted_norm(), self._update())])
        return (self.magnitude / norm)[None]
