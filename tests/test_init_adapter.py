"""A training that begins with an adapter made elsewhere."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapter_models import arrays_of, attach_moved

from dora_mlx import plan, train
from dora_mlx.adapters.adapter_folder import save_adapter
from dora_mlx.adapters.attach import attach
from dora_mlx.adapters.peft import write_peft
from dora_mlx.adapters.stored import StoredAdapter
from dora_mlx.loading import load_base
from dora_mlx.training.events import read_events

QUICK = ["--steps", "2", "--steps-per-eval", "2", "--learning-rate", "1e-6"]
OPTIONS = {"method": "dora", "rank": 3, "alpha": 5.0, "num_layers": 2, "rslora": True}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def arrays(starter_path):
    """The arrays of an adapter that is in the folders ``ours`` and ``peft``."""
    model = load_base(starter_path).model
    targets = ("q_proj", "mlp.up_proj")
    spec = attach_moved(model, target_modules=targets, rank_overrides=("q_proj=2",), **OPTIONS)
    for folder in ("ours", "peft"):
        Path(folder).mkdir()
    save_adapter(Path("ours"), model, spec)
    write_peft(Path("peft"), StoredAdapter(spec, arrays_of(model)), load_base(starter_path))
    return arrays_of(model)


@pytest.mark.parametrize("form", ["ours", "peft"])
def test_training_begins_where_the_adapter_ended(arrays, chat_file, form):
    flags = ["--data", str(chat_file), "--init-adapter", form, "--run", "r", *QUICK]
    assert train.main(flags) == 0
    options = json.loads(Path("runs/r/config.json").read_text())["options"]
    assert options | OPTIONS == options
    assert [one.rpartition(".")[2] for one in options["rank_overrides"]] == ["q_proj=2"]
    saved = mx.load("runs/r/adapters.safetensors")
    assert {name.replace("magnitude", "m") for name in arrays} == set(saved)
    for name, array in arrays.items():
        # Two steps at a tiny rate: still where it began, and no longer quite.
        moved = np.abs(np.array(saved[name.replace("magnitude", "m")] - array)).max()
        assert 0 < moved < 1e-4, name
    # Its own files have all that a resume needs: the folder may be gone.
    shutil.rmtree(form)
    before = Path("runs/r/config.json").read_text()
    assert train.main(["--resume", "r", "--steps", "3"]) == 0
    assert [e["step"] for e in read_events(Path("runs/r")) if e["event"] == "step"] == [1, 2, 3]
    after = json.loads(Path("runs/r/config.json").read_text())["options"]
    assert after == json.loads(before)["options"] | {"steps": 3}
    assert after["init_adapter"] == str(Path(form).absolute())


def test_options_that_contradict_the_adapter_are_listed(arrays, chat_file, capsys):
    flags = ["--data", str(chat_file), "--run", "r", *QUICK]
    contradicting = ["--rank", "4", "--method", "lora", "--alpha", "5"]
    assert train.main([*flags, "--init-adapter", "ours", *contradicting]) == 2
    error = capsys.readouterr().err
    assert "--method is lora but the adapter has dora" in error
    assert "--rank is 4 but the adapter has 3" in error
    assert "--alpha" not in error
    assert not Path("runs/r").exists()


def test_what_is_no_adapter_is_refused(starter_path, chat_file, capsys):
    flags = ["--data", str(chat_file), "--run", "r", *QUICK]
    assert train.main([*flags, "--init-adapter", "nowhere"]) == 2
    assert "holds no adapter" in capsys.readouterr().err
    model = load_base(starter_path).model
    Path("full").mkdir()
    save_adapter(Path("full"), model, attach(model, "full"))
    assert train.main([*flags, "--init-adapter", "full"]) == 2
    assert "not an adapter" in capsys.readouterr().err
    assert not Path("runs/r").exists()


def test_the_plan_is_of_the_adapter_that_is_trained(starter_path, chat_file, capsys):
    model = load_base(starter_path).model
    spec = attach_moved(model, method="lora", rank=64, target_modules=("down_proj",))
    for folder in ("ours", "peft"):
        Path(folder).mkdir()
    save_adapter(Path("ours"), model, spec)
    write_peft(Path("peft"), StoredAdapter(spec, arrays_of(model)), load_base(starter_path))
    trained = ["--method", "lora", "--rank", "64", "--target-modules", "down_proj"]
    plans = []
    for flags in (trained, ["--init-adapter", "ours"], ["--init-adapter", "peft"]):
        assert plan.main(["--data", str(chat_file), "--json", *flags]) == 0
        plans.append(json.loads(capsys.readouterr().out)["parts"])
    assert plans[0] == plans[1] == plans[2]
    flags = ["--data", str(chat_file), "--init-adapter", "ours", "--run", "r", *QUICK]
    assert train.main(flags) == 0
    begun = read_events(Path("runs/r"))[0]
    assert begun["plan"]["parts"] == plans[0]
    assert plan.main(["--init-adapter", "nowhere"]) == 2
    assert "holds no adapter" in capsys.readouterr().err
