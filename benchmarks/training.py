"""Whole training steps, this trainer against mlx-lm's: peak memory, time, and steadiness.

    python -m benchmarks.training [--json FILE] [--only head,blocks,steady] [--repetitions N]

The same 4-bit weights, batch of 4x512 tokens and rank for both. mlx-lm's step is the one its
trainer compiles, with its loss; on the CPU it gets our product with frozen weights, as in
``benchmarks.dora``. Ours is the step of a run as it is: loss in chunks, lean backward, clipping,
norms computed anew. Neither checkpoints its blocks.
"""

import argparse
import gc
import json
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.dora import ALPHA, RANK, adapted, dtype
from benchmarks.measure import Measurement, environment, measure, on_cpu, table

import mlx.core as mx  # isort: skip  # after OpenBLAS
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import default_loss

from dora_mlx.adapters.attach import attach
from dora_mlx.config import TrainConfig
from dora_mlx.data.batches import BatchStream
from dora_mlx.data.examples import Example
from dora_mlx.kernels.blocked_layers import use_blocked_products
from dora_mlx.training.events import EventLog
from dora_mlx.training.loop import Trainer
from dora_mlx.training.workers import Workers

ROWS, TOKENS = 4, 512
VARIANTS = ("mlx-lm LoRA", "our LoRA", "mlx-lm DoRA", "our DoRA")
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
# The vocabulary of Qwen over blocks that hardly count.
WIDE = {
    **LLAMA,
    "vocab_size": 151_936,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 448,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# The proportions of Llama 3 8B (heads of 128, a quarter of them for keys, 3.5 times the width
# inside) as far as so narrow a model can have them, and hardly a vocabulary.
DEEP = {
    **LLAMA,
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "intermediate_size": 896,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
TINY = {**DEEP, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}
STEPS, WARM_UP, TINY_TOKENS = 500, 50, 32


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="Write the measurements to this file.")
    parser.add_argument("--only", default="head,blocks,steady", help="Parts to run.")
    parser.add_argument("--repetitions", type=int, default=3, help="Timed runs of every variant.")
    arguments = parser.parse_args()
    about = environment()
    print("\n".join(f"- {name}: {value}" for name, value in about.items()), flush=True)
    results: dict[str, Any] = {}
    for part in arguments.only.split(","):
        if part == "steady":
            results[part] = steady()
            print(f"\nMemory of {STEPS} steps of a tiny model, in bytes\n\n| | bytes |\n|---|---|")
            print("\n".join(f"| {name} | {size:,} |" for name, size in results[part].items()))
        else:
            rows = steps(WIDE if part == "head" else DEEP, arguments.repetitions)
            results[part] = {name: asdict(row) for name, row in rows.items()}
            titles = {"head": "vocabulary of 151,936", "blocks": "12 blocks"}
            for reference in ("mlx-lm LoRA", "mlx-lm DoRA"):
                title = f"Step of a 4-bit llama, {titles[part]}, 4x512 tokens, to {reference}"
                print(table(title, rows, reference, peak="peak"), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": about, "results": results}, indent=2))


def steps(sizes: dict[str, Any], repetitions: int) -> dict[str, Measurement]:
    """A step of every variant; peaks include weights, adapter and optimizer."""
    jobs: dict[str, Callable[[], object]] = {}
    resident = {}
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder)) as log:
        for variant in VARIANTS:
            before = _held()
            if variant.startswith("our"):
                jobs[variant] = our_step(sizes, variant, log)
            else:
                jobs[variant] = mlx_lm_step(sizes, variant)
            resident[variant] = _held() - before
        rows = measure(jobs, repetitions)
    for variant, row in rows.items():
        row.peak_bytes += resident[variant]
    return rows


def _held() -> int:
    """Bytes of arrays that are alive."""
    gc.collect()
    return mx.get_active_memory()


def _llama(sizes: dict[str, Any]) -> nn.Module:
    mx.random.seed(1)
    model = llama.Model(llama.ModelArgs.from_dict(sizes))
    model.set_dtype(dtype())
    nn.quantize(model, 64, 4)
    model.train()
    return model


def mlx_lm_step(sizes: dict[str, Any], variant: str) -> Callable[[], object]:
    """The step of ``mlx_lm.tuner.trainer.train``, which has it inside."""
    model = adapted(_llama(sizes), variant)
    optimizer = optim.Adam(1e-4)
    optimizer.init(model.trainable_parameters())
    gradients_of = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        (loss, trained), gradients = gradients_of(model, tokens, lengths)
        optimizer.update(model, gradients)
        return loss, trained

    tokens = mx.array(_tokens(sizes, ROWS, TOKENS))
    lengths = mx.array([[0, TOKENS]] * ROWS)
    return lambda: (step(tokens, lengths), state)


def our_step(sizes: dict[str, Any], variant: str, log: EventLog) -> Callable[[], object]:
    """The step of a run, with its event."""
    trainer = _trainer(sizes, variant, log, TOKENS)

    def job() -> object:
        trainer.step()
        return trainer.model.trainable_parameters()

    return job


def _trainer(sizes: dict[str, Any], variant: str, log: EventLog, length: int) -> Trainer:
    model = _llama(sizes)
    if on_cpu():
        use_blocked_products(model)
    mx.random.seed(0)
    method: Literal["dora", "lora"] = "dora" if "DoRA" in variant else "lora"
    spec = attach(model, method, rank=RANK, alpha=ALPHA)
    config = TrainConfig(
        method=method, rank=RANK, alpha=ALPHA, batch_size=ROWS, steps=STEPS, learning_rate=1e-4,
        optimizer="adam", grad_checkpoint=False,
    )  # fmt: skip
    trained = np.arange(length + 1) > 0
    examples = [Example(row, trained) for row in _tokens(sizes, ROWS, length)]
    batches = BatchStream(examples, ROWS, seed=0)
    return Trainer(model, spec, config, batches, [], Path(), log, Workers())


def _tokens(sizes: dict[str, Any], rows: int, length: int) -> npt.NDArray[np.int32]:
    random = np.random.default_rng(0)
    return random.integers(0, sizes["vocab_size"], (rows, length + 1)).astype(np.int32)


def steady() -> dict[str, int]:
    """Bytes held after some steps and at the end, and the peaks of the steps around each."""
    sizes = {}
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder)) as log:
        trainer = _trainer(TINY, "our DoRA", log, TINY_TOKENS)
        for step in range(1, STEPS + 1):
            if step % WARM_UP == 1:
                mx.reset_peak_memory()
            trainer.step()
            if step in (WARM_UP, STEPS):
                sizes[f"held after {step}"] = _held()
                sizes[f"peak up to {step}"] = mx.get_peak_memory()
                sizes[f"process after {step}"] = _process_bytes()
    return sizes


def _process_bytes() -> int:
    """Most memory that the process had so far; macOS says it in bytes, Linux in KiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    main()
