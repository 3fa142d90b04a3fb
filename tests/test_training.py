"""Loss, steps, checkpoints and resume, on the starter model and short data."""

import itertools
import json
import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from training_runs import StopAfter, final_arrays, losses, quick, same_arrays

import dora_mlx.training.loop as loop
from dora_mlx.adapters.adapter_folder import trainable_arrays
from dora_mlx.adapters.attach import adapters_disabled, attach
from dora_mlx.adapters.trained import load_run
from dora_mlx.config import TrainConfig
from dora_mlx.data.batches import Batch
from dora_mlx.errors import UserError
from dora_mlx.layers import hoisted_norms
from dora_mlx.loading import load_base
from dora_mlx.registry import models_dir
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.events import read_events
from dora_mlx.training.finetune import finetune
from dora_mlx.training.loss import plain_loss_sum
from dora_mlx.training.optimizer import GroupedOptimizer
from dora_mlx.training.recomputed_blocks import recomputed_blocks
from dora_mlx.training.schedule import learning_rate_at


class UniformModel(nn.Module):
    """Logits that do not depend on the input: every loss is log(vocabulary)."""

    def __call__(self, tokens):
        return mx.zeros((*tokens.shape, 11))


def test_loss_counts_trained_tokens_only():
    tokens, weights = np.zeros((2, 5), np.int32), np.zeros((2, 5), np.float32)
    weights[0, 1:3] = 1
    total = plain_loss_sum(UniformModel(), Batch(tokens, tokens, weights))
    assert total.item() == pytest.approx(2 * math.log(11), rel=1e-6)


def test_run_leaves_a_complete_folder(chat_file, run):
    assert finetune(quick(chat_file), run) == "completed"
    events = read_events(run.path)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert events[-1]["reason"] == "completed"
    assert kinds.count("step") == 4
    assert [e["step"] for e in events if e["event"] == "validation"] == [0, 2, 4]
    step = next(event for event in events if event["event"] == "step")
    assert step.keys() >= {
        "time", "step", "loss", "learning_rate", "tokens", "tokens_per_second",
        "peak_memory_bytes", "grad_norm",
    }  # fmt: skip
    config = run.read_config()
    assert TrainConfig.from_dict(config["options"]).learning_rate == 1e-3
    assert config["versions"].keys() >= {"mlx", "mlx-lm", "dora-mlx"}
    # A bounded number of checkpoints is kept.
    assert sorted(p.name for p in run.checkpoints_dir.iterdir()) == [
        "step_00000003",
        "step_00000004",
    ]


@pytest.mark.parametrize("method", ["dora", "lora", "full"])
def test_training_lowers_the_loss_and_the_adapter_comes_back(chat_file, run, method):
    rate = 1e-4 if method == "full" else 3e-3
    config = quick(
        chat_file, method=method, steps=12, learning_rate=rate, num_layers=None, steps_per_eval=12
    )
    finetune(config, run)
    validation = [e["loss"] for e in read_events(run.path) if e["event"] == "validation"]
    assert validation[-1] < 0.8 * validation[0]
    trained = load_run(run)
    checkpoint = final_arrays(run)
    for name, array in trainable_arrays(trained.base.model).items():
        assert mx.array_equal(array, checkpoint[name]), name


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_model_equals_its_base_before_the_first_step(starter, method):
    tokens = mx.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
    base = starter.model(tokens)
    attach(starter.model, method)
    starter.model.eval()
    assert mx.array_equal(starter.model(tokens), base)
    for layer in starter.model.layers:
        layer.mlp.up_proj.lora_b = layer.mlp.up_proj.lora_b + 0.1
    assert not mx.allclose(starter.model(tokens), base, atol=1e-2)
    with adapters_disabled(starter.model):
        assert mx.array_equal(starter.model(tokens), base)
    assert not mx.allclose(starter.model(tokens), base, atol=1e-2)


def test_accumulation_does_not_change_loss_or_update(chat_file, tmp_path):
    # Micro-batches have different numbers of trained tokens; a mean of means would differ.
    runs = {}
    for batch_size, count in ((8, 1), (2, 4)):
        run = RunFolder(tmp_path / f"runs/{batch_size}")
        config = quick(
            chat_file, batch_size=batch_size, grad_accumulation_steps=count, valid_fraction=0
        )
        with pytest.MonkeyPatch.context() as patch:
            # The same examples in the same order, whatever the batch size.
            patch.setattr(
                "dora_mlx.data.batches.BatchStream._epoch_order",
                lambda self, epoch: [
                    list(range(start, start + self._batch_size))
                    for start in range(0, 40, self._batch_size)
                ],
            )
            finetune(config, run)
        runs[batch_size] = run
    assert losses(runs[8]) == pytest.approx(losses(runs[2]), rel=2e-5)
    one, other = final_arrays(runs[8]), final_arrays(runs[2])
    for name, array in one.items():
        if not name.startswith("optimizer."):
            # Adam's steps are of 1e-3 whatever the gradient's size, so rounding turns a few of
            # those with a gradient near zero around; a wrong weighting would turn most.
            assert mx.abs(array - other[name]).mean().item() < 2e-5, name


def test_failure_in_preparation_leaves_nothing_or_the_old_run(chat_file, run, tmp_path):
    bad = quick(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="no data"):
        finetune(bad, run)
    assert not run.path.exists()
    finetune(quick(chat_file, steps=1), run)
    with pytest.raises(UserError, match="exists already"):
        finetune(quick(chat_file), run)
    before = run.config_file.read_bytes()
    with pytest.raises(UserError, match="no data"):
        finetune(bad, run, overwrite=True)
    assert run.config_file.read_bytes() == before
    finetune(quick(chat_file, steps=2), run, overwrite=True)
    assert len(losses(run)) == 2
    assert [p.name for p in run.path.parent.iterdir()] == ["a"]


def test_non_finite_steps_are_skipped_and_then_end_the_run(chat_file, run, monkeypatch):
    calls = []

    def poisoned(model, batch):
        calls.append(1)
        # Two of the calls compare gradients before the first step.
        poison = mx.nan if model.training and len(calls) > 5 else 1.0
        return plain_loss_sum(model, batch) * poison

    monkeypatch.setattr(loop, "best_loss", lambda *_: (poisoned, None))
    config = replace(quick(chat_file), steps=20, steps_per_eval=20, valid_fraction=0)
    with pytest.raises(UserError, match="steps in a row without a finite loss"):
        finetune(config, run)
    events = read_events(run.path)
    assert events[-1]["reason"] == "failed"
    recorded = losses(run)
    assert all(math.isfinite(loss) for loss in recorded[:3])
    assert recorded[3] is None
    # The update was skipped: the last checkpoint holds finite numbers.
    assert all(mx.all(mx.isfinite(a)).item() for a in final_arrays(run).values())


def test_half_written_event_is_skipped(run):
    run.path.mkdir(parents=True)
    lines = [{"event": "start", "step": 0}, {"event": "step", "step": 1}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"event": "step", "st'
    (run.path / "events.jsonl").write_text(text)
    assert [event["event"] for event in read_events(run.path)] == ["start", "step"]


def test_schedule_warms_up_and_falls_to_a_tenth():
    def rates(schedule):
        return [learning_rate_at(s, 100, 1.0, 10, schedule) for s in range(1, 101)]

    for schedule in ("cosine", "linear"):
        curve = rates(schedule)
        assert curve[:10] == pytest.approx([n / 10 for n in range(1, 11)])
        assert curve[-1] == pytest.approx(0.1)
        assert all(a >= b for a, b in itertools.pairwise(curve[9:]))
    assert rates("constant")[10:] == [1.0] * 90
    # A run shorter than its warm-up still reaches the peak.
    assert max(learning_rate_at(s, 4, 1.0, 10, "linear") for s in range(1, 5)) == 1.0


def test_adapter_folder_loads_in_mlx_lm_with_the_same_logits(chat_file, run, starter_path):
    from mlx_lm import load

    for method in ("dora", "lora"):
        folder = RunFolder(run.path.parent / method)
        finetune(quick(chat_file, method=method, learning_rate=5e-3), folder)
        model, _ = load(str(starter_path), adapter_path=str(folder.path))
        model.set_dtype(mx.float32)
        tokens = mx.array([list(range(5, 45))])
        ours = load_run(folder).base.model(tokens)
        assert mx.allclose(model(tokens), ours, atol=2e-4 * mx.abs(ours).max().item())


def test_magnitudes_and_b_have_rates_of_their_own(chat_file, tmp_path):
    def moved(**ratios):
        run = RunFolder(tmp_path / "runs" / "-".join(["r", *ratios]))
        finetune(quick(chat_file, steps=1, **ratios), run)
        arrays = final_arrays(run)
        attach(fresh := load_base_again(), num_layers=2)
        name = "layers.5.mlp.up_proj"
        start = fresh.layers[5].mlp.up_proj
        return (
            mx.abs(arrays[f"model.{name}.m"] - start.magnitude).max().item(),
            mx.abs(arrays[f"model.{name}.lora_b"]).max().item(),
        )

    # The first step of Adam moves every parameter by its learning rate.
    assert moved() == pytest.approx((1e-3, 1e-3), rel=0.02)
    assert moved(magnitude_lr_ratio=5.0) == pytest.approx((5e-3, 1e-3), rel=0.02)
    assert moved(lora_b_lr_ratio=16.0) == pytest.approx((1e-3, 16e-3), rel=0.02)


def load_base_again():
    return load_base(models_dir() / "starter").model


def test_a_run_holds_its_trained_weights_once(tmp_path, chat_file):
    held, before = [], mx.get_active_memory()

    def listen(event):
        if event["event"] == "step":
            held.append(mx.get_active_memory() - before)

    config = quick(chat_file, method="full", num_layers=None, steps=3, steps_per_eval=9)
    finetune(config, RunFolder(tmp_path / "r"), listener=listen)
    weights = 4 * 4_066_560
    # The weights, two moments of each, and at the time of the event the gradients.
    assert held[-1] < 4.3 * weights


def test_a_model_that_the_lean_backward_does_not_serve_trains_the_plain_way(
    tmp_path, chat_file, monkeypatch
):
    config = quick(chat_file, steps=2)
    runs = {}
    for name, reason in (("lean", None), ("plain", "that of q would be another by 90%")):
        monkeypatch.setattr(loop, "why_not_lean", lambda *_, reason=reason: reason)
        if reason is not None:
            monkeypatch.setattr(loop, "lean_backward", None)
        finetune(config, RunFolder(tmp_path / name))
        runs[name] = read_events(tmp_path / name)
    said = [e["message"] for e in runs["plain"] if e["event"] == "warning"]
    assert any("the plain way" in message and "90%" in message for message in said)
    plain, lean = (
        [e["loss"] for e in runs[name] if e["event"] == "step"] for name in ("plain", "lean")
    )
    assert plain == pytest.approx(lean, rel=1e-5)


def test_checkpointed_blocks_give_the_same_gradients_in_less_memory(starter):
    attach(starter.model, "dora")
    tokens = np.random.default_rng(0).integers(3, 2000, (4, 128)).astype(np.int32)
    batch = Batch(tokens, tokens, np.ones(tokens.shape, np.float32))
    classes = [type(layer) for layer in starter.model.layers]

    def gradients():
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        function = nn.value_and_grad(starter.model, plain_loss_sum)
        loss, grads = function(starter.model, batch)
        mx.eval(loss, grads)
        return loss.item(), dict(tree_flatten(grads)), mx.get_peak_memory() - before

    with hoisted_norms(starter.model):
        loss, plain, plain_peak = gradients()
        with recomputed_blocks(starter.model, keep=False):
            checkpointed_loss, checkpointed, peak = gradients()
    assert checkpointed_loss == loss
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert mx.allclose(gradient, checkpointed[name], rtol=1e-4, atol=1e-6), name
    assert peak < 0.7 * plain_peak
    assert [type(layer) for layer in starter.model.layers] == classes


def test_rslora_and_rank_overrides_survive_the_run_folder(chat_file, run):
    config = quick(chat_file, rank=4, rslora=True, rank_overrides=("v_proj=2", "mlp.*=6"))
    finetune(config, run)
    block = load_run(run).base.model.layers[-1]
    shapes = {
        "self_attn.q_proj": (4, block.self_attn.q_proj),
        "self_attn.v_proj": (2, block.self_attn.v_proj),
        "mlp.up_proj": (6, block.mlp.up_proj),
    }
    for name, (rank, layer) in shapes.items():
        assert layer.lora_a.shape[1] == rank, name
        assert layer.scale == pytest.approx(16 / math.sqrt(rank)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("q_proj", "nothing")}, "matches nothing. There are mlp.down_proj"),
        ({"rank_overrides": ("o_proj",)}, "takes NAME=RANK"),
        ({"rank_overrides": ("o_proj=0",)}, "at least 1"),
        ({"rank_overrides": ("wo=4",)}, "matches wo"),
        ({"num_layers": 7}, "has only 6 blocks"),
    ],
)
def test_wrong_targets_are_explained_with_what_there_is(starter, options, message):
    with pytest.raises(UserError, match=message):
        attach(starter.model, "dora", **options)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "adafactor", "lion", "muon", "sgd"])
def test_every_optimizer_learns_and_resumes_bit_for_bit(chat_file, tmp_path, optimizer):
    rate = {"lion": 5e-4, "sgd": 0.1, "muon": 2e-3}.get(optimizer, 2e-3)
    config = quick(chat_file, optimizer=optimizer, learning_rate=rate, num_layers=None)
    whole, parts = RunFolder(tmp_path / "runs/whole"), RunFolder(tmp_path / "runs/parts")
    finetune(config, whole)
    finetune(config, parts, should_stop=StopAfter(2))
    finetune(TrainConfig.from_file(parts.config_file), parts, resume=True)
    validation = [e["loss"] for e in read_events(whole.path) if e["event"] == "validation"]
    assert validation[-1] < validation[0]
    assert losses(parts) == losses(whole)
    assert same_arrays(final_arrays(parts), final_arrays(whole))


def test_weight_decay_spares_magnitudes_and_norms(starter):
    attach(starter.model, "full")
    zero = tree_map(mx.zeros_like, starter.model.trainable_parameters())
    before = dict(tree_flatten(starter.model.parameters()))
    optimizer = GroupedOptimizer("adamw", starter.model.trainable_parameters(), weight_decay=0.5)
    optimizer.update(starter.model, zero, learning_rate=0.1)
    after = dict(tree_flatten(starter.model.parameters()))
    matrix, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
    assert mx.allclose(after[matrix], 0.95 * before[matrix])
    assert mx.array_equal(after[norm], before[norm])


def test_weight_decay_without_an_optimizer_for_it_is_refused(chat_file, run):
    with pytest.raises(UserError, match="use adamw"):
        finetune(quick(chat_file, optimizer="adam", weight_decay=0.1), run)
