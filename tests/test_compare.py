"""Methods side by side: same batches and start, own memory, nothing repeated, bad input said."""

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dora_mlx import compare
from dora_mlx.comparing import report
from dora_mlx.comparing.comparison import (
    Comparison,
    RunResult,
    Stopped,
    Watch,
    read_comparison,
    run_comparison,
)
from dora_mlx.comparing.general import GeneralSet
from dora_mlx.comparing.report import Spread
from dora_mlx.comparing.settings import (
    METHODS,
    Budget,
    Contender,
    Settings,
    parse_budget,
    parse_contenders,
    parse_learning_rates,
    swept,
)
from dora_mlx.config import TrainConfig
from dora_mlx.training import loop, memory_plan
from dora_mlx.training.events import read_events
from dora_mlx.training.loss import plain_loss_sum

QUICK = ["--num-layers", "1", "--batch-size", "2"]


@pytest.fixture
def general(tmp_path):
    path = tmp_path / "general.jsonl"
    chats = [{"prompt": f"Name number {n}.", "completion": f"Number {n}."} for n in range(3)]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


@pytest.fixture
def flags(chat_file, general, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["--data", str(chat_file), "--general-data", str(general), "--output", "c", *QUICK]


def events_of(folder, run):
    return read_events(Path(folder) / "runs" / run)


def test_command_compares_and_does_not_repeat(flags, capsys):
    flags += ["--methods", "full,dora,lora,dora:4", "--budget", "3steps"]
    assert compare.main(flags) == 0
    output = capsys.readouterr().out
    comparison = read_comparison(Path("c"))
    assert comparison.contenders == ["full", "dora", "lora", "dora-r4"]
    results = {result.contender: result for result in comparison.results}
    # The same batch through the same model: before the first update nothing can differ.
    first_losses = {
        name: next(e["loss"] for e in events_of("c", result.run) if e["event"] == "step")
        for name, result in results.items()
    }
    assert max(first_losses.values()) - min(first_losses.values()) < 1e-4
    # Run after a method that needs several times as much, each has a peak of its own.
    assert results["lora"].peak_memory_bytes < results["full"].peak_memory_bytes / 2
    assert results["dora"].trainable_parameters > 1.5 * results["dora-r4"].trainable_parameters
    assert results["dora"].steps == 3
    assert len(results["dora"].validations) == 4
    assert results["dora"].general_loss != comparison.general_before
    assert "full fine-tuning starts from its dequantized weights" in output
    assert "dora-r4" in Path("c/comparison.md").read_text()
    assert Path("c/curves.png").read_bytes().startswith(b"\x89PNG")
    written = Path("c/comparison.json").read_text()
    logs = {path: path.read_text() for path in Path("c/runs").glob("*/events.jsonl")}
    assert compare.main(flags) == 0
    assert {path: path.read_text() for path in logs} == logs
    assert Path("c/comparison.json").read_text() == written
    capsys.readouterr()
    assert compare.main([*flags, "--rank", "2", "--seeds", "3"]) == 2
    error = capsys.readouterr().err
    assert "seeds was 1, is 3" in error
    assert "rank was 8, is 2" in error


def test_an_interrupted_comparison_ends_as_if_nothing_had_happened(chat_file, tmp_path):
    config = TrainConfig(data=str(chat_file), num_layers=1, batch_size=2, steps_per_save=1)
    contenders = (Contender("dora"), Contender("lora"))
    rates = {"dora": (1e-3, 4e-3), "lora": ()}
    settings = Settings(config, contenders, 1, Budget(3, "steps"), rates, None)
    whole = run_comparison(settings, tmp_path / "whole", Watch())
    asked = iter([False, False, False, False, False, True])
    with pytest.raises(Stopped):
        run_comparison(settings, tmp_path / "cut", Watch(should_stop=lambda: next(asked)))
    begun = []
    watch = Watch(starting=lambda name, number, total: begun.append((name, number, total)))
    resumed = run_comparison(settings, tmp_path / "cut", watch)
    # The first run was finished; the second goes on.
    assert begun[0][0] == "dora-lr0.004-seed0"
    assert [name for name, _, _ in begun] == [result.run for result in whole.results[1:]]
    for ours, theirs in zip(resumed.results, whole.results, strict=True):
        assert ours.validations == theirs.validations
        assert ours.run == theirs.run
    tried = {r.learning_rate: r.best_validation for r in whole.results if r.contender == "dora"}
    assert whole.learning_rates["dora"] == min(tried, key=tried.get)
    assert whole.learning_rates["lora"] == 2e-3


@pytest.fixture
def narrow(monkeypatch):
    """Weights that move far overflow, as they would in a type of fewer bits."""

    def loss_sum(model, batch):
        moved = [a for n, a in tree_flatten(model.parameters()) if n.endswith("lora_b")]
        far = mx.stack([mx.abs(array).max() for array in moved]).max() > 0.05
        return plain_loss_sum(model, batch) * mx.where(far, mx.nan, 1.0)

    monkeypatch.setattr(loop, "best_loss", lambda *_: (loss_sum, None))


def test_a_rate_that_diverges_is_the_worst_of_a_sweep(flags, capsys, narrow):
    flags += ["--methods", "dora,lora", "--budget", "7steps"]
    assert compare.main([*flags, "--learning-rates", "dora=0.2/1e-3,lora=1e-3"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"dora is the best of 2 .*\(0\.2: diverged, 0\.001: \d", output)
    comparison = read_comparison(Path("c"))
    assert comparison.learning_rates == {"dora": 1e-3, "lora": 1e-3}
    diverged = [result for result in comparison.results if result.best_validation is None]
    assert [(r.learning_rate, r.general_loss) for r in diverged] == [(0.2, None)]
    # Nothing is trained again, the diverged runs least of all.
    before = {path: path.read_text() for path in Path("c/runs").glob("*/events.jsonl")}
    assert len(before) == 3
    assert compare.main([*flags, "--learning-rates", "dora=0.2/1e-3,lora=1e-3"]) == 0
    assert {path: path.read_text() for path in before} == before


def test_rates_that_all_diverge_are_one_sentence(flags, capsys, narrow):
    flags += ["--methods", "dora", "--budget", "7steps", "--learning-rates", "dora=0.2/0.1"]
    assert compare.main(flags) == 2
    error = capsys.readouterr().err
    assert "dora diverged at every learning rate tried (0.2, 0.1). Give lower ones" in error
    assert not Path("c/comparison.md").exists()


def test_seeds_that_diverge_are_left_out_and_named():
    values = {"contender": "lora", "learning_rate": 1e-3, "steps": 9, "trainable_parameters": 1}
    values |= {"total_parameters": 9, "step_seconds": 1.0, "tokens_per_second": 1.0}
    values |= {"peak_memory_bytes": 1, "general_loss": None, "adapter_bytes": 1}
    losses = [2.0, None, 4.0]
    results = [
        RunResult(run=str(s), seed=s, best_validation=loss, validations=[(0, 5.0)], **values)
        for s, loss in enumerate(losses)
    ]
    comparison = Comparison({"config": {}}, contenders=["lora"], learning_rates={"lora": 1e-3})
    comparison.results = results
    said = report.text(comparison)
    assert "3.0000 ± 1.4142" in said
    assert "lora diverged at that rate with seed 1, which its losses leave out." in said


def test_full_fine_tuning_that_does_not_fit_is_left_out_and_the_report_says_so(
    flags, capsys, monkeypatch
):
    sizes = {m: memory_plan.plan_memory(TrainConfig(method=m, num_layers=1)).peak for m in METHODS}
    limit = (sizes["full"] + sizes["lora"]) // 2
    monkeypatch.setattr(memory_plan, "memory_limit", lambda: limit)
    flags += ["--budget", "1step"]
    assert compare.main([*flags, "--methods", "lora,full"]) == 0
    assert read_comparison(Path("c")).contenders == ["lora"]
    output = capsys.readouterr().out
    assert "Full fine-tuning is left out: it needs about" in output
    assert "Full fine-tuning is left out" in Path("c/comparison.md").read_text()
    assert "dequantized" not in output
    assert compare.main([*flags, "--methods", "full", "--overwrite"]) == 2
    assert "Full fine-tuning is left out" in capsys.readouterr().err


def test_minutes_become_steps(chat_file, tmp_path):
    config = TrainConfig(data=str(chat_file), num_layers=1, batch_size=1, steps_per_eval=1000)
    rates = {"lora": (1e-3,)}
    # A hundredth of a second is less than a step, which is the least there is.
    settings = Settings(config, (Contender("lora"),), 1, Budget(1 / 6000, "minutes"), rates, None)
    comparison = run_comparison(settings, tmp_path, Watch())
    pilot = [e for e in events_of(tmp_path, "pilot-lora") if e["event"] == "step"]
    assert len(pilot) == 8
    assert comparison.steps["lora"] == comparison.results[0].steps
    assert 1 <= comparison.steps["lora"] < 8


def test_general_loss_is_the_mean_over_all_answer_tokens(starter, general):
    found = GeneralSet.read(TrainConfig(batch_size=2), str(general), starter.tokenizer)
    total = sum(plain_loss_sum(starter.model, batch).item() for batch in found.batches)
    tokens = sum(batch.trained_tokens for batch in found.batches)
    assert found.loss(starter.model) == pytest.approx(total / tokens, rel=1e-5)


def test_a_rank_of_its_own_keeps_the_scale():
    settings = Settings(TrainConfig(rank=8, alpha=16), (), 1, Budget(1, "steps"), {}, None)
    config = settings.config_of(Contender("dora", 4), 2, 1e-3, 50)
    assert (config.rank, config.alpha, config.seed) == (4, 8.0, 2)
    assert config.steps_per_eval == 10


def test_lists_are_read():
    contenders = parse_contenders("dora, lora,dora:4")
    assert [c.name for c in contenders] == ["dora", "lora", "dora-r4"]
    rates = parse_learning_rates("dora=1e-3/2e-3,dora:4=5e-3", contenders)
    assert rates == {"dora": (1e-3, 2e-3), "lora": (), "dora-r4": (5e-3,)}
    assert parse_budget("5minutes") == Budget(5.0, "minutes")
    assert parse_budget("1 step") == Budget(1.0, "steps")
    assert swept(1e-3) == (5e-4, 1e-3, 2e-3)
    assert str(Spread.of([1.0, 2.0, 3.0])) == "2.0000 ± 1.0000"
    assert str(Spread.of([1.5])) == "1.5000"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--methods", "dora,qlora"], "not qlora"),
        (["--methods", "dora,dora"], "each once"),
        (["--methods", "full:4"], "not full:4"),
        (["--methods", ","], "--methods takes"),
        (["--budget", "ten"], "--budget takes 200steps or 5minutes"),
        (["--budget", "1.5steps"], "--budget takes"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--learning-rates", "full=1e-3", "--methods", "dora"], "not full=1e-3"),
        (["--learning-rates", "dora=fast"], "not dora=fast"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--general-data", "missing.jsonl", "--methods", "lora"], "missing.jsonl"),
        (["--valid-fraction", "0", "--methods", "lora", "--budget", "1step"], "for validation"),
    ],
)
def test_bad_input_is_one_sentence(flags, capsys, wrong, said):
    assert compare.main([*flags, *wrong]) == 2
    error = capsys.readouterr().err
    message = re.findall(r"^error: .*", error, flags=re.M)
    assert len(message) == 1, error
    assert said in message[0]
    assert "Traceback" not in error
