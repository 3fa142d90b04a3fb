"""Put adapter layers into the transformer blocks of an mlx-lm model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_product import (
    is_quantized,
    row_shape,
    weight_dtype,
    weight_rows,
    weight_shape,
    with_weight,
)
from dora_mlx.layers import (
    DoRAEmbedding,
    DoRALinear,
    DoRASwitchLinear,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
)
from dora_mlx.layers.lora import LowRankLayer

Method = Literal["dora", "lora", "full"]

_LINEAR = (nn.Linear, nn.QuantizedLinear)
_SWITCH = (SwitchLinear, QuantizedSwitchLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
# What can be adapted, and by which layers.
_KINDS: list[tuple[tuple[type[nn.Module], ...], dict[str, type[LowRankLayer]]]] = [
    (_LINEAR, {"dora": DoRALinear, "lora": LoRALinear}),
    (_SWITCH, {"dora": DoRASwitchLinear, "lora": LoRASwitchLinear}),
    (_EMBEDDING, {"dora": DoRAEmbedding, "lora": LoRAEmbedding}),
]


@dataclass(frozen=True)
class AdapterSpec:
    """What was put into a model, and all that is needed to do it again.

    ``keys`` are the paths of the adapted layers inside a block, such as ``self_attn.q_proj``, and
    the full paths of those outside of the blocks, such as ``model.embed_tokens``; ``num_layers``
    counts the adapted blocks from the last. The rest is as given to ``attach``.
    """

    method: Method
    rank: int
    alpha: float
    dropout: float
    keys: tuple[str, ...]
    num_layers: int
    rslora: bool = False
    rank_overrides: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Factor of the update at ``rank``: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def attach(
    model: nn.Module,
    method: Method = "dora",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] = (),
    num_layers: int | None = None,
    rslora: bool = False,
    rank_overrides: tuple[str, ...] = (),
) -> AdapterSpec:
    """Freeze ``model`` and make it trainable by ``method``, in place.

    Args:
        model: An mlx-lm model: its transformer blocks are ``model.layers``.
        method: ``dora`` or ``lora`` wraps layers; ``full`` unfreezes every weight and
            dequantizes a quantized model first.
        rank: Rank of the update.
        alpha: Strength of the update; its scale is alpha / rank.
        dropout: Probability of dropping an input of the low-rank path in training.
        target_modules: Names or patterns of layers; empty means all linear layers of a block,
            those of experts included. A pattern that matches nothing in the blocks is looked for
            in the rest of the model: ``embed_tokens``, ``lm_head``.
        num_layers: How many blocks, counted from the last; ``None`` means all.
        rslora: Scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
        rank_overrides: ``NAME=RANK`` for layers by name or pattern; the last match counts, and
            the scale follows a layer's own rank.

    Raises:
        UserError: If a pattern matches no layer, or there are not so many blocks.
    """
    blocks = model.layers
    num_layers = len(blocks) if num_layers is None else num_layers
    if num_layers > len(blocks):
        raise UserError(
            f"--num-layers is {num_layers}, but the model has only {len(blocks)} blocks."
        )
    model.freeze()
    if method == "full":
        _dequantize(model)
        model.unfreeze()
        return AdapterSpec(method, rank, alpha, dropout, (), num_layers)
    blocks = blocks[-num_layers:]
    inside, outside = _matching_keys(model, blocks, target_modules)
    keys = inside | outside
    ranks = dict.fromkeys(keys, rank) | _own_ranks(rank_overrides, keys)
    for owner, own_keys in [*((block, inside) for block in blocks), (model, outside)]:
        wrapped = []
        for path, module in owner.named_modules():
            if path in own_keys and (layers := _layers_for(module)):
                # The layers divide by the rank; rsLoRA divides by its square root.
                strength = alpha * math.sqrt(ranks[path]) if rslora else alpha
                layer = layers[method].from_base(module, ranks[path], strength, dropout)
                wrapped.append((path, layer))
        owner.update_modules(tree_unflatten(wrapped))
    return AdapterSpec(
        method, rank, alpha, dropout, tuple(sorted(keys)), num_layers, rslora, rank_overrides
    )


def adapted_layers(model: nn.Module) -> list[tuple[str, LowRankLayer]]:
    """Path and layer of every adapter in ``model``."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LowRankLayer)]


def adaptable_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and layer of everything in ``model`` that could be adapted, in its blocks or not."""
    return [(path, m) for path, m in model.named_modules() if _layers_for(m)]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block, ``model`` is its base model: the same weights without the adapters."""
    layers = adapted_layers(model)
    model.update_modules(tree_unflatten([(path, layer.base) for path, layer in layers]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(layers)))


def _layers_for(module: nn.Module) -> dict[str, type[LowRankLayer]] | None:
    """The adapter layer of each method for a layer, or ``None`` if it cannot be adapted."""
    for types, layers in _KINDS:
        if isinstance(module, types):
            return layers
    return None


def _matching_keys(
    model: nn.Module, blocks: list[nn.Module], patterns: tuple[str, ...]
) -> tuple[set[str], set[str]]:
    """Paths inside a block of the layers that any pattern names, and paths outside of blocks."""
    inside = {
        path
        for block in blocks
        for path, module in block.named_modules()
        if isinstance(module, (*_LINEAR, *_SWITCH))
    }
    if not patterns:
        return inside, set()
    in_blocks = {id(module) for block in model.layers for _, module in block.named_modules()}
    outside = {
        path
        for path, module in model.named_modules()
        if id(module) not in in_blocks and _layers_for(module)
    }
    # A pattern such as * means the blocks; what is outside has to be meant.
    found = set().union(*(_matching(pattern, inside) for pattern in patterns))
    left = tuple(pattern for pattern in patterns if not _matching(pattern, inside))
    others = _matches("--target-modules", left, outside, all_paths=inside | outside)
    return found, set().union(*others.values())


def _own_ranks(overrides: tuple[str, ...], keys: set[str]) -> dict[str, int]:
    """Rank of every layer that ``NAME=RANK`` gives one."""
    pairs = [override.rpartition("=")[::2] for override in overrides]
    wrong = [f"{name}={rank}" for name, rank in pairs if not name or not rank.isdecimal()]
    if wrong or any(int(rank) < 1 for _, rank in pairs):
        raise UserError(
            f"--rank-overrides takes NAME=RANK with a rank of at least 1, not "
            f"{', '.join(wrong or overrides)}."
        )
    matches = _matches("--rank-overrides", tuple(name for name, _ in pairs), keys)
    return {path: int(rank) for name, rank in pairs for path in matches[name]}


def _matches(
    flag: str, patterns: tuple[str, ...], paths: set[str], all_paths: set[str] | None = None
) -> dict[str, set[str]]:
    """Paths that each pattern names; ``all_paths`` are those to choose from in an error."""
    found = {pattern: _matching(pattern, paths) for pattern in patterns}
    idle = [pattern for pattern in patterns if not found[pattern]]
    if idle:
        raise UserError(
            f"{flag}: nothing that is adapted matches {', '.join(idle)}. "
            f"There are {', '.join(sorted(all_paths or paths))}."
        )
    return found


def _matching(pattern: str, paths: set[str]) -> set[str]:
    """Paths that a pattern names, as a whole or by their last part."""
    return {
        path
        for path in paths
        if fnmatchcase(path, pattern) or fnmatchcase(path.rsplit(".", 1)[-1], pattern)
    }


def _dequantize(model: nn.Module) -> None:
    """Replace every quantized layer by a dense one of the same values and dtype."""
    dense: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if is_quantized(module) and _layers_for(module):
            weight = weight_rows(module, 0, row_shape(module)[0], weight_dtype(module))
            weight = weight.reshape(weight_shape(module))
            dense.append((path, with_weight(module, weight, dequantize=True)))
    model.update_modules(tree_unflatten(dense))
    mx.eval(model.parameters())
