"""Questions to ask a trained model come from what it never trained on."""

import json

from dora_mlx import TrainConfig, held_out_questions
from dora_mlx.data.preparation import prepare
from dora_mlx.run_folder import RunFolder


def run_with(folder, **options):
    run = RunFolder(folder / "run")
    run.path.mkdir()
    run.write_config({"options": TrainConfig(**options).to_dict()})
    return run


def test_questions_are_of_the_side_that_training_keeps_for_validation(
    tmp_path, chat_file, tokenizer
):
    run = run_with(tmp_path, data=str(chat_file), valid_fraction=0.3, seed=5)
    questions = held_out_questions(run, limit=100)
    config = TrainConfig.from_file(run.config_file)
    data = prepare(config, chat_file, tokenizer)
    assert len(questions) == len(data.valid.examples) > 0
    trained = " ".join(tokenizer.decode(e.tokens.tolist()) for e in data.train.examples)
    for question in questions:
        assert question.messages[-1]["role"] == "user"
        assert question.messages[-1]["content"] not in trained
        number = int(question.messages[-1]["content"].split()[2])
        assert question.answer == f"Arr! It be {number + 1}."


def test_rows_without_a_question_are_passed_over(tmp_path):
    valid = tmp_path / "valid.jsonl"
    rows = [
        {"text": "no conversation"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ]
    valid.write_text("\n".join(map(json.dumps, rows[1:] * 3)))
    run = run_with(tmp_path, data=str(valid), valid_data=str(valid))
    assert [question.answer for question in held_out_questions(run, limit=2)] == ["Ho", "Ho"]
    valid.write_text("\n".join(map(json.dumps, rows[:1])))
    assert held_out_questions(run) == []
