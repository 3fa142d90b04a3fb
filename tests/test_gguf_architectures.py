"""Every architecture: a 4-bit model with an adapter, to GGUF, in the real llama.cpp."""

from dataclasses import replace

import gguf
import pytest
from exporting_models import ROWS, quantize, some_tokens
from gguf_models import CASES, adapt_model, make_model
from trained_tokenizers import nasty_texts, train

from dora_mlx.exporting.gguf import write_gguf
from dora_mlx.exporting.gguf.architectures import ARCHITECTURES
from dora_mlx.exporting.gguf.tokenization import PROBES, as_llama_cpp, check_gguf_tokens
from dora_mlx.exporting.gguf.vocabulary import read_vocabulary
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


# The kind of tokenizer that the published models of an architecture have.
TOKENIZERS = {
    "llama": "llama-bpe",
    "mistral": "mistral",
    "mixtral": "mistral",
    "qwen2": "qwen2-nfc",
    "qwen3": "qwen2-nfc",
    "gemma": "gemma",
    "phi3": "phi3",
    "smollm3": "llama-bpe",
    "olmo2": "dbrx",
    "granite": "smollm",
    "starcoder2": "smollm",
}


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """The folder of a case's tokenizer, trained when it is first asked for."""
    folders = {}

    def find(case):
        (kind,) = {kind for name, kind in TOKENIZERS.items() if case.startswith(name)}
        if kind not in folders:
            folders[kind] = train(tmp_path_factory.mktemp("tokenizer") / kind, kind)
        return folders[kind]

    return find


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_and_tokenizes_the_same(tmp_path, tokenizer_of, case):
    base = tmp_path / "base"
    model = adapt_model(quantize(make_model(base, tokenizer_of(case), **CASES[case])))
    weights = MergedWeights(model)
    files = []
    for quant in ("f32", "f16", "q8_0"):
        file = tmp_path / f"{quant}.gguf"
        write_gguf(weights, base, file, quant)
        check_gguf_tensors(file, weights, base, quant)
        files.append(file)
    tokens = some_tokens()
    reference, _ = logits_of(model, tokens)
    texts = [*PROBES, *nasty_texts(100, seed=3)]
    results = run_llama_cpp(files, tokens, texts)
    exact, half, eight = (compare_logits(reference, logits) for logits, _ in results)
    assert exact.relative_rms < (3e-3 if case.startswith(GELU) else 1e-4)
    assert exact.top1_agreement > 0.98
    assert half.kl < 1e-3
    assert eight.kl < 5e-2
    tokenizer = as_llama_cpp(base, read_vocabulary(base, ROWS))
    check_gguf_tokens(results[0][1], texts, tokenizer, files[0])


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
