"""What a run did to the weights, against the definitions in the paper, in float64 and naively."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

import dora_mlx
from dora_mlx import inspect as inspect_verb
from dora_mlx.adapters.attach import adaptable_layers
from dora_mlx.analysis.decomposition import (
    dense_change,
    effective_rank,
    low_rank_change,
    vector_changes,
)
from dora_mlx.analysis.inspection import inspect_run
from dora_mlx.config import TrainConfig
from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_weight import weight_rows
from dora_mlx.layers import DoRAEmbedding, DoRALinear, DoRASwitchLinear, LoRALinear
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.finetune import finetune

QUICK = {"num_layers": 2, "steps": 6, "steps_per_eval": 3, "steps_per_save": 2}
QUICK |= {"batch_size": 2, "valid_fraction": 0.02}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of every method on the quantized starter."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("dora", "lora", "full"):
        config = TrainConfig(method=method, keep_checkpoints=3, **QUICK)
        finetune(config, RunFolder(folder / method))
    return folder


def paper(before, after, axis=1):
    """Equations 3 and 4 of arXiv 2402.09353 as they stand, in extended precision."""
    before, after = before.astype(np.longdouble), after.astype(np.longdouble)
    m_0, m_t = (np.sqrt((w * w).sum(axis)) for w in (before, after))
    cosine = (before * after).sum(axis) / (m_0 * m_t)
    return float(np.abs(m_t - m_0).mean()), float((1 - cosine).mean())


def rank_by_entropy(difference):
    shares = np.linalg.svd(difference, compute_uv=False)
    shares = shares[shares > 1e-9 * shares[0]] / shares.sum()
    return np.exp(-(shares * np.log(shares)).sum())


def float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("method", ["dora", "lora", "full"])
def test_a_run_agrees_with_an_independent_float64_computation(runs, starter, method):
    inspection = inspect_run(RunFolder(runs / method))
    saved = mx.load(str(runs / method / "adapters.safetensors"))
    layers = dict(adaptable_layers(starter.model))
    scale = TrainConfig().alpha / TrainConfig().rank
    assert len(inspection.weights) == (43 if method == "full" else 14)
    for weight in inspection.weights:
        before = float64(weight_rows(layers[weight.name], 0, 1 << 20, mx.float32))
        if method == "full":
            after = float64(saved[f"{weight.name}.weight"])
            added = after - before
        else:
            a, b = (float64(saved[f"{weight.name}.lora_{x}"]) for x in "ab")
            added = scale * (a @ b).T
            after = before + added
        if method == "dora":
            m = float64(saved[f"{weight.name}.m"])[:, None]
            after = m * after / np.linalg.norm(after, axis=1, keepdims=True)
        axis = 0 if weight.name.endswith("embed_tokens") else 1
        magnitude, direction = paper(before, after, axis)
        np.testing.assert_allclose(weight.magnitude_change, magnitude, rtol=1e-6)
        np.testing.assert_allclose(weight.direction_change, direction, rtol=1e-6)
        np.testing.assert_allclose(weight.effective_rank, rank_by_entropy(added), rtol=1e-4)
        moved = np.linalg.norm(after - before, axis=axis) / np.linalg.norm(before, axis=axis)
        top = weight.largest_rows[0]
        assert top.row == moved.argmax()
        np.testing.assert_allclose(top.change, moved.max(), rtol=1e-6)


def test_checkpoints_are_states_and_the_best_counts_once(runs):
    folder = RunFolder(runs / "dora")
    inspection = inspect_run(folder)
    best = next(state for state in inspection.states if state.best)
    assert [state.step for state in inspection.states] == sorted({2, 4, 6} | {best.step})
    # The state of a checkpoint and the adapter saved at the same step are the same weights.
    (alone,) = inspect_run(folder, checkpoint=6).states
    if best.step == 6:
        assert alone.weights == best.weights
    # Weights move away from the base as training goes on.
    moved = [np.mean([w.direction_change for w in state.weights]) for state in inspection.states]
    assert moved == sorted(moved)
    points = [
        (w.magnitude_change, w.direction_change) for s in inspection.states for w in s.weights
    ]
    expected = np.corrcoef(np.array(points).T)[0, 1]
    np.testing.assert_allclose(inspection.correlation, expected, rtol=1e-9)
    assert [(w.block, w.module) for w in inspection.weights[:2]] == [
        (4, "self_attn.q_proj"),
        (4, "self_attn.k_proj"),
    ]
    assert json.loads(json.dumps(inspection.to_dict()))["states"][0]["weights"]


def layer_with_update(kind, base, size, magnitude=None):
    mx.random.seed(2)
    layer = kind.from_base(base, rank=3)
    layer.lora_b = size * mx.random.normal(layer.lora_b.shape)
    if magnitude is not None:
        layer.magnitude = magnitude(layer.magnitude)
    return layer


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_small_angles_do_not_cancel(size):
    # 1 - cos of the last one is about 1e-13, which a float32 cosine gives as 0 or 6e-8.
    base = nn.Linear(96, 64, bias=False)
    layer = layer_with_update(LoRALinear, base, size)
    change = vector_changes(low_rank_change(layer))
    before = float64(base.weight)
    added = layer.scale * (float64(layer.lora_a) @ float64(layer.lora_b)).T
    magnitude, direction = paper(before, before + added)
    np.testing.assert_allclose(np.abs(change.after - change.before).mean(), magnitude, rtol=2e-6)
    np.testing.assert_allclose(change.direction.mean(), direction, rtol=2e-6)


def test_rows_without_a_direction_and_rows_turned_over():
    base = nn.Linear(4, 5, bias=False)
    rows = [[3.0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]]
    base.weight = mx.array(rows)
    after = mx.array([[3.0, 4, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [-4, 0, 0, 0]])
    change = vector_changes(dense_change(base, after))
    np.testing.assert_allclose(change.direction, [0, 0, 1, 1, 2])
    np.testing.assert_allclose(change.after - change.before, [0, 0, 1, -1, 2])
    np.testing.assert_allclose(change.relative, [0, 0, 0, 1, 3])
    flipped = layer_with_update(DoRALinear, nn.Linear(8, 3), 0.0, magnitude=lambda m: -m)
    np.testing.assert_allclose(vector_changes(low_rank_change(flipped)).direction, 2)


def test_embeddings_turn_by_column_and_experts_by_row():
    def bigger(m):
        return 1.5 * m

    table = layer_with_update(DoRAEmbedding, nn.Embedding(40, 8), 0.1, bigger)
    experts = layer_with_update(DoRASwitchLinear, SwitchLinear(6, 5, 4, bias=False), 0.1, bigger)
    for layer, axis in ((table, 0), (experts, 1)):
        before, after = float64(layer.base.weight), float64(layer.merged_weight())
        width = before.shape[-1]
        magnitude, direction = paper(before.reshape(-1, width), after.reshape(-1, width), axis)
        change = vector_changes(low_rank_change(layer))
        np.testing.assert_allclose(
            np.abs(change.after - change.before).mean(), magnitude, rtol=1e-5
        )
        np.testing.assert_allclose(change.direction.mean(), direction, rtol=1e-5)
    ranks = [
        rank_by_entropy(float64(layer) @ float64(b))
        for layer, b in zip(experts.lora_b, experts.lora_a, strict=True)
    ]
    np.testing.assert_allclose(effective_rank(low_rank_change(experts)), np.mean(ranks), rtol=1e-5)


def test_effective_rank_counts_equal_singular_values():
    base = nn.Linear(16, 16, bias=False)
    added = np.zeros((16, 16), np.float32)
    added[range(5), range(5)] = 0.25
    changed = dense_change(base, base.weight + mx.array(added))
    np.testing.assert_allclose(effective_rank(changed), 5, rtol=1e-4)
    assert effective_rank(dense_change(base, base.weight)) == 0
    assert effective_rank(low_rank_change(LoRALinear.from_base(base))) == 0


def test_a_layer_is_measured_in_blocks():
    base = nn.QuantizedLinear(4096, 8192, bias=False, group_size=64, bits=4)
    layer = layer_with_update(DoRALinear, base, 0.01)
    weight = low_rank_change(layer)
    mx.eval(layer.parameters())
    dense_bytes = 4 * 4096 * 8192
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    vector_changes(weight)
    effective_rank(weight)
    _, host_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert mx.get_peak_memory() - before < dense_bytes / 4
    assert host_peak < dense_bytes / 4


@pytest.mark.parametrize("method", ["dora", "full"])
def test_command_writes_table_pictures_and_json(runs, capsys, method):
    assert inspect_verb.main(["--run", method, "--runs-dir", str(runs)]) == 0
    output = capsys.readouterr().out
    assert "self_attn.q_proj" in output
    assert "Correlation of dM and dD" in output
    folder = runs / method / "inspection"
    for name in ("heat_map.png", "scatter.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    saved = json.loads((folder / "inspection.json").read_text())
    assert saved == json.loads(json.dumps(inspect_run(RunFolder(runs / method)).to_dict()))


def test_without_matplotlib_there_is_one_sentence_and_all_else(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--run", "lora", "--runs-dir", str(runs), "--output", str(tmp_path / "out")]
    assert inspect_verb.main(flags) == 0
    streams = capsys.readouterr()
    assert streams.err.count("\n") == 1
    assert "dora-mlx[plots]" in streams.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["inspection.json"]


def test_what_cannot_be_inspected_is_said(runs, tmp_path, capsys):
    flags = ["--run", "dora", "--runs-dir", str(runs), "--checkpoint", "3"]
    assert inspect_verb.main(flags) == 2
    assert "keeps no checkpoint of step 3; it keeps 2, 4, 6" in capsys.readouterr().err
    assert inspect_verb.main(["--run", "nothing", "--runs-dir", str(runs)]) == 2
    assert "There is no run 'nothing'" in capsys.readouterr().err
    damaged = runs / "lora" / "checkpoints" / "step_00000004" / "adapters.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    with pytest.raises(UserError, match="is damaged"):
        inspect_run(RunFolder(runs / "lora"))
    damaged.write_bytes(content)


def test_the_name_does_not_hide_the_standard_library():
    # dataclasses and most of Python import inspect, and this folder has a file of that name.
    package = Path(dora_mlx.__file__).parent
    for code in ("import inspect; inspect.signature(print)", "import dataclasses, asyncio"):
        subprocess.run([sys.executable, "-c", code], cwd=package, check=True)
    command = [sys.executable, "-m", "dora_mlx.inspect", "--help"]
    result = subprocess.run(command, cwd=package, check=True, capture_output=True, text=True)
    assert "usage: python -m dora_mlx.inspect" in result.stdout
