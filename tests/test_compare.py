"""Methods side by side: same batches and start, own memory, nothing repeated, bad input said."""

import json
import re
from pathlib import Path

import pytest

from dora_mlx import compare
from dora_mlx.comparing.comparison import Stopped, Watch, read_comparison, run_comparison
from dora_mlx.comparing.general import GeneralSet
from dora_mlx.comparing.report import Spread
from dora_mlx.comparing.settings import (
    Budget,
    Contender,
    Settings,
    parse_budget,
    parse_contenders,
    parse_learning_rates,
    swept,
)
from dora_mlx.config import TrainConfig
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
