"""Options: one dataclass, its flags, its file, and what is refused."""

import dataclasses
import json

import pytest

from dora_mlx import train
from dora_mlx.config import TrainConfig
from dora_mlx.errors import UserError

OTHER = {
    "data": "x.jsonl",
    "valid_data": "y.jsonl",
    "init_adapter": "z",
    "mask_prompt": False,
    "target_modules": ("q_proj", "v_proj"),
    "rank_overrides": ("q_proj=4",),
    "num_layers": 3,
    "steps": 7,
    "learning_rate": 1e-5,
    "method": "lora",
    "schedule": "linear",
    "model": "other",
    "rslora": True,
    "optimizer": "lion",
    "data_form": "alpaca",
    "columns": ("prompt=question", "completion=answer"),
    "skip_bad_rows": True,
    "pack": True,
    "train_on": "last",
    "long_examples": "split",
    "patience": 3,
    "grad_checkpoint": True,
}


def other_value(option):
    """A valid value that is not the default."""
    if option.name in OTHER:
        return OTHER[option.name]
    return option.default + 1 if isinstance(option.default, int) else option.default * 0.5 + 0.1


def flags_for(values):
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            flags += [flag, *value]
        else:
            flags += [flag, str(value)]
    return flags


def parse(*argv):
    return train._what_to_train(train.build_parser().parse_args([*argv]))


def test_every_option_is_a_flag_and_survives_the_file(tmp_path):
    values = {option.name: other_value(option) for option in dataclasses.fields(TrainConfig)}
    assert all(getattr(TrainConfig(), name) != value for name, value in values.items())
    config, _ = parse(*flags_for(values))
    absolute = {
        name: str(tmp_path.cwd() / values[name]) for name in ("data", "valid_data", "init_adapter")
    }
    assert config == TrainConfig(**{**values, **absolute})
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"options": config.to_dict()}))
    assert TrainConfig.from_file(file) == config
    assert parse("--config", str(file))[0] == config


def test_flag_overrules_file_overrules_default(tmp_path):
    file = tmp_path / "options.json"
    file.write_text('{"rank": 4, "alpha": 32}')
    config, _ = parse("--config", str(file), "--rank", "2")
    assert (config.rank, config.alpha, config.epochs) == (2, 32, TrainConfig().epochs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rnak": 4}', "unknown option 'rnak', did you mean 'rank'"),
        ('{"rank": "8"}', 'rank cannot be "8"'),
        ('{"rank": 2.5}', "rank cannot be 2.5"),
        ('{"mask_prompt": 1}', "mask_prompt cannot be 1"),
        ('{"method": "qlora"}', 'method cannot be "qlora"'),
        ('{"target_modules": "q_proj"}', "target_modules cannot be"),
        ("[1]", "holds no options"),
        ("{", "not a JSON configuration"),
    ],
)
def test_wrong_configuration_is_explained_with_its_file(tmp_path, text, message):
    file = tmp_path / "options.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse("--config", str(file))
    assert message in str(caught.value)
    assert "options.json" in str(caught.value)


def test_all_values_out_of_bounds_are_listed_at_once():
    with pytest.raises(UserError) as caught:
        TrainConfig(rank=0, dropout=1.5, learning_rate=float("nan"), batch_size=10**6)
    message = str(caught.value)
    for flag in ("--rank", "--dropout", "--learning-rate", "--batch-size"):
        assert flag in message


def test_missing_configuration_file():
    with pytest.raises(UserError, match="Cannot read the configuration"):
        parse("--config", "nowhere.json")


def test_resume_takes_no_option_that_its_steps_depend_on(tmp_path):
    with pytest.raises(UserError, match="takes no --rank"):
        parse("--resume", "a", "--rank", "4")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 101, "a b"])
def test_run_name_cannot_leave_the_runs_folder(name):
    with pytest.raises(UserError, match="cannot be a run's name"):
        parse("--run", name)


def test_run_gets_a_name_of_model_and_data_and_a_free_number(tmp_path):
    argv = ["--runs-dir", str(tmp_path), "--model", "org/Some Model", "--data", "my chat.jsonl"]
    assert parse(*argv)[1].name == "Some-Model-my-chat"
    (tmp_path / "Some-Model-my-chat").mkdir()
    assert parse(*argv)[1].name == "Some-Model-my-chat-2"
