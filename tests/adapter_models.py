"""Tiny base models on disk, and adapters on them that were moved away from their start."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from exporting_models import make_base, some_tokens
from mlx.utils import tree_flatten
from mlx_lm.utils import save_model

from dora_mlx.adapters.attach import adapted_layers, attach
from dora_mlx.layers import hoisted_norms
from dora_mlx.loading import LoadedModel, load_base


def write_base(folder: Path, bits: int | None = None, **options) -> Path:
    """A folder with a tiny llama that mlx-lm loads, and Transformers too where it is dense."""
    model = make_base(folder, **options)
    if bits is not None:
        import mlx.nn as nn

        nn.quantize(model, group_size=32, bits=bits)
        config = json.loads((folder / "config.json").read_text())
        config["quantization"] = {"group_size": 32, "bits": bits}
        (folder / "config.json").write_text(json.dumps(config))
    save_model(folder, model, donate_model=False)
    return folder


def write_dequantized(base: LoadedModel, folder: Path) -> Path:
    """The base model in float32, in a folder for Transformers."""
    from dora_mlx.adapters.attach import dense_twins

    dense = load_base(base.path)
    dense.model.update_modules(unflattened(dense_twins(dense.model)))
    folder.mkdir()
    config = {k: v for k, v in base.config.items() if not k.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(config))
    save_model(folder, dense.model, donate_model=False)
    return folder


def unflattened(modules):
    from mlx.utils import tree_unflatten

    return tree_unflatten(list(modules.items()))


def attach_moved(model, *args, seed=1, **options):
    """Attach an adapter and move every array of it; returns the spec."""
    mx.random.seed(seed)
    spec = attach(model, *args, **options)
    move(model)
    return spec


def move(model):
    for _, layer in adapted_layers(model):
        layer.lora_b = 0.2 * mx.random.normal(layer.lora_b.shape)
        if "magnitude" in layer:
            m = layer.magnitude
            layer.magnitude = m * (1 + 0.3 * mx.random.normal(m.shape))
    mx.eval(model.parameters())
    model.eval()


def logits(model, tokens=None):
    """``[B, L, vocab]`` float32 of a few random tokens."""
    tokens = some_tokens(2, 24) if tokens is None else tokens
    with hoisted_norms(model):
        return np.array(model(tokens).astype(mx.float32))


def difference(one, other):
    """Largest difference of logits, relative to the largest logit."""
    return np.abs(one - other).max() / np.abs(one).max()


def arrays_of(model):
    return dict(tree_flatten(model.trainable_parameters()))
