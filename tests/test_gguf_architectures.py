"""Every architecture: a 4-bit model with an adapter, to GGUF, in the real llama.cpp."""

from dataclasses import replace

import gguf
import pytest
from exporting_models import quantize, some_tokens
from gguf_models import CASES, adapt_model, make_model

from dora_mlx.exporting.gguf import write_gguf
from dora_mlx.exporting.gguf.architectures import ARCHITECTURES
from dora_mlx.exporting.logits import compare_logits, logits_of
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.verify import (
    check_gguf_tensors,
    llama_cpp_is_installed,
    run_llama_cpp,
)

pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(
        not llama_cpp_is_installed(), reason="no llama_cpp; .ci/llama-cpp-wheel builds it"
    ),
]

# llama.cpp looks GELU up in a table of float16.
GELU = ("gemma", "starcoder2")


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(tmp_path, case):
    base = tmp_path / "base"
    model = adapt_model(quantize(make_model(base, **CASES[case])))
    weights = MergedWeights(model)
    files = []
    for quant in ("f32", "f16", "q8_0"):
        file = tmp_path / f"{quant}.gguf"
        write_gguf(weights, base, file, quant)
        check_gguf_tensors(file, weights, base, quant)
        files.append(file)
    tokens = some_tokens()
    reference, _ = logits_of(model, tokens)
    results = run_llama_cpp(files, tokens, [])
    exact, half, eight = (compare_logits(reference, logits) for logits, _ in results)
    assert exact.relative_rms < (3e-3 if case.startswith(GELU) else 1e-4)
    assert exact.top1_agreement > 0.98
    assert half.kl < 1e-3
    assert eight.kl < 5e-2


def without(number):
    """The architecture as it would be if nobody had known of ``number``."""

    def forget(architecture):
        kept = tuple(n for n in architecture.numbers if n.name != number)
        assert kept != architecture.numbers
        return replace(architecture, numbers=kept)

    return forget


MISTAKES = {
    "no permutation": ("granite", lambda a: replace(a, permuted=False)),
    "no norm offset": ("gemma2", lambda a: replace(a, norm_offset=0.0)),
    "no local RoPE base": ("gemma3_text", without("rope_local_base_freq")),
    "no window": ("gemma3_text", without("sliding_window")),
    "no soft cap": ("gemma2", without("attn_logit_softcapping")),
    "no multiplier": ("granite", without("residual_multiplier")),
    "no RoPE base": ("qwen3", None),
    "no long factors": ("phi3-longrope", None),
}


def test_mistakes_that_load_without_a_word_show_in_the_logits(tmp_path, monkeypatch):
    files, references = [], []
    for mistake, (case, change) in MISTAKES.items():
        base, file = tmp_path / mistake, tmp_path / f"{mistake}.gguf"
        model = make_model(base, **CASES[case])
        references.append(logits_of(model, some_tokens())[0])
        with monkeypatch.context() as patch:
            if change is not None:
                name = CASES[case]["model_type"]
                patch.setitem(ARCHITECTURES, name, change(ARCHITECTURES[name]))
            elif mistake == "no RoPE base":
                patch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda *_: None)
            else:
                patch.setattr("dora_mlx.exporting.gguf.write.rope_tensors", lambda _: {})
            write_gguf(MergedWeights(model), base, file, "f32")
        files.append(file)
    results = run_llama_cpp(files, some_tokens(), [])
    for mistake, reference, (logits, _) in zip(MISTAKES, references, results, strict=True):
        assert compare_logits(reference, logits).relative_rms > 0.02, mistake
