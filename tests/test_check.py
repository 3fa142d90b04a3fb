"""The check command, lengths, the cache of tokens, and the data options of a training."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from reported_lines import named_lines

from dora_mlx import check
from dora_mlx.config import TrainConfig
from dora_mlx.data import cache
from dora_mlx.data.examples import Example, fit
from dora_mlx.data.preparation import prepare, tokenize
from dora_mlx.errors import UserError
from dora_mlx.registry import samples_dir
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.events import read_events
from dora_mlx.training.finetune import finetune


def test_broken_sample_is_named_line_by_line_as_its_readme_says(capsys):
    assert check.main([str(samples_dir() / "broken.jsonl")]) == 2
    output = capsys.readouterr().out
    table = (samples_dir() / "README.md").read_text()
    bad = {int(n) for n, what in re.findall(r"^\| (\d+) \| (.*) \|$", table, re.M)} - {1}
    assert named_lines(output).keys() == bad
    assert "19 bad" in output


def test_good_file_gives_statistics_and_a_picture(chat_file, capsys):
    assert check.main([str(chat_file), "--show", "1"]) == 0
    output = capsys.readouterr().out
    assert "40 examples" in output
    assert " for 50 %" in output
    assert re.search(r"\d+ to \d+ +#+ +\d+", output)
    assert re.search(r"prepared in .* tokens/s", output)
    # Not a terminal, so no colours but marks.
    assert "\x1b" not in output
    assert ">>Arr! It be 1.<|im_end|><<" in output


def test_colours_only_on_a_terminal_that_wants_them(chat_file, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    check.main([str(chat_file), "--show", "1"])
    assert "\x1b[1;32mArr! It be 1.<|im_end|>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    check.main([str(chat_file), "--show", "1"])
    assert "\x1b" not in capsys.readouterr().out


def test_bad_rows_stop_a_training_or_are_left_out_and_counted(chat_file, tmp_path):
    with open(chat_file, "a") as file:
        file.write("{}\n[]\n")
    run = RunFolder(tmp_path / "runs" / "a")
    options = {"data": str(chat_file), "steps": 1, "num_layers": 1}
    with pytest.raises(UserError, match="2 bad lines"):
        finetune(TrainConfig(**options), run)
    finetune(TrainConfig(**options, skip_bad_rows=True, pack=True), run)
    messages = [e["message"] for e in read_events(run.path) if e["event"] == "warning"]
    assert any("2 bad rows" in message for message in messages)
    assert not any("not packed" in message for message in messages)
    assert check.main([str(chat_file), "--skip-bad-rows"]) == 0


LONG = Example(np.arange(12, dtype=np.int32), np.arange(12) >= 8)


@pytest.mark.parametrize(
    ("treatment", "expected"),
    [
        ("truncate", [[0, 1, 2, 3, 4, 5]]),
        ("truncate-prompt", [[0, 7, 8, 9, 10, 11]]),
        ("drop", []),
        ("split", [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10], [10, 11]]),
    ],
)
def test_long_examples_are_treated_as_told(treatment, expected):
    found = list(fit(LONG, 6, treatment, keep_first=True))
    assert [example.tokens.tolist() for example in found] == expected
    if treatment == "split":
        # Every trained token is a target exactly once.
        assert sum(int(e.trained.sum()) for e in found) == 4


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(cache, "_WORTH_KEEPING", 0)
    return tmp_path / "cache"


def tokens(source):
    return [example.tokens.tolist() for example in source.examples]


def test_kept_tokens_are_used_again_and_only_for_the_same_thing(chat_file, kept, tokenizer):
    config = TrainConfig()
    first = tokenize(config, chat_file, tokenizer)
    again = tokenize(config, chat_file, tokenizer)
    assert (first.kept, again.kept) == (False, True)
    assert tokens(again) == tokens(first)
    assert np.array_equal(again.digests, first.digests)
    assert again.report.to_dict() == first.report.to_dict()
    assert not tokenize(TrainConfig(train_on="last"), chat_file, tokenizer).kept
    assert not tokenize(TrainConfig(max_seq_length=32), chat_file, tokenizer).kept
    chat_file.write_text(chat_file.read_text().replace("Arr", "Aye"))
    changed = tokenize(config, chat_file, tokenizer)
    assert not changed.kept
    assert tokens(changed) != tokens(first)
    assert len(list(kept.iterdir())) == 4


@pytest.mark.parametrize("name", ["tokens", "meta.json", "digests"])
def test_damaged_kept_tokens_are_made_again_with_a_word(chat_file, kept, tokenizer, name):
    first = tokenize(TrainConfig(), chat_file, tokenizer)
    expected = tokens(first)
    (folder,) = kept.iterdir()
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 255
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    again = tokenize(TrainConfig(), chat_file, tokenizer)
    assert not again.kept
    assert tokens(again) == expected
    assert any("damaged" in notice for notice in again.report.notices)


def test_least_recently_used_tokens_go_first(chat_file, kept, tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "_MOST_BYTES", 0)
    for length in (64, 65):
        tokenize(TrainConfig(max_seq_length=length), chat_file, tokenizer)
    assert len(list(kept.iterdir())) == 1


def test_rows_in_both_files_are_noted_and_a_valid_file_is_used(chat_file, tokenizer, tmp_path):
    lines = chat_file.read_text().splitlines()
    valid = tmp_path / "valid.jsonl"
    valid.write_text("\n".join([*lines[:2], lines[2].replace("Arr", "Aye")]))
    config = TrainConfig(data=str(chat_file), valid_data=str(valid))
    data = prepare(config, Path(chat_file), tokenizer)
    assert (len(data.train.examples), len(data.valid.examples)) == (40, 3)
    assert any(notice.startswith("2 of its rows") for notice in data.reports[1].notices)
    # Split by content: exact duplicates of a row never end on both sides.
    chat_file.write_text("\n".join(lines * 2))
    data = prepare(TrainConfig(valid_fraction=0.3), Path(chat_file), tokenizer)
    sides = [{tuple(e.tokens) for e in s.examples} for s in (data.train, data.valid)]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_wrong_columns_option_is_one_sentence(chat_file, capsys):
    assert check.main([str(chat_file), "--columns", "q=a"]) == 2
    assert "--columns q=a cannot be used" in capsys.readouterr().err
    assert check.main(["nowhere.jsonl"]) == 2
    assert json.dumps("There is no data").strip('"') in capsys.readouterr().err
