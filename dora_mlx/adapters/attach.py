"""Put adapter layers into the transformer blocks of an mlx-lm model."""

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
    ``num_layers`` counts the adapted blocks from the last.
    """

    method: Method
    rank: int
    alpha: float
    dropout: float
    keys: tuple[str, ...]
    num_layers: int


def attach(
    model: nn.Module,
    method: Method = "dora",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: tuple[str, ...] = (),
    num_layers: int | None = None,
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
    for block in blocks[-num_layers:]:
        wrapped = [
            (path, _LAYERS[method].from_base(module, rank, alpha, dropout))
            for path, module in block.named_modules()
            if path in keys and _is_linear(module)
        ]
        block.update_modules(tree_unflatten(wrapped))
    return AdapterSpec(method, rank, alpha, dropout, tuple(sorted(keys)), num_layers)


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
    matches = {
        pattern: {
            path
            for path in candidates
            if fnmatchcase(path, pattern) or fnmatchcase(path.rsplit(".", 1)[-1], pattern)
        }
        for pattern in patterns
    }
    idle = [pattern for pattern, found in matches.items() if not found]
    if idle:
        raise UserError(
            f"--target-modules: nothing in the model matches {', '.join(idle)}. "
            f"Its linear layers are {', '.join(sorted(candidates))}."
        )
    return set().union(*matches.values())


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
