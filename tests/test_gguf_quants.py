"""GGUF types: which tensor gets which, the error of each, and llama.cpp's quantizer beside them."""

import subprocess
import sys
from itertools import product

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from exporting_models import adapt, make_base, quantize, some_tokens
from gguf import GGMLQuantizationType as Type
from gguf_models import CASES, make_model

from dora_mlx.errors import UserError
from dora_mlx.exporting.formats import find_format
from dora_mlx.exporting.gguf import (
    LLAMA_QUANTIZE_QUANTS,
    QUANTS,
    WrittenTensors,
    gguf_size,
    plan_file,
    write_gguf,
)
from dora_mlx.exporting.gguf import kquants as k
from dora_mlx.exporting.gguf.vocabulary import read_vocabulary
from dora_mlx.exporting.gguf.write import notes_on
from dora_mlx.exporting.logits import VerificationError, compare_logits, logits_of
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.verify import (
    check_gguf_tensors,
    llama_cpp_is_installed,
    run_llama_cpp,
)

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
QUANTIZED = [name for name, quant in QUANTS.items() if quant.type not in (0, 1, 30)]
real_llama_cpp = pytest.mark.skipif(not llama_cpp_is_installed(), reason="no llama_cpp")


def read(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def test_the_command_offers_what_can_be_written():
    names = [quant.name for quant in find_format("gguf").quants]
    assert names == [*QUANTS, *LLAMA_QUANTIZE_QUANTS]


def error(values, packed, kind):
    return np.sqrt(np.square(gguf.dequantize(packed, kind) - values).mean() / values.var())


@pytest.mark.parametrize(
    ("pack", "kind", "size", "limit"),
    [
        (k.pack_q4_k, Type.Q4_K, 144, 0.075),
        (k.pack_q5_k, Type.Q5_K, 176, 0.038),
        (k.pack_q6_k, Type.Q6_K, 210, 0.019),
    ],
)
def test_k_quants(pack, kind, size, limit):
    values = np.random.default_rng(0).standard_normal((500, 256)).astype(np.float32)
    packed = pack(mx.array(values))
    assert packed.shape == (500, size)
    assert packed.dtype == np.uint8
    assert error(values, packed, kind) < limit
    # Blocks and groups of zeros, of one value, and of one sign.
    odd = values.copy()
    odd[0], odd[1, :64], odd[2], odd[3], odd[4] = 0, 0, 1, -0.3, np.abs(odd[4])
    back = gguf.dequantize(pack(mx.array(odd)), kind)
    assert np.isfinite(back).all()
    assert not back[0].any()
    np.testing.assert_allclose(back[2:4], odd[2:4], rtol=0.02)


@pytest.mark.parametrize("quant", QUANTIZED)
def test_every_type_is_written_checked_and_read_back(tmp_path, quant):
    base = tmp_path / "base"
    weights = MergedWeights(adapt(make_base(base, **{**WIDE, "num_hidden_layers": 2})))
    file = tmp_path / "m.gguf"
    write_gguf(weights, base, file, quant)
    check_gguf_tensors(file, weights, base, quant)
    assert abs(gguf_size(weights, base, quant) - file.stat().st_size) < 2e6
    plan = plan_file(base, weights, quant)
    for name, tensor in WrittenTensors(file, plan).items():
        assert mx.abs(tensor - weights[name]).max() < 0.3 * mx.abs(weights[name]).max()
    data = bytearray(file.read_bytes())
    # The last tensor written: halve it by the high byte of its scales.
    data[-400:] = bytes(400)
    file.write_bytes(data)
    with pytest.raises(VerificationError):
        check_gguf_tensors(file, weights, base, quant)


QUANTIZE = """
import ctypes, sys, llama_cpp
source, *jobs = sys.argv[1:]
for target, number in zip(jobs[::2], jobs[1::2]):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = int(number), 1
    done = llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters)
    assert done == 0, target
"""


@pytest.mark.llama_cpp
@real_llama_cpp
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 64}),
        ("phi3", {}),
        ("mixtral", {"num_local_experts": 8}),
        ("qwen2_moe", {"moe_intermediate_size": 256}),
        ("granite", {"hidden_size": 192, "tie_word_embeddings": True}),
    ],
)
def test_the_same_types_and_no_more_error_than_llama_cpp(tmp_path, case, changes):
    base = tmp_path / "base"
    model = make_model(base, **{**CASES[case], **WIDE, **changes})
    weights = MergedWeights(model)
    write_gguf(weights, base, tmp_path / "f32.gguf", "f32")
    quants = ("q4_k_m", "q5_k_m", "q6_k", "q5_0", "q8_0") if case == "llama" else ("q4_k_m",)
    jobs = []
    for quant in quants:
        write_gguf(weights, base, tmp_path / f"{quant}.gguf", quant)
        jobs += [str(tmp_path / f"{quant}-theirs.gguf"), str(int(QUANTS[quant].file_type))]
    command = [sys.executable, "-c", QUANTIZE, str(tmp_path / "f32.gguf"), *jobs]
    subprocess.run(command, check=True, capture_output=True)
    exact = read(tmp_path / "f32.gguf")
    for quant in quants:
        ours, theirs = read(tmp_path / f"{quant}.gguf"), read(tmp_path / f"{quant}-theirs.gguf")
        types = [{n: t.tensor_type.name for n, t in some.items()} for some in (ours, theirs)]
        assert types[0] == types[1], quant
        for kind in {tensor.tensor_type for tensor in ours.values()} - {Type.F32}:
            sums = [0.0, 0.0]
            for (index, some), (name, tensor) in product(enumerate((ours, theirs)), exact.items()):
                if some[name].tensor_type == kind:
                    back = gguf.dequantize(some[name].data, kind)
                    sums[index] += np.square(back - tensor.data, dtype=np.float64).sum()
            assert sums[0] <= 1.02**2 * sums[1], (quant, kind)


@pytest.mark.llama_cpp
@real_llama_cpp
def test_llama_cpp_runs_every_type(tmp_path):
    base = tmp_path / "base"
    model = adapt(quantize(make_base(base, **{**WIDE, "num_hidden_layers": 2})))
    files = [tmp_path / f"{quant}.gguf" for quant in QUANTIZED]
    for file, quant in zip(files, QUANTIZED, strict=True):
        write_gguf(MergedWeights(model), base, file, quant)
    reference, _ = logits_of(model, some_tokens())
    results = run_llama_cpp(files, some_tokens(), [])
    kl = {
        quant: compare_logits(reference, logits).kl
        for quant, (logits, _) in zip(QUANTIZED, results, strict=True)
    }
    assert kl["q8_0"] < 5e-3
    assert kl["q8_0"] < kl["q6_k"] < kl["q5_k_m"] < kl["q4_k_m"] < kl["q4_0"] < 0.5


@pytest.mark.parametrize(("group", "dtype"), [(32, mx.float32), (64, mx.bfloat16)])
def test_an_untouched_4_bit_weight_goes_over_to_q4_1(tmp_path, group, dtype):
    base = tmp_path / "base"
    model = make_base(base, head_dim=32, intermediate_size=128)
    model.set_dtype(dtype)
    nn.quantize(model, group_size=group, bits=4)
    adapt(model)
    weights = MergedWeights(model)
    file = tmp_path / "m.gguf"
    write_gguf(weights, base, file, "q4_1")
    plan = plan_file(base, weights, "q4_1")
    assert "blk.0.attn_k.weight" in plan.taken_over
    assert "token_embd.weight" in plan.taken_over
    assert not {"blk.0.attn_q.weight", "blk.0.ffn_down.weight"} & plan.taken_over
    names = {tensor.source: tensor.name for tensor in plan.tensors}
    for source, tensor in WrittenTensors(file, plan).items():
        if names[source] in plan.taken_over:
            # bfloat16 scales are exact in float16; float32 ones lose half of 2^-11.
            limit = 1e-7 if dtype == mx.bfloat16 else 2e-3
            assert mx.abs(tensor - weights[source]).max() <= limit, source
    [note] = notes_on(weights, plan, read_vocabulary(base, plan.rows()))
    said = "without rounding" if dtype == mx.bfloat16 else "rounded to float16"
    assert said in note
    check_gguf_tensors(file, weights, base, "q4_1")


def test_other_types_need_llama_quantize(tmp_path, monkeypatch):
    base, tools = tmp_path / "base", tmp_path / "tools"
    weights = MergedWeights(make_base(base))
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(UserError, match="llama-quantize, which is not on the PATH"):
        write_gguf(weights, base, tmp_path / "m.gguf", "q3_k_m")
    program = tools / "llama-quantize"
    # Stands in for the program: shows that it gets a complete f16 file and the name of the type.
    program.write_text(f'#!{sys.executable}\nimport shutil, sys\nassert sys.argv[3] == "Q3_K_M"\n'
                       "shutil.copyfile(sys.argv[1], sys.argv[2])\n")  # fmt: skip
    program.chmod(0o755)
    write_gguf(weights, base, tmp_path / "m.gguf", "q3_k_m")
    check_gguf_tensors(tmp_path / "m.gguf", weights, base, "q3_k_m")
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('out of luck')\n")
    with pytest.raises(UserError, match=r"could not make q3_k_m \(1\): out of luck"):
        write_gguf(weights, base, tmp_path / "n.gguf", "q3_k_m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m.gguf", "tools"]
