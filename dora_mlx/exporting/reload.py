"""Run what was exported in mlx-lm."""

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes, load_model

from dora_mlx.exporting.logits import Logits, VerificationError, logits_of
from dora_mlx.kernels.frozen_product import on_cpu, use_blocked_products
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
    return _logits(model, tokens)


def logits_of_weights(
    base: LoadedModel, weights: Iterable[tuple[str, mx.array]], tokens: mx.array
) -> tuple[Logits, mx.Dtype]:
    """Logits of a dense model with the architecture of ``base`` and other weights."""
    config = {k: v for k, v in base.config.items() if not k.startswith("quantization")}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.load_weights(list(weights), strict=True)
    return _logits(model, tokens)


def _logits(model: nn.Module, tokens: mx.array) -> tuple[Logits, mx.Dtype]:
    if on_cpu():
        # Half precision products are slow on a CPU, and add their own rounding.
        model.set_dtype(mx.float32)
        use_blocked_products(model)
    return logits_of(model, tokens)
