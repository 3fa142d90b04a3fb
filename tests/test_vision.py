"""The example of DoRA on convolutions: it learns, and its merged network is the adapted one."""

import copy

import mlx.core as mx
import pytest

from benchmarks.vision import adapt, fine_tune, images, merge, pretrain
from dora_mlx.layers import DoRAConv2d, LoRAConv2d


@pytest.fixture(scope="module")
def base():
    return pretrain(60, width=8)


@pytest.mark.parametrize(("method", "kind"), [("dora", DoRAConv2d), ("lora", LoRAConv2d)])
def test_adapted_convolutions_start_at_the_base_and_merge(base, method, kind):
    x, _ = images(20, 1, True)
    network = copy.deepcopy(base)
    adapt(network, method)
    assert isinstance(network.second, kind)
    assert mx.array_equal(network(x), base(x))
    mx.random.seed(1)
    for layer in network.children().values():
        layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
        if method == "dora":
            layer.magnitude = 1.2 * layer.magnitude
    assert mx.abs(network(x) - base(x)).max() > 0.1
    merged = merge(network)
    assert type(merged.second) is type(base.second)
    assert mx.allclose(merged(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "lora", "full"])
def test_fine_tuning_learns_the_shifted_images(base, method):
    outcome = fine_tune(base, method, steps=80, seed=1, examples=400)
    assert outcome.shifted_after > outcome.shifted_before + 0.05
    assert outcome.merge_difference < 1e-4
