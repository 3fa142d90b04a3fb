"""Run what was exported in mlx-lm, one block of the model in memory at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

from dora_mlx.exporting.logits import Logits, VerificationError, logits_of
from dora_mlx.kernels.blocked_layers import use_blocked_products
from dora_mlx.kernels.device import on_cpu
from dora_mlx.loading import LoadedModel


def logits_of_folder(folder: Path, tokens: mx.array) -> tuple[Logits, mx.Dtype]:
    """Logits of ``tokens`` ``[B, L]`` by the model in a folder, and the type of computation.

    Raises:
        VerificationError: If mlx-lm does not load it, with what it said.
    """
    try:
        model, _ = load_model(folder, lazy=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise VerificationError(f"mlx-lm cannot load {folder}: {error}") from error
    return _logits(model, tokens, lambda block, path: None)


def logits_of_weights(
    base: LoadedModel, weights: Mapping[str, mx.array], tokens: mx.array
) -> tuple[Logits, mx.Dtype]:
    """Logits of a dense model with the architecture of ``base`` and other weights.

    ``weights`` is asked for a tensor when the block that it belongs to is computed.

    Raises:
        VerificationError: If the model has other tensors.
    """
    config = {k: v for k, v in base.config.items() if not k.startswith("quantization")}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    if hasattr(model, "sanitize"):
        # Some architectures learn from the names that the output layer is the embedding.
        model.sanitize(dict.fromkeys(weights))
    expected = _names(model)
    if expected != set(weights):
        raise VerificationError(f"tensors lacking or left over: {sorted(expected ^ set(weights))}")

    def read(block: nn.Module, path: str) -> None:
        block.load_weights([(name, weights[f"{path}.{name}"]) for name in _names(block)])

    in_blocks = tuple(f"{path}." for path, _ in _blocks(model))
    others = [(name, weights[name]) for name in weights if not name.startswith(in_blocks)]
    model.load_weights(others, strict=False)
    return _logits(model, tokens, read)


def _logits(
    model: nn.Module, tokens: mx.array, read: Callable[[nn.Module, str], None]
) -> tuple[Logits, mx.Dtype]:
    if on_cpu():
        # Half precision products are slow on a CPU, and add their own rounding.
        model.set_dtype(mx.float32)
        use_blocked_products(model)
    for path, block in _blocks(model):
        block.__class__ = _used_once(type(block), path, read)
    return logits_of(model, tokens)


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every transformer block."""
    blocks = {id(block) for block in model.layers}
    return [(path, module) for path, module in model.named_modules() if id(module) in blocks]


def _names(module: nn.Module) -> set[str]:
    return set(cast(dict[str, mx.array], tree_flatten(module.parameters(), destination={})))


def _used_once(kind: type, path: str, read: Callable[[nn.Module, str], None]) -> type:
    """A block that reads its weights when it is called and forgets them afterwards.

    The models are read for a single forward; all of a large one would not fit beside the trained
    model it is compared with.
    """

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        read(self, path)
        output = kind.__call__(self, *arguments, **options)
        mx.eval(output)
        self.clear()
        mx.clear_cache()
        return output

    return type(kind.__name__, (kind,), {"__call__": call})
