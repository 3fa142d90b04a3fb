"""The plan of a run's memory: what it predicts is what MLX then needs."""

import json
from dataclasses import replace
from threading import Thread

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks.plan import ROWS, Row, facts_of, measured, predicted
from dora_mlx.config import TrainConfig
from dora_mlx.data.examples import Example, Examples
from dora_mlx.errors import UserError
from dora_mlx.kernels.device import assuming_device
from dora_mlx.kernels.gain_backward import gain_backward
from dora_mlx.run_folder import new_run
from dora_mlx.skeleton import build_skeleton, find_facts
from dora_mlx.training import device_limits, memory_plan
from dora_mlx.training.events import EventLog, read_events
from dora_mlx.training.finetune import finetune
from dora_mlx.training.gpu_operations import planned_operations
from dora_mlx.training.graph import trace
from dora_mlx.training.graph_memory import peak_of
from dora_mlx.training.lean_backward import lean_swiglu
from dora_mlx.training.memory_plan import (
    Machine,
    MemoryWatch,
    fit,
    fit_to_memory,
    plan_for,
    plan_memory,
)

MEASURED = [
    Row("llama", 4, 128, {"grad_checkpoint": True}),
    Row("llama", 1, 512, {"grad_checkpoint": False}),
    Row("qwen3", 4, 64, {"grad_checkpoint": True}),
    Row("gemma3_text", 4, 64, {"grad_checkpoint": False}),
    Row("phi3", 2, 128, {"grad_checkpoint": True}),
    Row("olmo2", 2, 256, {"grad_checkpoint": True}),
    Row("mixtral", 4, 64, {"grad_checkpoint": False}),
    Row("llama", 2, 128, {"method": "lora", "rank": 32}),
    Row("llama", 2, 128, {"grad_accumulation_steps": 2}),
    Row("llama", 2, 128, {"num_layers": 2}),
    Row("llama", 2, 128, {"pack": True}),
]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.title)
def test_prediction_is_within_15_percent_of_the_measured_peak(row):
    parts = predicted(row)
    assert sum(parts.values()) == pytest.approx(measured(row, parts), rel=0.15)


def test_the_benchmark_covers_every_family_with_and_without_checkpointing():
    kinds = {(row.family, row.options.get("grad_checkpoint")) for row in ROWS}
    assert {(name, flag) for name in ("llama", "qwen3", "phi3") for flag in (True, False)} <= kinds


@pytest.mark.parametrize("size", ["-3", "0", "nan"])
def test_a_mac_without_memory_is_refused(size):
    # It was planned for, with a limit below zero.
    with pytest.raises(UserError, match="give a number such as 16"):
        Machine.mac(float(size))


def test_missing_data_is_told_without_the_model(tmp_path):
    # It was planned as if there were none, with full windows.
    config = TrainConfig(model="qwen3-0.6b-4bit", data=str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="There is no data at"):
        plan_memory(config, thorough=True)


def test_parts_that_stay_are_exact(starter):
    config = TrainConfig(model="starter")
    parts = plan_memory(config).parts
    arrays = [a for _, a in tree_flatten(starter.model.parameters())]
    assert parts["weights"] == sum(a.nbytes for a in arrays)
    # Adam keeps two moments of every trained value, and a few counters.
    assert parts["optimizer"] == pytest.approx(2 * parts["adapter"], rel=1e-3)


def test_nothing_is_read_or_computed_for_a_plan():
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    plan = plan_memory(TrainConfig(model="llama-3.1-8b-4bit", max_seq_length=512))
    assert plan.peak > 5e9
    assert mx.get_peak_memory() - before < 2**20


def test_plan_follows_the_options():
    config = TrainConfig(model="qwen3-0.6b-4bit", max_seq_length=257)

    def peak(**options):
        return plan_memory(replace(config, **options), machine=Machine.mac(64)).peak

    usual = peak()
    assert 1.5 * peak(grad_checkpoint=True) < usual
    assert peak(batch_size=1) < usual
    assert peak(rank=64) > usual
    assert peak(num_layers=4) < usual
    assert peak(method="full") > 2 * usual


def test_advice_names_flags_and_fit_takes_them():
    config = TrainConfig(model="llama-3.2-1b-4bit", max_seq_length=1024, grad_checkpoint=False)
    facts, small = find_facts(config.model, ask_hub=False), Machine(4 * 10**9, cpu=False)
    plan = plan_for(config, facts, None, small)
    assert plan.verdict == "does not fit"
    assert any(sentence.startswith("--grad-checkpoint would need") for sentence in plan.advice)
    fitted = fit(config, facts, None, small)
    assert fitted.plan.verdict == "fits"
    chosen = fitted.config
    assert chosen.batch_size * chosen.grad_accumulation_steps == config.batch_size
    assert fitted.changes
    with pytest.raises(UserError, match="Choose a smaller model"):
        fit(config, facts, None, Machine(10**8, cpu=False))


def test_fit_cuts_no_example_for_a_reserve():
    config = TrainConfig(model="llama-3.2-1b-4bit", max_seq_length=1024)
    facts = find_facts(config.model, ask_hub=False)
    least = replace(config, batch_size=1, grad_accumulation_steps=4, grad_checkpoint=True)
    needed = plan_for(least, facts, None, Machine(10**12, cpu=False)).peak
    fitted = fit(config, facts, None, Machine(round(needed / 0.95), cpu=False))
    assert (fitted.plan.verdict, fitted.config.max_seq_length) == ("tight", 1024)
    assert fitted.config.batch_size == 1
    shorter = fit(config, facts, None, Machine(round(needed / 1.05), cpu=False))
    assert shorter.config.max_seq_length < 1024


def test_only_what_does_not_fit_otherwise_computes_its_blocks_twice(tmp_path, chat_file):
    config = TrainConfig(model="llama-3.1-8b-4bit", max_seq_length=513)
    plans = {size: plan_memory(config, machine=Machine.mac(size)) for size in (16, 24)}
    assert {size: plan.grad_checkpoint for size, plan in plans.items()} == {16: True, 24: False}
    # Told to do without, it just fits there.
    without = replace(config, grad_checkpoint=False)
    assert plan_memory(without, machine=Machine.mac(16)).verdict == "tight"
    assert not fit_to_memory(config, machine=Machine.mac(24)).changes
    # What fits with it is not changed for that either.
    longer = replace(config, max_seq_length=2049)
    fitted = fit_to_memory(longer, machine=Machine.mac(24))
    assert (fitted.config.grad_checkpoint, fitted.changes) == (True, {})
    folder = new_run("small", tmp_path, "small")
    finetune(TrainConfig(data=str(chat_file), steps=1), folder)
    assert folder.read_config()["options"]["grad_checkpoint"] is False


def test_advice_does_not_offer_the_checkpoints_that_are_on_by_default():
    config = TrainConfig(model="qwen3-14b-4bit")
    facts = find_facts(config.model, ask_hub=False)
    advice = plan_for(config, facts, None, Machine(6 * 10**9, cpu=False)).advice
    assert not any("--grad-checkpoint" in sentence for sentence in advice)
    assert "are weights" in advice[-1]


def test_only_the_longest_examples_count():
    config = TrainConfig(model="starter", batch_size=2)
    examples = Examples.of([Example(np.ones(n, np.int32), np.arange(n) > 0) for n in (9, 41, 20)])
    shape = memory_plan.largest_batch(config, examples)
    assert (shape.rows, shape.width, shape.trained) == (2, 40, 40 + 19)


def test_a_run_that_cannot_fit_is_refused_before_it_begins(tmp_path, chat_file, monkeypatch):
    monkeypatch.setattr(memory_plan, "memory_limit", lambda: 10**6)
    config = TrainConfig(data=str(chat_file), steps=1)
    folder = new_run("r", tmp_path, "r")
    with pytest.raises(UserError, match="--ignore-memory starts all the same"):
        finetune(config, folder)
    assert not folder.path.exists()
    assert finetune(config, folder, ignore_memory=True) == "completed"
    (start, *_) = read_events(folder.path)
    assert start["plan"]["verdict"] == "does not fit"
    assert start["plan"]["peak"] == sum(start["plan"]["parts"].values())


def test_fit_changes_the_run_and_says_so(tmp_path, chat_file, monkeypatch):
    config = TrainConfig(data=str(chat_file), steps=1, batch_size=8, grad_checkpoint=False)
    whole = plan_memory(config)
    monkeypatch.setattr(memory_plan, "memory_limit", lambda: whole.peak)
    folder = new_run("r", tmp_path, "r")
    finetune(config, folder, fit=True)
    chosen = read_events(folder.path)[0]["plan"]["chosen"]
    options = folder.read_config()["options"]
    assert chosen["batch_size"] == options["batch_size"] < 8
    assert options["batch_size"] * options["grad_accumulation_steps"] == 8


def test_rehearsal_leaves_no_trace(tmp_path, chat_file, monkeypatch):
    from dora_mlx.training import finetune as story

    config = TrainConfig(data=str(chat_file), steps=3, dropout=0.1)
    losses = []
    for name, small in (("with", 1), ("without", 10**12)):
        monkeypatch.setattr(story, "SMALL_MODEL", small)
        # The rate is settled by size as well.
        settled = replace(config, learning_rate=1e-3)
        folder = new_run(name, tmp_path, name)
        finetune(settled, folder)
        events = read_events(folder.path)
        assert (events[0]["plan"]["calibrated_peak"] is None) == (name == "without")
        losses.append([event["loss"] for event in events if event["event"] == "step"])
    assert losses[0] == losses[1]


# A tiny run three times above its plan frightened people over 25 MB.
@pytest.mark.parametrize(
    ("planned", "peaks", "warned"),
    [(2_000, (2_250, 2_400, 3_000), [2]), (11, (61, 86, 160), []), (11, (61, 162, 300), [2])],
)
def test_growth_beyond_the_plan_is_said_once_where_it_matters(tmp_path, planned, peaks, warned):
    with EventLog(tmp_path) as log:
        log.watch(MemoryWatch(log, planned * 10**6, before=50 * 10**6))
        for step, peak in enumerate(peaks, start=1):
            log.write("step", step=step, peak_memory_bytes=peak * 10**6)
    warnings = [e for e in read_events(tmp_path) if e["event"] == "warning"]
    assert [e["step"] for e in warnings] == warned


def test_limits_of_a_mac_are_set_and_put_back(monkeypatch):
    calls = []
    monkeypatch.setattr(device_limits.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        device_limits.mx, "device_info", lambda: {"max_recommended_working_set_size": 500}
    )
    monkeypatch.setattr(device_limits.mx, "set_wired_limit", lambda n: calls.append(n) or 7)
    before = mx.get_memory_limit()
    with device_limits.memory_held_to(1000, 900):
        assert mx.get_memory_limit() == 900
    assert mx.get_memory_limit() == before
    assert calls == [500, 7]


def doubled(x):
    # Made within the trace, where MLX's transformations are those of the tracer.
    function = mx.custom_function(lambda x: 2 * x)
    function.vjp(lambda x, d, y: mx.exp(d) * y)
    return function(x)


def test_graph_of_custom_gradients_is_what_autodiff_would_build():
    def step(x):
        return list(mx.vjp(lambda x: mx.sin(doubled(x)), [x], [mx.ones((8, 8))])[1])

    graph = trace(step, [mx.zeros((8, 8))])
    kinds = {node.kind for node in graph.nodes}
    assert {"Exp", "Cos"} <= kinds
    assert 256 <= peak_of(graph).total <= 4 * 256


def test_random_numbers_of_a_graph_are_as_if_not_drawn():
    # A key that hangs on what is never computed is some operations deeper after every plan, and
    # MLX walks along them with its stack.
    mx.random.seed((7 << 32) + 5)
    trace(lambda x: [mx.random.bernoulli(0.5, x.shape) * x], [mx.zeros(3)])
    assert mx.random.state[0].tolist() == [7, 5]


# Plans of quantized experts ended with a mismatch of shapes: a norm that is computed once in a
# step calls a function with a gradient of its own, the first time and no other.
@pytest.mark.parametrize("rows", [4, 8], ids=["other shape", "same shape"])
def test_graph_of_a_function_that_computes_something_only_once(rows):
    kept = []

    def layer(x):
        if not kept:
            kept.append(mx.stop_gradient(doubled(x[:rows])).sum())
        return doubled(mx.sin(kept[0] * x))

    def step(x):
        return list(mx.vjp(layer, [x], [mx.ones((8, 8))])[1])

    kinds = [node.kind for node in trace(step, [mx.zeros((8, 8))]).nodes]
    assert kinds.count("Exp") == kinds.count("Cos") == 1


# An app plans in one thread and answers a chat in another.
def test_other_threads_compute_as_always_while_one_plans():
    seen = []

    def elsewhere():
        with mx.stream(mx.new_stream(mx.default_device())):
            x = mx.ones((4, 4))
            seen.append(mx.grad(lambda x: lean_swiglu(x, x).sum())(x).sum().item())

    def step(x):
        def inner(x):
            thread = Thread(target=elsewhere)
            thread.start()
            thread.join()
            return lean_swiglu(x, x)

        return list(mx.vjp(inner, [x], [mx.ones((4, 4))])[1])

    graph = trace(step, [mx.ones((4, 4))])
    expected = 16 * mx.grad(lambda x: x * nn.silu(x))(mx.array(1.0)).item()
    assert seen == [pytest.approx(expected)] * 2
    assert [graph.shapes[name] for name in graph.outputs] == [(4, 4)]


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "rope", "gain_backward"])
def test_the_plan_for_a_mac_has_no_float32_copies_that_its_kernels_do_not_make(name):
    x, weight = mx.zeros((4, 8, 64), mx.bfloat16), mx.ones(64)
    calls = {
        "rms_norm": lambda x: mx.fast.rms_norm(x, weight.astype(x.dtype), 1e-5),
        "layer_norm": lambda x: mx.fast.layer_norm(x, None, None, 1e-5),
        "rope": lambda x: mx.fast.rope(x, 64, traditional=False, base=1e4, scale=1.0, offset=0),
    }

    def step(x):
        if name == "gain_backward":
            return list(gain_backward(x, x + 1, weight, weight))
        return list(mx.vjp(lambda x: [calls[name](x)], [x], [x])[1])

    def arrays(cpu):
        with assuming_device(cpu), planned_operations():
            return peak_of(trace(step, [x])).total / x.nbytes

    print(name, arrays(cpu=True), arrays(cpu=False))
    assert arrays(cpu=False) < 2.1 < 2.9 < arrays(cpu=True)


def test_skeleton_of_the_starter_is_the_starter(starter):
    facts = find_facts("starter")
    shapes = {n: a.shape for n, a in tree_flatten(build_skeleton(facts).parameters())}
    assert shapes == {n: a.shape for n, a in tree_flatten(starter.model.parameters())}


def test_command_prints_json_and_refuses_nonsense(capsys):
    from dora_mlx.plan import main

    assert main(["--json", "--model", "starter"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["verdict"] == "fits"
    assert main(["--model", "no-such-model"]) == 2
    assert "No model is called" in capsys.readouterr().err


def test_synthetic_models_build_without_a_folder():
    assert len(build_skeleton(facts_of("llama")).layers) == 6
