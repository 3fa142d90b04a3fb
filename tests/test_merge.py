"""Adapters combined by their exact changes of the weights, and exported."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapter_models import attach_moved, difference, logits, write_base
from mlx_lm.utils import load_model

from dora_mlx import merge
from dora_mlx.adapters.adapter_folder import save_adapter
from dora_mlx.adapters.attach import attach
from dora_mlx.adapters.swapping import SwappableModel
from dora_mlx.exporting.combine import CombinedLayer, Recipe, _ties, nth_largest, put_combined
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.layers import DoRALinear
from dora_mlx.loading import load_base

KINDS = {
    "one": {"method": "dora", "target_modules": ("q_proj", "down_proj", "embed_tokens")},
    "two": {"method": "lora", "target_modules": ("q_proj", "up_proj"), "rank": 3},
    "three": {"method": "dora", "target_modules": ("q_proj",), "num_layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    base = write_base(folder / "base", bits=4)
    for seed, (name, options) in enumerate(KINDS.items()):
        model = load_base(base).model
        spec = attach_moved(model, seed=seed, **options)
        (folder / name).mkdir()
        save_adapter(folder / name, model, spec)
    return folder


def merged(folder, names, recipe):
    adapters = SwappableModel.load(str(folder / "base"))
    for name in names:
        adapters.add(name, adapters.read(folder / name))
    put_combined(adapters.model, [adapters.layers(name) for name in names], recipe)
    return adapters.model


def weights_of(folder, name=None):
    adapters = SwappableModel.load(str(folder / "base"))
    if name is not None:
        adapters.add(name, adapters.read(folder / name))
        adapters.use(name)
    return {name: np.array(array) for name, array in MergedWeights(adapters.model).items()}


def test_linear_adds_the_exact_changes(folder):
    base, one, two = (weights_of(folder, name) for name in (None, "one", "two"))
    model = merged(folder, ["one", "two"], Recipe("linear", (0.5, -0.25)))
    own = MergedWeights(model)
    assert set(own) == set(base)
    for name, weight in base.items():
        expected = weight + 0.5 * (one[name] - weight) - 0.25 * (two[name] - weight)
        assert np.abs(np.array(own[name]) - expected).max() < 1e-6, name


def test_one_adapter_with_weight_one_is_that_adapter(folder):
    adapters = SwappableModel.load(str(folder / "base"))
    adapters.add("one", adapters.read(folder / "one"))
    adapters.use("one")
    for recipe in (Recipe("linear", (1.0,)), Recipe("ties", (1.0,), density=1.0)):
        combined = merged(folder, ["one"], recipe)
        assert difference(logits(adapters.model), logits(combined)) < 1e-5


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_ties_is_that_of_peft(folder, density):
    utilities = pytest.importorskip("peft.utils.merge_utils", reason="needs the extra `parity`")
    torch = pytest.importorskip("torch")
    names, coefficients = ["one", "two", "three"], (1.3, 1.3, 1.3)
    base = weights_of(folder)
    alone = {name: weights_of(folder, name) for name in names}
    own = MergedWeights(merged(folder, names, Recipe("ties", coefficients, density)))
    # All three change this layer, two of them its neighbour of the first block.
    for layer in ("model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"):
        name = f"{layer}.weight"
        changes = {n: alone[n][name] - base[name] for n in names}
        pairs = [(changes[n], c) for n, c in zip(names, coefficients, strict=True)]
        pairs = [(torch.from_numpy(change), c) for change, c in pairs if change.any()]
        assert len(pairs) == (3 if "layers.1" in layer else 2)
        tensors, numbers = [t for t, _ in pairs], torch.tensor([c for _, c in pairs])
        expected = utilities.ties(tensors, numbers, density).numpy()
        found = np.array(own[name]) - base[name]
        # Rounding may decide about a change at the very threshold.
        different = np.abs(found - expected) > 1e-5
        assert different.mean() < 1e-3
        assert 0.05 < (found != 0).mean() < 1


def test_threshold_is_that_of_sorting_whatever_the_numbers():
    generator = np.random.default_rng(0)
    values = generator.normal(size=5000).astype(np.float32)
    # Ties across blocks, zeros, and numbers that differ in the lower half of their bits only.
    values[::3] = np.float32(1) + generator.integers(0, 50, 1667) * np.float32(2**-23)
    values[1::7] = 0
    values[2::50] *= -1
    blocks = [mx.array(part.reshape(-1, 5)) for part in np.split(values, 10)]
    largest = np.sort(np.abs(values))[::-1]
    for nth in (1, 2, 500, 1700, 2500, 4999, 5000):
        assert nth_largest(lambda: iter(blocks), nth) == largest[nth - 1]


def extra_memory(rows):
    """Bytes that combining two adapters on a layer of so many rows takes above their own."""
    base = nn.Linear(1024, rows, bias=False)
    mx.random.seed(0)
    adapters = [DoRALinear.from_base(base, rank=4) for _ in range(2)]
    for adapter in adapters:
        adapter.lora_b = mx.random.normal(adapter.lora_b.shape)
        mx.eval(adapter.parameters())
    layer = CombinedLayer(base, [(one, 1.0) for one in adapters], Recipe("ties", (1.0, 1.0)))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in layer.merged_blocks():
        pass
    return mx.get_peak_memory() - before


def test_memory_of_ties_does_not_grow_with_the_weight():
    # Of four blocks and of twelve.
    assert extra_memory(12288) < 1.05 * extra_memory(4096)


def test_the_side_with_more_weight_wins():
    changes = [mx.array([[3.0, 1.0, -2.0, 0.1]]), mx.array([[-2.0, 4.0, -4.0, 0.2]])]
    combine = _ties([mx.array(0.5), mx.array(0.5)])
    assert combine(changes, [1.0, 1.0]).tolist() == [[3.0, 2.5, -3.0, 0.0]]
    # Weighted before the vote: two times 3 against eight times 2.
    assert combine(changes, [2.0, 8.0]).tolist() == [[-16.0, 17.0, -18.0, 0.0]]


def run(folder, *words):
    adapters = [str(folder / name) for name in ("one", "two")]
    output = ["--output", str(folder / "out")]
    flags = ["--model", str(folder / "base"), "--format", "safetensors", *output, *words]
    return merge.main(["--adapter", *adapters, *flags])


def test_command_writes_a_model_that_is_checked(folder, capsys):
    assert run(folder, "--weights", "1", "0.5", "--overwrite") == 0
    assert "Read back by" in capsys.readouterr().out
    written, _ = load_model(folder / "out")
    written.set_dtype(mx.float32)
    expected = merged(folder, ["one", "two"], Recipe("linear", (1.0, 0.5)))
    assert difference(logits(expected), logits(written)) < 0.05
    report = next(Path(folder / "out").glob("*report*.json"))
    assert json.loads(report.read_text())["run"] == "one+two"


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--weights", "1", "--density", "2"], ["1 numbers for 2 adapters", "--density"]),
        (["--weights", "inf", "1"], ["--weights have to be finite"]),
        (["--run", "none"], ["There is no run 'none'"]),
        (["--quant", "q9"], ["--quant q9"]),
        (["--format", "peft"], ["merged already"]),
    ],
)
def test_bad_flags_are_one_message(folder, tmp_path, capsys, words, messages):
    assert run(folder, *words, "--output", str(tmp_path / "new")) == 2
    errors = capsys.readouterr().err
    assert all(message in errors for message in messages)
    assert not (tmp_path / "new").exists()


def test_an_adapter_named_twice_is_refused(folder, capsys):
    twice = [str(folder / "one"), str(folder / "two" / ".." / "one")]
    flags = ["--model", str(folder / "base"), "--format", "safetensors"]
    assert merge.main(["--adapter", *twice, *flags]) == 2
    assert "one is named twice" in capsys.readouterr().err


def test_every_adapter_that_does_not_fit_is_listed(folder, tmp_path, capsys):
    other = write_base(tmp_path / "other", hidden_size=32)
    for name in ("wrong", "worse"):
        model = load_base(other).model
        spec = attach_moved(model, "lora", target_modules=("v_proj",))
        (tmp_path / name).mkdir()
        save_adapter(tmp_path / name, model, spec)
    model = load_base(folder / "base").model
    (tmp_path / "full").mkdir()
    save_adapter(tmp_path / "full", model, attach(model, "full"))
    flags = ["--model", str(folder / "base"), "--format", "safetensors"]
    wrong = [str(tmp_path / "wrong"), str(folder / "one"), str(tmp_path / "worse")]
    assert merge.main(["--adapter", *wrong, *flags]) == 2
    errors = capsys.readouterr().err
    assert errors.count("does not fit the model") == 2
    output = ["--output", str(tmp_path / "new")]
    assert merge.main(["--adapter", str(tmp_path / "full"), *flags, *output]) == 2
    assert "trained all weights" in capsys.readouterr().err
