"""The look at data that the app shows before a training."""

import json

import pytest

from dora_mlx import DataLook, TrainConfig, UserError
from dora_mlx.registry import samples_dir


def look(path, **options):
    return DataLook(TrainConfig(data=None if path is None else str(path), **options))


def test_sample_is_seen_whole():
    overview = look(None).overview
    assert overview.bad_rows == 0
    assert overview.columns == ("messages",)
    examples = overview.train.examples + overview.valid.examples
    assert examples == overview.reports[0].rows == sum(number for _, _, number in overview.bars)


def test_bad_rows_are_named_by_line_and_left_out():
    overview = look(samples_dir() / "broken.jsonl").overview
    report = overview.reports[0]
    assert overview.bad_rows == report.bad_rows > 0
    assert all(problem.line > 0 and problem.message for problem in report.problems)


def test_spans_show_every_token_once_and_only_answers_are_trained(tmp_path):
    path = tmp_path / "chat.jsonl"
    # Characters of several tokens must not fall apart into marks for damaged text.
    answer = "Arr! ⚓ naïve 🏴‍☠️ 海賊."
    rows = [[("user", f"Question {n}?"), ("assistant", answer)] for n in range(20)]
    lines = [{"messages": [{"role": r, "content": c} for r, c in row]} for row in rows]
    path.write_text("\n".join(map(json.dumps, lines)))
    looked = look(path)
    spans = looked.example(0)
    assert answer in "".join(span.text for span in spans if span.trained and not span.special)
    assert "Question" not in "".join(span.text for span in spans if span.trained)
    assert any(span.special for span in spans)
    examples = looked._data.train.examples
    assert sum(span.tokens for span in spans) == len(examples[0])
    assert sum(span.tokens for span in spans if span.trained) == examples[0].trained.sum()
    with pytest.raises(IndexError):
        looked.example(len(examples))


def test_unknown_columns_are_named_for_a_mapping(tmp_path):
    path = tmp_path / "faq.csv"
    path.write_text("question,answer\n" + "".join(f"Why {n}?,Arr {n}\n" for n in range(9)))
    overview = look(path).overview
    assert overview.columns == ("question", "answer")
    assert overview.bad_rows == 9
    assert overview.train.examples == 0
    mapped = look(path, columns=("prompt=question", "completion=answer")).overview
    assert mapped.bad_rows == 0
    assert mapped.train.examples + mapped.valid.examples == 9


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="There is no data"):
        look(tmp_path / "none.jsonl")
