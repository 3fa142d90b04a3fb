"""Which tensor of a model becomes which tensor of the file, and how it changes on the way."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import mlx.core as mx

from dora_mlx.errors import UserError
from dora_mlx.exporting.gguf.architectures import Architecture
from dora_mlx.exporting.gguf.hyperparameters import Hyperparameters
from dora_mlx.exporting.merge import Weights, split_rows

# mlx-lm keeps all experts of a layer in one tensor, as GGUF does.
_EXPERTS = re.compile(r"\.(mlp|block_sparse_moe)\.switch_mlp\.")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the file: where it comes from, its name, and its shape.

    ``heads`` is the number of heads whose rows are reordered, or 0; ``offset`` is added.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int = 0
    offset: float = 0.0

    def arrange(self, tensor: mx.array) -> mx.array:
        """``tensor`` as the file wants it, same shape."""
        if self.heads:
            tensor = permute_heads(tensor, self.heads)
        return tensor + self.offset if self.offset else tensor

    def restore(self, tensor: mx.array) -> mx.array:
        """``tensor`` of a file as the model has it: the inverse of ``arrange``."""
        if self.heads:
            tensor = unpermute_heads(tensor, self.heads)
        return tensor - self.offset if self.offset else tensor

    def blocks(self, weights: Weights) -> Iterator[mx.array]:
        """The tensor as the file wants it, in blocks ``[rows, width]`` of float32."""
        if self.heads:
            return split_rows(self.arrange(weights[self.source]))
        return map(self.arrange, weights.blocks(self.source))


def plan_tensors(
    architecture: Architecture, numbers: Hyperparameters, shapes: dict[str, tuple[int, ...]]
) -> list[TensorPlan]:
    """One plan for every tensor in ``shapes``, in the same order.

    Raises:
        UserError: When a tensor has no place in the architecture, or does not fit the config.
    """
    names = gguf.get_tensor_name_map(architecture.arch, numbers.block_count)
    plans = []
    for source, shape in shapes.items():
        known = _EXPERTS.sub(".mlp.experts.", source.removeprefix(architecture.prefix))
        name = names.get_name(known, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                f"{source} has no place in a GGUF file of a "
                f"{gguf.MODEL_ARCH_NAMES[architecture.arch]} model, so this model cannot be "
                "exported yet."
            )
        heads = _heads(name, numbers)
        if heads and shape[0] != heads * numbers.head_dim:
            raise UserError(
                f"{source} has {shape[0]} rows where config.json says {heads} heads of "
                f"{numbers.head_dim}. Export with the config.json this model was trained from."
            )
        offset = architecture.norm_offset if name.endswith("norm.weight") else 0.0
        plans.append(TensorPlan(source, name, shape, heads * architecture.permuted, offset))
    return plans


def permute_heads(tensor: mx.array, heads: int) -> mx.array:
    """Rows from half-split to neighbouring order, head by head; shape is kept.

    ``[heads * head_dim, ...]``: row i of a head's first half goes to 2 i, of its second to 2 i + 1.
    """
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def unpermute_heads(tensor: mx.array, heads: int) -> mx.array:
    """The inverse of ``permute_heads``."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def _heads(name: str, numbers: Hyperparameters) -> int:
    part = name.split(".")[-2]
    return {"attn_q": numbers.head_count, "attn_k": numbers.head_count_kv}.get(part, 0)
