"""The mlx format: quantized as the base or otherwise, in bounded memory, loaded by mlx-lm."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from exporting_models import STARTER, make_base, some_tokens
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model, save_config

from dora_mlx.adapters.attach import attach
from dora_mlx.errors import UserError
from dora_mlx.exporting.formats import MLX_PACKINGS
from dora_mlx.exporting.logits import VerificationError
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.mlx_folder import MlxWriter
from dora_mlx.exporting.reload import logits_of_folder
from dora_mlx.exporting.writer import ExportSource
from dora_mlx.loading import load_base

MODES = {
    **{f"{bits}bit": (32, bits, "affine") for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": (32, 4, "mxfp4"),
    "mxfp8": (32, 8, "mxfp8"),
    "nvfp4": (16, 4, "nvfp4"),
}


def make_folder(folder, packing=None, special=None, **options):
    """A base model on the disk in bfloat16, quantized by ``packing``, one layer by ``special``."""
    model = make_base(folder, hidden_size=64, **options)
    model.set_dtype(mx.bfloat16)
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    if packing is not None:
        group, bits, mode = packing
        own = {"group_size": 64, "bits": 8, "mode": "affine"}
        special_name = "model.layers.0.mlp.up_proj" if special else ""
        nn.quantize(
            model,
            group,
            bits,
            mode=mode,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized") and (own if path == special_name else True)
            ),
        )
        config["quantization"] = {"group_size": group, "bits": bits, "mode": mode}
        if special:
            config["quantization"][special_name] = own
    save_config(config, folder / "config.json")
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        tree_flatten(model.parameters(), destination={}),
        {"format": "mlx"},
    )
    return folder


def trained_on(base, method="dora", **options):
    loaded = load_base(base)
    attach(loaded.model, method, rank=4, num_layers=1, **options)
    moved = [
        (name, value + 0.05 * mx.random.normal(value.shape))
        for name, value in tree_flatten(loaded.model.trainable_parameters())
        if "lora_b" in name or "magnitude" in name or method == "full"
    ]
    loaded.model.update(tree_unflatten(moved))
    loaded.model.eval()
    return ExportSource(load_base(base, lazy=True), MergedWeights(loaded.model))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_comes_back_in_mlx_lm_and_untouched_layers_keep_their_bits(tmp_path, mode):
    base = make_folder(tmp_path / "base", MODES[mode])
    source = trained_on(base)
    MlxWriter().write(source, tmp_path / "out", "base")
    assert MlxWriter().read(source, tmp_path / "out", "base", some_tokens()).program == "mlx-lm"
    before = mx.load(str(base / "model.safetensors"))
    after = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert after.keys() == before.keys()
    for name, array in after.items():
        assert (array.dtype, array.shape) == (before[name].dtype, before[name].shape)
        touched = "layers.1." in name and "proj" in name
        assert mx.array_equal(array, before[name]).item() != touched, name


def test_layers_with_a_quantization_of_their_own_keep_it(tmp_path):
    base = make_folder(tmp_path / "base", MODES["4bit"], special=True)
    source = trained_on(base)
    MlxWriter().write(source, tmp_path / "out", "base")
    model, _ = load_model(tmp_path / "out")
    assert model.layers[0].mlp.up_proj.bits == 8
    assert model.layers[0].mlp.up_proj.group_size == 64
    assert model.layers[1].mlp.up_proj.bits == 4


@pytest.mark.parametrize("quant", ["none", "8bit", "3bit-g32", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("packing", [None, (32, 4, "affine")])
def test_a_chosen_quantization_is_the_one_that_is_loaded(tmp_path, quant, packing):
    source = trained_on(make_folder(tmp_path / "base", packing))
    MlxWriter().write(source, tmp_path / "out", quant)
    reading = MlxWriter().read(source, tmp_path / "out", quant, some_tokens())
    assert (reading.precision is None) == (quant != "none")
    model, config = load_model(tmp_path / "out")
    layer = model.layers[0].self_attn.q_proj
    if quant == "none":
        assert layer.weight.dtype == mx.bfloat16
        assert "quantization" not in config
    else:
        assert (layer.group_size, layer.bits, layer.mode) == MLX_PACKINGS[quant]
    types = {array.dtype for _, array in tree_flatten(model.parameters())}
    assert mx.float32 not in types


@pytest.mark.parametrize("method", ["lora", "full"])
def test_other_methods_are_quantized_as_the_base_was(tmp_path, method):
    source = trained_on(make_folder(tmp_path / "base", MODES["8bit"]), method)
    MlxWriter().write(source, tmp_path / "out", "base")
    MlxWriter().read(source, tmp_path / "out", "base", some_tokens())
    model, _ = load_model(tmp_path / "out")
    assert model.layers[1].self_attn.q_proj.bits == 8


def test_an_adapted_embedding_is_merged(tmp_path):
    source = trained_on(make_folder(tmp_path / "base"), target_modules=("embed_tokens",))
    MlxWriter().write(source, tmp_path / "out", "none")
    MlxWriter().read(source, tmp_path / "out", "none", some_tokens())


def test_a_base_in_float32_becomes_bfloat16_unless_asked_for(tmp_path):
    # The starter is stored in float32; nobody wants a model of twice the size by accident.
    model = load_base(STARTER).model
    source = ExportSource(load_base(STARTER, lazy=True), MergedWeights(model))
    sizes = {quant: MlxWriter().size(source, quant) for quant in ("base", "none")}
    parameters = sum(a.size for _, a in tree_flatten(load_base(STARTER).model.parameters()))
    assert sizes["base"] == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert sizes["none"] < 2.1 * 4_060_000 + parameters


def test_groups_that_fit_no_layer_are_refused(tmp_path):
    source = trained_on(make_folder(tmp_path / "base", num_hidden_layers=1))
    with pytest.raises(UserError, match="128, the size of a group of --quant 4bit-g128, divides"):
        MlxWriter().refuse(source, "4bit-g128")


def test_a_lost_adapter_is_noticed(tmp_path):
    source = trained_on(make_folder(tmp_path / "base", MODES["8bit"]))
    MlxWriter().write(source, tmp_path / "out", "8bit")
    other = ExportSource(source.base, MergedWeights(load_base(tmp_path / "base").model))
    with pytest.raises(VerificationError, match="does not hold the merged weights"):
        MlxWriter().read(other, tmp_path / "out", "8bit", some_tokens())


def test_memory_stays_below_twice_the_largest_layer(tmp_path):
    # One layer holds most of the model; in float32 it is 32 MB, and it is never whole in memory.
    base = make_folder(
        tmp_path / "base", (32, 4, "affine"), num_hidden_layers=1, intermediate_size=131072
    )
    source = trained_on(base)
    largest = 4 * 64 * 131072
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    MlxWriter().write(source, tmp_path / "out", "none")
    assert mx.get_peak_memory() - before < 2 * largest


def test_what_was_exported_is_run_a_block_at_a_time(tmp_path):
    # A 16-bit export is several times the model it is compared with, and both are in memory.
    base = make_folder(tmp_path / "base", num_hidden_layers=8, intermediate_size=16384)
    block = 3 * 4 * 64 * 16384
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    logits_of_folder(base, some_tokens())
    assert mx.get_peak_memory() - before < 4 * block, mx.get_peak_memory() - before
