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
from dora_mlx.kernels.frozen_weight import (
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
    full paths of single layers, such as ``model.embed_tokens``; ``num_layers`` counts the blocks,
    from the last, that the former mean. The rest is as given to ``attach``.
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
        alpha: Strength of the update; its scale s is alpha / rank.
        dropout: Probability of dropping an input of the low-rank path in training.
        target_modules: Names or patterns of layers; empty means all linear layers of a block,
            those of experts included. A pattern that matches nothing in the blocks is looked for
            in the rest of the model: ``embed_tokens``, ``lm_head``.
        num_layers: How many blocks, counted from the last; ``None`` means all.
        rslora: Make s alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
        rank_overrides: ``NAME=RANK`` for layers by name or pattern; the last match counts, and
            the scale follows a layer's own rank.

    Returns:
        What was attached, with the layers by name instead of by pattern.

    Raises:
        UserError: If a pattern or a rank override matches no layer, or there are not so many
            blocks.
    """
    blocks = model.layers
    num_layers = len(blocks) if num_layers is None else num_layers
    if num_layers > len(blocks):
        raise UserError(
            f"--num-layers is {num_layers}, but the model has only {len(blocks)} blocks."
        )
    model.freeze()
    if method == "full":
        model.update_modules(tree_unflatten(list(dense_twins(model).items())))
        mx.eval(model.parameters())
        model.unfreeze()
        return AdapterSpec(method, rank, alpha, dropout, (), num_layers)
    keys = _matching_keys(model, blocks[-num_layers:], target_modules)
    spec = AdapterSpec(
        method, rank, alpha, dropout, tuple(sorted(keys)), num_layers, rslora, rank_overrides
    )
    model.update_modules(tree_unflatten(list(adapter_layers(model, spec).items())))
    return spec


def adapter_layers(model: nn.Module, spec: AdapterSpec) -> dict[str, LowRankLayer]:
    """A new adapter layer around every layer of ``model`` that ``spec`` adapts, by its path.

    The model stays as it is: the layers become part of it by ``model.update_modules``.

    Raises:
        UserError: If a rank override names nothing that is adapted.
    """
    ranks = layer_ranks(spec)
    layers = {}
    for path, key, module in adapted_places(model, spec):
        rank = ranks[key]
        # The layers divide by the rank; rsLoRA divides by its square root.
        strength = spec.alpha * math.sqrt(rank) if spec.rslora else spec.alpha
        kinds = _layers_for(module)
        layers[path] = kinds[spec.method].from_base(module, rank, strength, spec.dropout)
    return layers


def adapted_shapes(model: nn.Module, spec: AdapterSpec) -> dict[str, tuple[int, ...]]:
    """Name in the model and shape of every array of an adapter, without making its layers.

    Raises:
        UserError: If a rank override names nothing that is adapted.
    """
    ranks = layer_ranks(spec)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, key, module in adapted_places(model, spec):
        rank = ranks[key]
        *experts, out, width = weight_shape(module)
        magnitude: tuple[int, ...] = (*experts, out)
        if is_experts(module):
            a, b = (*experts, rank, width), (*experts, out, rank)
        elif is_embedding(module):
            a, b, magnitude = (out, rank), (rank, width), (width,)
        else:
            a, b = (width, rank), (rank, out)
        shapes |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        if spec.method == "dora":
            shapes[f"{path}.magnitude"] = magnitude
    return shapes


def is_embedding(module: nn.Module) -> bool:
    """Whether a layer looks up rows."""
    return isinstance(module, _EMBEDDING)


def is_experts(module: nn.Module) -> bool:
    """Whether a layer holds the weights of several experts."""
    return isinstance(module, _SWITCH)


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that ``model`` has once it is dequantized."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        own = {name: array.shape for name, array in module.items() if _is_parameter(name, array)}
        if is_quantized(module) and _layers_for(module):
            own = {name: own[name] for name in own if name not in ("scales", "biases")}
            own["weight"] = weight_shape(module)
        shapes |= {f"{path}.{name}" if path else name: shape for name, shape in own.items()}
    return shapes


def dense_twins(model: nn.Module) -> dict[str, nn.Module]:
    """A dense layer for every quantized one by its path, of the same values and dtype, lazily."""
    twins = {}
    for path, module in adaptable_layers(model):
        if is_quantized(module):
            weight = weight_rows(module, 0, row_shape(module)[0], weight_dtype(module))
            weight = weight.reshape(weight_shape(module))
            twins[path] = with_weight(module, weight, dequantize=True)
    return twins


def linear_keys(model: nn.Module, num_layers: int) -> list[str]:
    """Paths inside a block of all linear layers of the last ``num_layers`` blocks."""
    return sorted(_matching_keys(model, model.layers[-num_layers:], ()))


def block_paths(model: nn.Module) -> list[str]:
    """Paths of the transformer blocks of ``model``, such as ``model.layers.0``."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(block)] for block in model.layers]


def layer_ranks(spec: AdapterSpec) -> dict[str, int]:
    """Rank of every layer by its key.

    Raises:
        UserError: If a rank override names nothing that is adapted.
    """
    return dict.fromkeys(spec.keys, spec.rank) | _own_ranks(spec.rank_overrides, set(spec.keys))


def adapted_places(model: nn.Module, spec: AdapterSpec) -> Iterator[tuple[str, str, nn.Module]]:
    """Path, key and module of every layer that a spec adapts, block after block."""
    keys = set(spec.keys)
    blocks = list(zip(block_paths(model), model.layers, strict=True))[-spec.num_layers :]
    for prefix, owner in [*((f"{path}.", block) for path, block in blocks), ("", model)]:
        for path, module in owner.named_modules():
            if path in keys and _layers_for(module):
                yield prefix + path, path, module


def adapted_layers(model: nn.Module) -> list[tuple[str, LowRankLayer]]:
    """Path and layer of every adapter in ``model``."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, LowRankLayer)]


def adaptable_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and layer of everything in ``model`` that could be adapted, in its blocks or not."""
    return [(path, m) for path, m in model.named_modules() if _layers_for(m)]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block, ``model`` is its base model: the same weights without the adapters.

    A model whose weights were trained themselves (``full``) has none and stays as it is.
    """
    layers = adapted_layers(model)
    model.update_modules(tree_unflatten([(path, layer.base) for path, layer in layers]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(layers)))


def _layers_for(module: nn.Module) -> dict[str, type[LowRankLayer]]:
    """The adapter layer of each method for a layer; empty if it cannot be adapted."""
    for types, layers in _KINDS:
        if isinstance(module, types):
            return layers
    return {}


def _matching_keys(
    model: nn.Module, blocks: list[nn.Module], patterns: tuple[str, ...]
) -> set[str]:
    """Paths inside a block of the layers that any pattern names, and full paths of others."""
    inside = {
        path
        for block in blocks
        for path, module in block.named_modules()
        if isinstance(module, (*_LINEAR, *_SWITCH))
    }
    if not patterns:
        return inside
    in_blocks = {id(module) for block in model.layers for _, module in block.named_modules()}
    everything = dict(adaptable_layers(model))
    outside = {path for path, module in everything.items() if id(module) not in in_blocks}
    # A pattern such as * means the blocks; what is outside has to be meant, and a layer of one
    # block by its full path.
    found = set().union(*(_matching(pattern, inside) for pattern in patterns))
    found |= set(patterns) & everything.keys()
    left = tuple(p for p in patterns if p not in everything and not _matching(p, inside))
    others = _matches("--target-modules", left, outside, all_paths=inside | outside)
    return found.union(*others.values())


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


def _is_parameter(name: str, value: object) -> bool:
    # As in mlx.nn: what starts with an underscore is not a parameter.
    return isinstance(value, mx.array) and not name.startswith("_")
