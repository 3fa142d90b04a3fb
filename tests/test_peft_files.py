"""PEFT loads what is written here and the other way round, with the same logits in torch."""

import json

import mlx.core as mx
import numpy as np
import pytest
from adapter_models import (
    arrays_of,
    attach_moved,
    difference,
    logits,
    write_base,
    write_dequantized,
)
from exporting_models import some_tokens
from mlx_lm.utils import _get_classes
from safetensors.numpy import load_file, save_file

from dora_mlx.adapters.attach import AdapterSpec, adaptable_layers
from dora_mlx.adapters.peft import SAME_NAMES, write_peft
from dora_mlx.adapters.reading import read_adapter
from dora_mlx.adapters.stored import StoredAdapter
from dora_mlx.errors import UserError
from dora_mlx.loading import load_base

peft = pytest.importorskip("peft", reason="needs the extra `parity`: pip install '.[parity]'")
torch = pytest.importorskip("torch", reason="needs the extra `parity`: pip install '.[parity]'")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "untied", tie_word_embeddings=False)


def torch_base(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(np.array(some_tokens(2, 24)).astype(np.int64))).logits.numpy()


OURS = {
    "dora": {"method": "dora"},
    "lora": {"method": "lora"},
    "rslora": {"method": "dora", "rslora": True, "rank": 6},
    "last block, other ranks": {
        "method": "dora",
        "num_layers": 1,
        "target_modules": ("q_proj", "mlp.*"),
        "rank_overrides": ("q_proj=2", "mlp.*=3"),
    },
    "embedding and output": {
        "method": "dora",
        "target_modules": ("embed_tokens", "lm_head", "v_proj"),
        "num_layers": 1,
        "rank_overrides": ("lm_head=5",),
    },
    "lora of the embedding": {"method": "lora", "target_modules": ("embed_tokens",)},
}


@pytest.mark.parametrize("name", OURS)
def test_peft_loads_ours_and_we_load_what_it_saves(untied, tmp_path, name):
    base = load_base(untied)
    before = logits(base.model)
    spec = attach_moved(base.model, **OURS[name])
    wanted = logits(base.model)
    assert difference(wanted, before) > 0.05
    write_peft(tmp_path, StoredAdapter(spec, arrays_of(base.model)), load_base(untied))
    model = peft.PeftModel.from_pretrained(torch_base(untied), tmp_path)
    assert difference(wanted, torch_logits(model)) < TOLERANCE

    model.save_pretrained(tmp_path / "theirs")
    again = load_base(untied)
    read_adapter(tmp_path / "theirs", again).attach_to(again.model)
    assert difference(wanted, logits(again.model)) < 1e-6


THEIRS = {
    "pattern": {"target_modules": r".*\.0\..*(q_proj|down_proj)", "use_dora": True},
    "all linear": {"target_modules": "all-linear", "use_rslora": True},
    "layers and patterns": {
        "target_modules": ["q_proj", "v_proj", "mlp.up_proj"],
        "layers_to_transform": [0],
        "rank_pattern": {"v_proj": 2, r"model.layers.0.mlp.*": 3},
        "alpha_pattern": {"q_proj": 5},
        "use_dora": True,
    },
    "excluded": {"target_modules": ["k_proj", "o_proj"], "exclude_modules": ["1.self_attn.k_proj"]},
}


def moved_peft(model, **options):
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", THEIRS)
def test_adapters_made_by_peft_load_here(untied, tmp_path, name):
    theirs = moved_peft(torch_base(untied), **THEIRS[name])
    theirs.save_pretrained(tmp_path)
    base = load_base(untied)
    before = logits(base.model)
    read_adapter(tmp_path, base).attach_to(base.model)
    ours = logits(base.model.eval())
    assert difference(ours, before) > 0.01
    assert difference(ours, torch_logits(theirs)) < TOLERANCE


def test_adapter_of_a_quantized_base_on_its_dequantized_weights(tmp_path):
    quantized = load_base(write_base(tmp_path / "q4", bits=4))
    dense = write_dequantized(quantized, tmp_path / "dense")
    spec = attach_moved(quantized.model, "dora")
    (tmp_path / "peft").mkdir()
    adapter = StoredAdapter(spec, arrays_of(quantized.model))
    write_peft(tmp_path / "peft", adapter, load_base(tmp_path / "q4"))
    model = peft.PeftModel.from_pretrained(torch_base(dense), tmp_path / "peft")
    assert difference(logits(quantized.model), torch_logits(model)) < TOLERANCE


def test_uniform_adapters_are_described_shortly(untied, tmp_path):
    moved_peft(torch_base(untied), target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    spec = read_adapter(tmp_path, load_base(untied)).spec
    assert spec == AdapterSpec("lora", 4, 6.0, 0.0, ("self_attn.q_proj", "self_attn.v_proj"), 2)


def change(folder, arrays=None, **options):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    if arrays:
        weights = folder / "adapter_model.safetensors"
        content = load_file(weights)
        arrays(content)
        save_file(content, weights)


def test_everything_wrong_with_an_adapter_is_in_one_message(untied, tmp_path):
    moved_peft(torch_base(untied), target_modules=["q_proj"]).save_pretrained(tmp_path)
    block = "base_model.model.model.layers.1.self_attn"

    def damage(arrays):
        arrays.pop(f"{block}.q_proj.lora_A.weight")
        arrays[f"{block}.q_proj.lora_B.weight"] = np.zeros((3, 4), np.float32)
        arrays[f"{block}.z_proj.lora_B.weight"] = np.zeros((3, 4), np.float32)
        arrays["base_model.model.lm_head.weight"] = np.zeros(2, np.float32)

    change(tmp_path, damage, lora_bias=True, init_lora_weights="pissa", use_dora=True)
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path, load_base(untied))
    lines = str(error.value).splitlines()
    for expected in (
        "lora_bias = true cannot be used",
        "init_lora_weights 'pissa' changed the base",
        "base_model.model.lm_head.weight is no array",
        "model.layers.1.self_attn.q_proj.lora_a is missing",
        "model.layers.0-1.self_attn.q_proj.magnitude is missing",
        "model.layers.1.self_attn.q_proj.lora_b is 4x3 and has to be 4x64",
        "model.layers.1.self_attn.z_proj.lora_b has no place in the model",
    ):
        assert sum(expected in line for line in lines) == 1, expected
    assert len(lines) == 8


def test_adapter_of_another_model_is_not_a_silent_no_op(untied, tmp_path):
    other = write_base(tmp_path / "other", hidden_size=32, num_hidden_layers=3)
    theirs = moved_peft(torch_base(other), target_modules="all-linear")
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path / "adapter", load_base(untied))
    message = str(error.value)
    assert "model.layers.2.mlp.down_proj.lora_b has no place in the model" in message
    assert "model.layers.0-1.self_attn.q_proj.lora_a is 32x4 and has to be 64x4" in message
    # One line for every kind of layer and array, and none for every block.
    assert len(message.splitlines()) < 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LOHA"}, "of type 'LOHA'"),
        ({"r": "x"}, "is not an adapter's configuration"),
        ({"target_modules": "("}, "is not an adapter's configuration"),
    ],
)
def test_what_is_no_lora_is_refused(untied, tmp_path, options, message):
    moved_peft(torch_base(untied), target_modules=["q_proj"]).save_pretrained(tmp_path)
    change(tmp_path, **options)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path, load_base(untied))


def test_what_peft_cannot_say_is_refused_before_anything_is_written(untied, tmp_path):
    tied = load_base(write_base(tmp_path / "tied"))
    arrays = {"a": mx.zeros(1)}
    embedding = AdapterSpec("dora", 4, 8.0, 0.0, ("model.embed_tokens",), 2)
    (tmp_path / "out").mkdir()
    for spec, base, reason in (
        (embedding, tied, "also the output layer"),
        (AdapterSpec("full", 1, 1.0, 0.0, (), 2), tied, "All weights were trained"),
    ):
        with pytest.raises(UserError, match=reason):
            write_peft(tmp_path / "out", StoredAdapter(spec, arrays), base)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "adapter_model.bin").touch()
    with pytest.raises(UserError, match="can run code"):
        read_adapter(tmp_path / "bin", tied)


@pytest.mark.parametrize("model_type", SAME_NAMES)
def test_layers_have_the_same_names_in_transformers(model_type):
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 40}
    config = transformers.AutoConfig.for_model(model_type, **options, **heads, **special)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    values = config.to_dict() | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model_class, arguments = _get_classes(values)
    ours = model_class(arguments.from_dict(values))
    adaptable = {path for path, _ in adaptable_layers(ours)}
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    known = {path for path, module in theirs.named_modules() if isinstance(module, kinds)}
    # Transformers has an output layer also where it is the embedding.
    assert adaptable | {"lm_head"} == known | {"lm_head"}
