"""DoRA on convolutions: a small network learns that the light has changed.

python -m benchmarks.vision [--steps 150] [--seeds 3]

A network that tells six shapes apart, bright on dark, is fine-tuned on the same shapes dark on
bright, with uneven light and more noise: all weights, LoRA and DoRA. The adapters are then merged,
and the merged network has to compute what the adapted one does.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import dora_mlx  # isort: skip  # noqa: F401  # loads OpenBLAS before MLX
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from dora_mlx.layers import DoRAConv2d, DoRALinear, LoRAConv2d, LoRALinear, hoisted_norms
from dora_mlx.layers.lora import LowRankLayer

SIDE = 16
RANK = 4
LAYERS = {
    "lora": {nn.Conv2d: LoRAConv2d, nn.Linear: LoRALinear},
    "dora": {nn.Conv2d: DoRAConv2d, nn.Linear: DoRALinear},
}
# Adam's step is of one size whatever is trained; full fine-tuning moves far more at once.
RATES = {"full": 1e-3, "lora": 5e-3, "dora": 5e-3}

Images = tuple[mx.array, mx.array]


class Network(nn.Module):
    """Three convolutions and a linear layer: ``[batch, 16, 16, 1] -> [batch, 6]`` logits."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.third = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, len(SHAPES))

    def __call__(self, x: mx.array) -> mx.array:
        """Logits of the shapes."""
        for layer in (self.first, self.second, self.third):
            x = nn.relu(layer(x))
        return self.head(x.mean(axis=(1, 2)))


# A shape is where a function of the place, in units of its size, is true.
SHAPES: list[Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]] = [
    lambda x, y: x**2 + y**2 < 1,
    lambda x, y: np.maximum(abs(x), abs(y)) < 0.9,
    lambda x, y: (abs(x) < 0.5 * (1 + y)) & (y < 1),
    lambda x, y: (np.minimum(abs(x), abs(y)) < 0.25) & (np.maximum(abs(x), abs(y)) < 1),
    lambda x, y: (x**2 + y**2 < 1) & (x**2 + y**2 > 0.4),
    lambda x, y: (abs(abs(x) - 0.6) < 0.25) & (abs(y) < 1),
]


def images(count: int, seed: int, shifted: bool) -> Images:
    """``count`` shapes at random places and sizes: ``[count, 16, 16, 1]`` and their classes."""
    random = np.random.default_rng([seed, shifted])
    classes = random.integers(len(SHAPES), size=count)
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    pictures = []
    for kind in classes:
        size = random.uniform(3.5, 5.5)
        centre = random.uniform(6, SIDE - 7, 2)
        shape = SHAPES[kind]((columns - centre[0]) / size, (rows - centre[1]) / size)
        picture = shape.astype(np.float64)
        if shifted:
            light = random.uniform(-1, 1, 2) @ np.stack([rows, columns]).reshape(2, -1) / SIDE
            picture = 1 - picture + 0.5 * light.reshape(SIDE, SIDE)
        pictures.append(picture + random.normal(0, 0.3 if shifted else 0.1, (SIDE, SIDE)))
    return mx.array(np.stack(pictures)[..., None], mx.float32), mx.array(classes)


def adapt(network: nn.Module, method: str, rank: int = RANK) -> None:
    """Make ``network`` trainable by ``method``, in place."""
    network.freeze()
    if method == "full":
        network.unfreeze()
        return
    layers = {
        name: LAYERS[method][type(layer)].from_base(layer, rank=rank, alpha=2.0 * rank)
        for name, layer in network.children().items()
    }
    network.update_modules(layers)


def merge(network: nn.Module) -> nn.Module:
    """The plain network that computes the same as an adapted one."""
    merged = copy.copy(network)
    for name, layer in network.children().items():
        merged[name] = layer.fuse() if isinstance(layer, LowRankLayer) else layer
    return merged


def train(network: nn.Module, data: Images, steps: int, rate: float, seed: int) -> None:
    """Adam on batches of 64."""
    optimizer = optim.Adam(rate)
    gradients_of = nn.value_and_grad(network, partial(_loss, network))
    random = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = mx.array(random.integers(len(data[1]), size=64))
        with hoisted_norms(network):
            _, gradients = gradients_of(data[0][chosen], data[1][chosen])
            mx.eval(gradients)
        optimizer.update(network, gradients)
        mx.eval(network.parameters(), optimizer.state)


def _loss(network: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(network(x), y, reduction="mean")


def accuracy(network: nn.Module, data: Images) -> float:
    """Share of the images whose shape is told right."""
    return (network(data[0]).argmax(axis=-1) == data[1]).mean().item()


@dataclass(frozen=True)
class Outcome:
    """Accuracies on new images, and the largest difference of a logit after merging."""

    trainable: int
    shifted_before: float
    shifted_after: float
    original_before: float
    original_after: float
    merge_difference: float


def fine_tune(base: nn.Module, method: str, steps: int, seed: int, examples: int = 500) -> Outcome:
    """Fine-tune a copy of ``base`` on ``examples`` shifted images."""
    network = copy.deepcopy(base)
    shifted, original = images(600, 10_000 + seed, True), images(600, 10_000 + seed, False)
    before = accuracy(network, shifted), accuracy(network, original)
    mx.random.seed(seed)
    adapt(network, method)
    trainable = sum(array.size for _, array in tree_flatten(network.trainable_parameters()))
    train(network, images(examples, seed, True), steps, RATES[method], seed)
    merged = merge(network)
    difference = mx.abs(merged(shifted[0]) - network(shifted[0])).max().item()
    return Outcome(
        trainable,
        before[0],
        accuracy(merged, shifted),
        before[1],
        accuracy(merged, original),
        difference,
    )


def pretrain(steps: int, seed: int = 0, width: int = 16) -> nn.Module:
    """A network that knows the shapes as they were."""
    mx.random.seed(seed)
    network = Network(width)
    train(network, images(3000, seed, False), steps, 3e-3, seed)
    return network


def main() -> None:
    """Print a table of all methods."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    arguments = parser.parse_args()
    base = pretrain(2 * arguments.steps)
    print("| method | trainable | shifted images | original images | merged against adapted |")
    print("|---|---|---|---|---|")
    for method in RATES:
        outcomes = [fine_tune(base, method, arguments.steps, s) for s in range(arguments.seeds)]
        after = [outcome.shifted_after for outcome in outcomes]
        spread = statistics.stdev(after) if len(after) > 1 else 0
        kept = statistics.fmean(outcome.original_after for outcome in outcomes)
        before = statistics.fmean(outcome.shifted_before for outcome in outcomes)
        known = statistics.fmean(outcome.original_before for outcome in outcomes)
        print(
            f"| {method} | {outcomes[0].trainable:,} "
            f"| {before:.1%} -> {statistics.fmean(after):.1%} ± {spread:.1%} "
            f"| {known:.1%} -> {kept:.1%} "
            f"| {max(outcome.merge_difference for outcome in outcomes):.1e} |"
        )


if __name__ == "__main__":
    main()
