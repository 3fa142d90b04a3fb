"""The RoPE base that a loaded model really uses.

The same tiny models get configurations in the form of Transformers 4 (``rope_theta``) and of
Transformers 5 (``rope_parameters``).
"""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from model_folders import ARCHITECTURES, BASE, COMMON, build, refusal, save, write_config

from dora_mlx.loading import load_base


def transformers_5(config, **parameters):
    """The same configuration with its RoPE base and scaling where Transformers 5 writes them."""
    config = dict(config)
    base = config.pop("rope_theta")
    parameters = parameters or {"rope_type": "default"}
    return {**config, "rope_parameters": {"rope_theta": base, **parameters}}


def rope_bases(model):
    return {module.base for _, module in model.named_modules() if isinstance(module, nn.RoPE)}


def logits(model):
    return model(mx.arange(40)[None] % 64)


def same_logits(one, other):
    return mx.allclose(logits(one), logits(other), rtol=0, atol=1e-5).item()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_both_forms_give_the_base_of_the_file(model_type, model_folder):
    model, config = build(model_type, rope_theta=BASE)
    for form in (config, transformers_5(config)):
        save(model_folder, model, form)
        loaded = load_base(model_folder)
        assert rope_bases(loaded.model) == {BASE}
        assert loaded.config["rope_theta"] == BASE
        assert same_logits(loaded.model, model)


@pytest.mark.parametrize("model_type", [*ARCHITECTURES, "olmo2", "gemma3_text"])
def test_configurations_that_transformers_writes(model_type, model_folder):
    from transformers import AutoConfig

    own = GEMMA3 if model_type == "gemma3_text" else {}
    model, config = build(model_type, rope_theta=BASE, **own)
    fields = {name: value for name, value in config.items() if name != "model_type"}
    written = AutoConfig.for_model(model_type, **fields)
    written.save_pretrained(model_folder)
    assert "rope_theta" not in json.loads((model_folder / "config.json").read_text())
    mx.save_safetensors(
        str(model_folder / "model.safetensors"), dict(tree_flatten(model.parameters()))
    )
    loaded = load_base(model_folder).model
    assert BASE in rope_bases(loaded)
    assert same_logits(loaded, model)


def test_the_base_matters_in_these_tests(model_folder):
    # Guards the comparison above: a wrong base has to show in the logits.
    model, config = build("llama", rope_theta=BASE)
    save(model_folder, model, {**config, "rope_theta": 10_000.0})
    assert not same_logits(load_base(model_folder).model, model)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_no_base_is_refused(model_type, model_folder):
    model, config = build(model_type, rope_theta=BASE)
    del config["rope_theta"]
    save(model_folder, model, config)
    assert "gives no RoPE base" in refusal(model_folder)
    write_config(model_folder, {**config, "rope_parameters": {"rope_type": "default"}})
    assert "gives no RoPE base" in refusal(model_folder)


def test_contradicting_forms_are_refused(model_folder):
    model, config = build("llama", rope_theta=BASE)
    save(model_folder, model, {**transformers_5(config), "rope_theta": 10_000.0})
    assert "remove the wrong one" in refusal(model_folder)


def test_scaling_is_read_from_the_new_form(model_folder):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model, config = build("llama", rope_theta=BASE, rope_scaling=scaling)
    plain, _ = build("llama", rope_theta=BASE)
    assert not same_logits(model, plain)
    del config["rope_scaling"]
    save(model_folder, model, transformers_5(config, **scaling))
    assert same_logits(load_base(model_folder).model, model)


def test_phi_long_rope_and_partial_rotation(model_folder):
    # Phi-4-mini: 3 of 4 dimensions rotate; mlx-lm insists on `type`, Transformers 5 writes
    # `rope_type`.
    scaling = {"short_factor": [1.0] * 3, "long_factor": [2.0, 3.0, 4.0]}
    fields = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32}
    old = {"rope_theta": BASE, "rope_scaling": {"type": "longrope", **scaling}, **fields}
    model, config = build("phi3", **old)
    for name in ("rope_scaling", *fields):
        del config[name]
    save(model_folder, model, transformers_5(config, rope_type="longrope", **scaling, **fields))
    loaded = load_base(model_folder)
    assert same_logits(loaded.model, model)
    assert {"partial_rotary_factor", "rope_scaling"} <= loaded.config.keys()


GEMMA3 = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "tie_word_embeddings": True,
}


def gemma3_forms(config):
    """Transformers 5 gives Gemma 3 one set of RoPE parameters per kind of layer."""
    new = {name: value for name, value in config.items() if not name.startswith("rope")}
    new["rope_parameters"] = {
        "full_attention": {
            "rope_theta": config["rope_theta"],
            "rope_type": "linear",
            "factor": 8.0,
        },
        "sliding_attention": {
            "rope_theta": config["rope_local_base_freq"],
            "rope_type": "default",
        },
    }
    return config, new


def gemma3():
    return build(
        "gemma3_text",
        rope_theta=BASE,
        rope_local_base_freq=20_000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        **GEMMA3,
    )


def test_gemma3_has_two_bases(model_folder):
    model, config = gemma3()
    for form in gemma3_forms(config):
        save(model_folder, model, form)
        loaded = load_base(model_folder)
        assert rope_bases(loaded.model) == {BASE, 20_000.0}
        assert same_logits(loaded.model, model)
        assert loaded.vocabulary == COMMON["vocab_size"]


def test_gemma3_without_a_base_is_a_gemma3(model_folder):
    # The published 4B and 12B files leave it out; mlx-lm's default is the family's one value.
    model, config = build("gemma3_text", **GEMMA3)
    save(model_folder, model, config)
    assert rope_bases(load_base(model_folder).model) == {1_000_000.0, 10_000.0}


def test_bases_inside_a_multimodal_configuration(model_folder):
    model, text = gemma3()
    for form in gemma3_forms(text):
        outer = {"model_type": "gemma3", "vocab_size": 64, "text_config": form}
        weights = {
            f"language_model.{name}": value for name, value in tree_flatten(model.parameters())
        }
        mx.save_safetensors(str(model_folder / "model.safetensors"), weights)
        write_config(model_folder, outer)
        loaded = load_base(model_folder).model
        assert rope_bases(loaded) == {BASE, 20_000.0}
        assert same_logits(loaded, model)


def test_two_bases_in_an_architecture_with_one_are_refused(model_folder):
    model, config = build("llama", rope_theta=BASE)
    kinds = {"full_attention": BASE, "sliding_attention": 10_000.0}
    save(
        model_folder,
        model,
        transformers_5(config)
        | {"rope_parameters": {kind: {"rope_theta": base} for kind, base in kinds.items()}},
    )
    assert "cannot express" in refusal(model_folder)


def test_equal_bases_per_layer_type_are_accepted(model_folder):
    model, config = build("llama", rope_theta=BASE)
    kinds = {kind: {"rope_theta": BASE} for kind in ("full_attention", "sliding_attention")}
    save(model_folder, model, transformers_5(config) | {"rope_parameters": kinds})
    assert rope_bases(load_base(model_folder).model) == {BASE}


def test_experts_renamed_by_transformers_5(model_folder):
    model, config = build("qwen3_moe", rope_theta=BASE)
    config["num_local_experts"] = config.pop("num_experts")
    save(model_folder, model, config)
    loaded = load_base(model_folder)
    assert loaded.config["num_experts"] == 4
    assert same_logits(loaded.model, model)
