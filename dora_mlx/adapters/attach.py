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

from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_product import weight_dtype, weight_rows, weight_shape
from dora_mlx.layers.dora import DoRALinear
from dora_mlx.layers.lora import LoRALinear, LowRankLinear

Method = Literal["dora", "lora", "full"]
_LAYERS: dict[str, type[LowRankLinear]] = {"dora": DoRALinear, "lora": LoRALinear}


@dataclass(frozen=True)
class AdapterSpec:
    """What was put into a model, and all that is needed to do it again.

    ``keys`` are the paths of the adapted layers inside a block, such as ``self_attn.q_proj``;
    ``num_layers`` counts the adapted blocks from the last. The rest is as given to ``attach``.
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
        method: ``dora`` or ``lora`` wraps linear layers; ``full`` unfreezes every weight and
            dequantizes a quantized model first.
        rank: Rank of the update.
        alpha: Strength of the update; its scale is alpha / rank.
        dropout: Probability of dropping an input of the low-rank path in training.
        target_modules: Names or patterns of linear layers; empty means all of a block.
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
    keys = _matching_keys(blocks[-num_layers:], target_modules)
    ranks = dict.fromkeys(keys, rank) | _own_ranks(rank_overrides, keys)
    for block in blocks[-num_layers:]:
        wrapped = []
        for path, module in block.named_modules():
            if path in keys and _is_linear(module):
                # The layers divide by the rank; rsLoRA divides by its square root.
                strength = alpha * math.sqrt(ranks[path]) if rslora else alpha
                layer = _LAYERS[method].from_base(module, ranks[path], strength, dropout)
                wrapped.append((path, layer))
        block.update_modules(tree_unflatten(wrapped))
    return AdapterSpec(
        method, rank, alpha, dropout, tuple(sorted(keys)), num_layers, rslora, rank_overrides
    )


def adapted_layers(model: nn.Module) -> list[tuple[str, LowRankLinear]]:
    """Path and layer of every adapter in ``model``."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LowRankLinear)]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block, ``model`` is its base model: the same weights without the adapters."""
    layers = adapted_layers(model)
    model.update_modules(tree_unflatten([(path, layer.base) for path, layer in layers]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(layers)))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def _matching_keys(blocks: list[nn.Module], patterns: tuple[str, ...]) -> set[str]:
    """Paths inside a block of the linear layers that any pattern names."""
    candidates = {
        path for block in blocks for path, module in block.named_modules() if _is_linear(module)
    }
    if not patterns:
        return candidates
    matches = _matches("--target-modules", patterns, candidates)
    return set().union(*matches.values())


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


def _matches(flag: str, patterns: tuple[str, ...], paths: set[str]) -> dict[str, set[str]]:
    """Paths that each pattern names, as a whole or by their last part."""
    found = {
        pattern: {
            path
            for path in paths
            if fnmatchcase(path, pattern) or fnmatchcase(path.rsplit(".", 1)[-1], pattern)
        }
        for pattern in patterns
    }
    idle = [pattern for pattern in patterns if not found[pattern]]
    if idle:
        raise UserError(
            f"{flag}: nothing that is adapted matches {', '.join(idle)}. "
            f"There are {', '.join(sorted(paths))}."
        )
    return found


def _dequantize(model: nn.Module) -> None:
    """Replace every quantized layer by a dense one of the same values and dtype."""
    dense: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        out, width = weight_shape(module)
        layer = _empty_twin(module, out, width)
        layer.weight = weight_rows(module, 0, out, weight_dtype(module))
        dense.append((path, layer))
    model.update_modules(tree_unflatten(dense))
    mx.eval(model.parameters())


def _empty_twin(module: nn.Module, out: int, width: int) -> nn.Module:
    if isinstance(module, nn.QuantizedEmbedding):
        return nn.Embedding(out, width)
    twin = nn.Linear(width, out, bias=False)
    if "bias" in module:
        twin.bias = module.bias
    return twin
