"""DoRA against LoRA: single layers, whole training steps, and decoding.

    python -m benchmarks.dora [--json FILE] [--only layers,few,steps,decode] [--repetitions N]
                              [--weights 4-bit,dense] [--variants "our DoRA,our LoRA"]

Four variants on the same frozen weights: our DoRA and LoRA, and mlx-lm's. On the CPU mlx-lm's
LoRA gets our product with the frozen weight too, since MLX's quantized CPU product is some 20
times slower and would hide everything else; its DoRA dequantizes by itself. Our DoRA computes its
norms in every step. In whole steps every variant has our chunked loss and our checkpointing. Two
more are mlx-lm's LoRA with its own loss, through the logits of all positions, and our DoRA as it
is trained here, with attention and activations recomputed in the backward. Ratios are to mlx-lm's
LoRA.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.measure import Measurement, environment, measure, on_cpu, table

import mlx.core as mx  # isort: skip  # after OpenBLAS
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from dora_mlx.adapters.attach import attach
from dora_mlx.data.batches import Batch
from dora_mlx.kernels.blocked_layers import use_blocked_products
from dora_mlx.layers import hoisted_norms
from dora_mlx.training.lean_backward import lean_backward
from dora_mlx.training.loss import ChunkedLoss, plain_loss_sum
from dora_mlx.training.recomputed_blocks import recomputed_blocks

RANK, ALPHA, TOKENS = 8, 16.0, 512
# Tokens and ranks where the norm, whose cost does not fall with the tokens, shows most.
FEW_TOKENS = ((32, 8), (128, 8), (128, 64), (512, 64))
PROMPT_TOKENS, ANSWER_TOKENS = 64, 16
LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096))
WEIGHTS = {"4-bit": 4, "dense": None}
REFERENCE = "mlx-lm LoRA"
VARIANTS = (REFERENCE, "mlx-lm DoRA", "our LoRA", "our DoRA")
OWN_LOSS = "mlx-lm LoRA with its own loss"
AS_TRAINED = "our DoRA as trained"
STEP_VARIANTS = (*VARIANTS, OWN_LOSS, AS_TRAINED)
# 8 blocks, 768 wide, vocabulary 32,000: 105 million parameters.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
Rows = dict[str, Measurement]
Results = dict[str, Rows]


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="Write the measurements to this file.")
    parser.add_argument("--only", default="layers,few,steps,decode", help="Parts to run.")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="Kinds of frozen weights.")
    parser.add_argument("--variants", help="Those of whole steps besides mlx-lm's LoRA; or all.")
    parser.add_argument("--repetitions", type=int, default=3, help="Timed runs of every variant.")
    arguments = parser.parse_args()
    about = environment()
    print("\n".join(f"- {name}: {value}" for name, value in about.items()), flush=True)
    chosen = (arguments.variants or ",".join(STEP_VARIANTS)).split(",")
    parts = {
        "layers": layers,
        "few": few,
        "steps": partial(steps, variants=dict.fromkeys((REFERENCE, *chosen))),
        "decode": decode,
    }
    results: Results = {}
    for part, kind in product(arguments.only.split(","), arguments.weights.split(",")):
        for title, rows in parts[part](kind, arguments.repetitions):
            results[title] = rows
            print(table(title, rows, REFERENCE), flush=True)
    if arguments.json:
        measured = {t: {n: asdict(m) for n, m in rows.items()} for t, rows in results.items()}
        arguments.json.write_text(json.dumps({"environment": about, "results": measured}, indent=2))


def dtype() -> mx.Dtype:
    """The type that models compute in on this device."""
    return mx.float32 if on_cpu() else mx.bfloat16


def adapted(model: nn.Module, variant: str, rank: int = RANK) -> nn.Module:
    """``model`` with the adapter of ``variant`` on every linear layer of its blocks."""
    if on_cpu():
        use_blocked_products(model)
    mx.random.seed(0)
    method = "dora" if "DoRA" in variant else "lora"
    if variant.startswith("our"):
        attach(model, method, rank=rank, alpha=ALPHA)
    else:
        model.freeze()
        options = {"rank": rank, "scale": ALPHA / rank, "dropout": 0.0}
        linear_to_lora_layers(model, len(model.layers), options, use_dora=method == "dora")
    mx.eval(model.parameters())
    return model


class Block(nn.Module):
    """One linear layer."""

    def __init__(self, out: int, width: int):
        super().__init__()
        self.proj = nn.Linear(width, out, bias=False)


class OneLayer(nn.Module):
    """A model of one block with one linear layer."""

    def __init__(self, out: int, width: int, bits: int | None):
        super().__init__()
        mx.random.seed(1)
        self.layers = [Block(out, width)]
        self.set_dtype(dtype())
        if bits:
            nn.quantize(self, 64, bits)

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in] -> [..., out]``."""
        return self.layers[0].proj(x)


def layers(kind: str, repetitions: int) -> Iterator[tuple[str, Rows]]:
    """Forward and backward of one layer, the norm included."""
    for out, width in LAYERS:
        yield _one_layer(out, width, kind, TOKENS, RANK, repetitions)


def few(kind: str, repetitions: int) -> Iterator[tuple[str, Rows]]:
    """The same with few tokens and high ranks."""
    for tokens, rank in FEW_TOKENS:
        yield _one_layer(*LAYERS[0], kind, tokens, rank, repetitions)


def _one_layer(
    out: int, width: int, kind: str, tokens: int, rank: int, repetitions: int
) -> tuple[str, Rows]:
    x = mx.random.normal((1, tokens, width)).astype(dtype())
    d = mx.random.normal((1, tokens, out)).astype(dtype())
    mx.eval(x, d)
    jobs = {
        variant: _layer_job(adapted(OneLayer(out, width, WEIGHTS[kind]), variant, rank), x, d)
        for variant in VARIANTS
    }
    title = f"One layer {out} from {width}, {kind}, {tokens} tokens, rank {rank}"
    return title, measure(jobs, repetitions)


def _layer_job(model: nn.Module, x: mx.array, d: mx.array) -> Callable[[], object]:
    def objective(parameters: Any, x: mx.array) -> mx.array:
        model.update(parameters)
        return (model(x) * d).sum()

    # With the value: LoRA's gradients alone do not need the output, and MLX would skip it.
    function = mx.value_and_grad(objective, argnums=(0, 1))

    def job() -> object:
        with hoisted_norms(model):
            return function(model.trainable_parameters(), x)

    return job


def steps(
    kind: str, repetitions: int, variants: Iterable[str] = STEP_VARIANTS
) -> Iterator[tuple[str, Rows]]:
    """A whole training step: loss, gradients, Adam."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, LLAMA["vocab_size"], (4, 513)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((4, 512), np.float32))
    for checkpointing in (False, True):
        jobs = {
            variant: _step_job(variant, WEIGHTS[kind], batch, checkpointing) for variant in variants
        }
        how = "with" if checkpointing else "without"
        title = f"Step of a {kind} llama of 105M, 4x512 tokens, {how} gradient checkpointing"
        yield title, measure(jobs, repetitions)


def _llama(bits: int | None, variant: str) -> nn.Module:
    mx.random.seed(1)
    model = llama.Model(llama.ModelArgs.from_dict(LLAMA))
    model.set_dtype(dtype())
    if bits:
        nn.quantize(model, 64, bits)
    model.train()
    return adapted(model, variant)


def _step_job(
    variant: str, bits: int | None, batch: Batch, checkpointing: bool
) -> Callable[[], object]:
    model = _llama(bits, variant)
    optimizer = optim.Adam(1e-4)
    optimizer.init(model.trainable_parameters())
    loss = plain_loss_sum if variant == OWN_LOSS else ChunkedLoss()
    function = nn.value_and_grad(model, partial(loss, model))

    def job() -> object:
        with ExitStack() as stack:
            stack.enter_context(hoisted_norms(model))
            if variant == AS_TRAINED:
                stack.enter_context(lean_backward(model, checkpointing))
            elif checkpointing:
                stack.enter_context(recomputed_blocks(model, keep=False))
            value, gradients = function(batch)
        optimizer.update(model, gradients)
        return value, model.trainable_parameters(), optimizer.state

    return job


def decode(kind: str, repetitions: int) -> Iterator[tuple[str, Rows]]:
    """An answer with the adapter not merged: its prompt, and then one token at a time."""
    models = {variant: _llama(WEIGHTS[kind], variant).eval() for variant in VARIANTS}
    jobs = {variant: _prompt_job(model) for variant, model in models.items()}
    title = f"{kind} llama of 105M: a prompt of {PROMPT_TOKENS} tokens, norms included"
    yield title, measure(jobs, repetitions)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(hoisted_norms(model))
        jobs = {variant: _decode_job(model) for variant, model in models.items()}
        rows = measure(jobs, repetitions)
    for row in rows.values():
        row.tokens = ANSWER_TOKENS
    yield f"{kind} llama of 105M: {ANSWER_TOKENS} tokens of an answer, one at a time", rows


def _prompt_job(model: nn.Module) -> Callable[[], object]:
    def job() -> object:
        with hoisted_norms(model):
            return model(mx.zeros((1, PROMPT_TOKENS), mx.int32), cache=make_prompt_cache(model))

    return job


def _decode_job(model: nn.Module) -> Callable[[], object]:
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, PROMPT_TOKENS), mx.int32), cache=cache))

    def job() -> object:
        token = mx.zeros((1, 1), mx.int32)
        for _ in range(ANSWER_TOKENS):
            token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
            mx.eval(token)
        trim_prompt_cache(cache, ANSWER_TOKENS)
        return token

    return job


if __name__ == "__main__":
    main()
