"""How long it takes to put another adapter into a loaded model.

    python -m benchmarks.swapping [--swaps N]

The model has the 32 blocks and 224 linear layers of a 7B llama, 4-bit, at a width of 256: a swap
exchanges references to modules, so its time depends on how many there are and not on their size.
It is the processor's, which other programs disturb least.
"""

import argparse
import statistics
import time
from pathlib import Path

from benchmarks.measure import environment

import mlx.core as mx  # isort: skip  # after OpenBLAS
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from dora_mlx.adapters.attach import attach
from dora_mlx.adapters.stored import StoredAdapter
from dora_mlx.adapters.swapping import SwappableModel
from dora_mlx.kernels.blocked_layers import use_blocked_products
from dora_mlx.loading import LoadedModel

SHAPE = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 32,
    "intermediate_size": 896,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swaps", type=int, default=100, help="Swaps to time.")
    swaps = parser.parse_args().swaps
    adapters = loaded()
    print(environment())
    seconds = []
    for number in range(swaps):
        start = time.process_time()
        adapters.use(adapters.names[number % 2])
        seconds.append(time.process_time() - start)
    median = statistics.median(seconds)
    print(f"{swaps} swaps: median {median * 1e3:.1f} ms, slowest {max(seconds) * 1e3:.1f} ms")


def loaded() -> SwappableModel:
    """A base with two DoRA adapters of every linear layer."""
    stored = []
    for _ in range(2):
        model = base()
        spec = attach(model, "dora", rank=8)
        stored.append(StoredAdapter(spec, dict(tree_flatten(model.trainable_parameters()))))
    adapters = SwappableModel(LoadedModel(base(), None, SHAPE, Path()))
    for name, adapter in zip(("one", "two"), stored, strict=True):
        adapters.add(name, adapter)
    return adapters


def base() -> nn.Module:
    """The model, with the weights of its seed."""
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(SHAPE))
    nn.quantize(model, group_size=32, bits=4)
    use_blocked_products(model)
    mx.eval(model.parameters())
    return model


if __name__ == "__main__":
    main()
