"""mlx-lm itself loads what is written here, with the same logits; where it cannot, we say so."""

import json
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapter_models import arrays_of, attach_moved, difference, logits, write_base
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load
from test_layers_attach import experts_model

from dora_mlx import ChatModel, Sampling, UserError
from dora_mlx.adapters.adapter_folder import mlx_lm_problems, save_adapter, write_mlx_adapter
from dora_mlx.adapters.reading import load_adapter, read_adapter
from dora_mlx.adapters.stored import StoredAdapter
from dora_mlx.config import TrainConfig
from dora_mlx.loading import load_base
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.finetune import finetune

TOLERANCE = 1e-4


def adapted(folder, bits, **options):
    """A base of so many bits and a moved adapter of it, both on the disk; returns its logits."""
    base = write_base(folder / "base", bits=bits)
    model = load_base(base).model
    before = logits(model)
    spec = attach_moved(model, **options)
    (folder / "run").mkdir()
    save_adapter(folder / "run", model, spec)
    own = logits(model)
    assert difference(own, before) > 0.05
    return base, folder / "run", own


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("rslora", [False, True])
def test_mlx_lm_loads_a_run_folder_with_the_same_logits(tmp_path, bits, method, rslora):
    options = {"method": method, "num_layers": 1, "rank": 4, "rslora": rslora}
    base, run, own = adapted(tmp_path, bits, **options)
    theirs, _ = load(str(base), adapter_path=str(run))
    assert difference(own, logits(theirs)) < TOLERANCE


def test_mlx_lm_generate_answers_as_we_do(tmp_path):
    base, run, _ = adapted(tmp_path, 4, method="dora")
    words = ["--model", base, "--adapter-path", run, "--prompt", "Hello!", "--max-tokens", "12"]
    result = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", *map(str, words), "--verbose", "False"],
        capture_output=True,
        text=True,
        check=True,
    )
    chat = ChatModel.load(str(base))
    chat.add_adapter("run", run)
    messages = [{"role": "user", "content": "Hello!"}]
    ours = "".join(chat.stream(messages, Sampling(max_tokens=12), adapter="run"))
    assert ours.strip()
    assert ours.strip() in result.stdout


@contextmanager
def mlx_lm_server(*words):
    """The address of mlx-lm's server, started as its users do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mlx_lm", "server", *map(str, words), "--port", port]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert any("Starting httpd" in line for line in process.stderr), "it ended"
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("method", "bits"), [("dora", 4), ("lora", 8)])
def test_mlx_lm_server_gives_the_same_probabilities(tmp_path, chat_file, method, bits):
    path = write_base(tmp_path / "base", bits=bits)
    run = RunFolder(tmp_path / "runs" / "a")
    options = {"model": str(path), "data": str(chat_file), "method": method, "steps": 3}
    finetune(TrainConfig(**options, learning_rate=0.05, batch_size=8), run)
    messages = [{"role": "user", "content": "What is 3 plus 1?"}]
    body = {"messages": messages, "max_tokens": 12, "logprobs": True, "temperature": 0.0}
    with mlx_lm_server("--model", path, "--adapter-path", run.path) as url:
        request = urllib.request.Request(url, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            said = json.load(response)["choices"][0]["logprobs"]["content"]
    base = load_base(path)
    prompt = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = [entry["id"] for entry in said]
    tokens = mx.array([prompt + ids[:-1]])
    before = logits(base.model, tokens)[0, len(prompt) - 1 :]
    read_adapter(run.path, base).attach_to(base.model)
    own = logits(base.model.eval(), tokens)[0, len(prompt) - 1 :]
    assert difference(own, before) > 0.05
    assert own.argmax(-1).tolist() == ids
    probabilities = np.array(nn.log_softmax(mx.array(own)))[range(len(ids)), ids]
    np.testing.assert_allclose([entry["logprob"] for entry in said], probabilities, atol=1e-3)


# What docs/interop.md says: the cases that mlx-lm cannot load, and that it loads all others.
CASES = {
    "dora, 2 bits": (2, {"method": "dora"}, True),
    "dora, 3 bits": (3, {"method": "dora"}, False),
    "dora, 5 bits": (5, {"method": "dora"}, False),
    "dora, 6 bits": (6, {"method": "dora"}, False),
    "lora, 3 bits": (3, {"method": "lora"}, True),
    "lora, 5 bits": (5, {"method": "lora"}, True),
    "lora, 6 bits": (6, {"method": "lora"}, True),
    "dora, dense embedding": (None, {"method": "dora", "target_modules": ("embed_tokens",)}, False),
    "dora, 4-bit embedding": (4, {"method": "dora", "target_modules": ("embed_tokens",)}, False),
    "lora, dense embedding": (None, {"method": "lora", "target_modules": ("embed_tokens",)}, True),
    "one block by its path": (
        4,
        {"method": "dora", "target_modules": ("model.layers.0.self_attn.q_proj",)},
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_mlx_lm_cannot_load_is_known(tmp_path, case):
    bits, options, works = CASES[case]
    base, run, own = adapted(tmp_path, bits, **options)
    model = load_base(base).model
    problems = mlx_lm_problems(read_adapter(run, load_base(base)).spec, model)
    assert bool(problems) != works, problems
    try:
        theirs = load_adapters(load_base(base).model, str(run))
    except (ValueError, AttributeError, RuntimeError):
        assert not works
    else:
        assert works == (difference(own, logits(theirs)) < TOLERANCE)


@pytest.mark.parametrize(("method", "works"), [("lora", True), ("dora", False)])
def test_experts(tmp_path, method, works):
    model = experts_model()
    spec = attach_moved(model, method)
    save_adapter(tmp_path, model, spec)
    tokens = mx.array([[3, 5, 5, 9, 1]])
    own = logits(model, tokens)
    assert bool(mlx_lm_problems(spec, experts_model())) != works
    if works:
        assert difference(own, logits(load_adapters(experts_model(), str(tmp_path)), tokens)) < 1e-5
    else:
        with pytest.raises(ValueError, match="doesn't support DoRA"):
            load_adapters(experts_model(), str(tmp_path))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_several_ranks_are_made_one_for_mlx_lm(tmp_path, method, rslora):
    overrides = {"rank_overrides": ("v_proj=2", "mlp.*=11"), "rslora": rslora}
    base, run, own = adapted(tmp_path, 4, method=method, rank=4, **overrides)
    with pytest.raises(ValueError, match="shape"):
        load(str(base), adapter_path=str(run))
    (tmp_path / "one").mkdir()
    write_mlx_adapter(tmp_path / "one", read_adapter(run, load_base(base)))
    theirs, _ = load(str(base), adapter_path=str(tmp_path / "one"))
    assert difference(own, logits(theirs)) < TOLERANCE


def test_ranks_of_experts_are_made_one_as_well(tmp_path):
    model = experts_model()
    spec = attach_moved(model, "lora", rank=4, rank_overrides=("up_proj=2", "gate_proj=7"))
    write_mlx_adapter(tmp_path, StoredAdapter(spec, arrays_of(model)))
    tokens = mx.array([[3, 5, 5, 9, 1]])
    theirs = load_adapters(experts_model(), str(tmp_path))
    assert difference(logits(model, tokens), logits(theirs, tokens)) < 1e-5


def theirs_on_disk(folder, model, dora=False, **parameters):
    """An adapter as mlx-lm's own training leaves it, moved."""
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0, **parameters}
    linear_to_lora_layers(model, 16, parameters, use_dora=dora)
    mx.random.seed(2)
    moved = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_b"):
            module.lora_b = 0.2 * mx.random.normal(module.lora_b.shape)
            moved |= {f"{path}.lora_a": module.lora_a, f"{path}.lora_b": module.lora_b}
            if dora:
                module.m = module.m * 1.2
                moved[f"{path}.m"] = module.m
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 16, "model": "x"}
    config |= {"lora_parameters": parameters, "iters": 100, "seed": 0}
    mx.save_safetensors(str(folder / "adapters.safetensors"), moved)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return logits(model.eval())


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("keys", [{}, {"keys": ["self_attn.q_proj", "mlp.up_proj"]}])
def test_adapters_made_by_mlx_lm_load_here(tmp_path, dora, keys):
    base = write_base(tmp_path / "base", bits=4)
    model, _ = load(str(base))
    wanted = theirs_on_disk(tmp_path, model, dora, **keys)
    own = load_base(base)
    read_adapter(tmp_path, own).attach_to(own.model)
    assert difference(wanted, logits(own.model.eval())) < TOLERANCE


def test_wrong_folders_of_mlx_lm_are_one_message(tmp_path):
    base = write_base(tmp_path / "base")
    model, _ = load(str(base))
    theirs_on_disk(tmp_path, model, keys=["self_attn.q_proj"])
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"] |= {"alpha": 1, "bias": "all", "rank": 5}
    config["fine_tune_type"] = "dora"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path, load_base(base))
    for part in (
        "it adapts 16 blocks, the model has 2",
        "option 'bias' is not known",
        "its scale is 3, which its alpha makes 0.2",
        "model.layers.0-1.self_attn.q_proj.lora_a is 64x4 and has to be 64x5",
        "model.layers.0-1.self_attn.q_proj.magnitude is missing",
    ):
        assert part in str(error.value), part
    file.write_text("{")
    with pytest.raises(UserError, match="is not an adapter's configuration"):
        load_adapter(tmp_path, load_base(base).model)
