"""Memory of a training step: predicted from the graph, and measured.

    python -m benchmarks.plan [--json FILE] [--only WORDS] [--lean]

Every row is a synthetic model of another family, a window and a way to train it. A row runs in
one process after the other; the measured number is MLX's peak during two optimizer steps. With
--lean it is measured once as a run is and once with everything kept for the backward.
"""

import argparse
import gc
import json
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import environment

import mlx.core as mx  # isort: skip  # after OpenBLAS

import numpy as np

from dora_mlx.adapters.attach import attach
from dora_mlx.config import TrainConfig
from dora_mlx.data.batches import BatchStream
from dora_mlx.data.examples import Example
from dora_mlx.skeleton import ModelFacts, build_skeleton
from dora_mlx.training import loop
from dora_mlx.training.device_limits import memory_held_to
from dora_mlx.training.events import EventLog
from dora_mlx.training.loop import Trainer
from dora_mlx.training.memory_plan import BatchShape, predict
from dora_mlx.training.substitutes import standing_in
from dora_mlx.training.workers import Workers

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 8000,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
FOUR_BIT = {"quantization": {"group_size": 64, "bits": 4}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**FOUR_BIT, "tie_word_embeddings": False},
    "qwen3": {**FOUR_BIT, "vocab_size": 32000},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {
        **FOUR_BIT,
        "sliding_window": 64,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 32,
    },
    "phi3": {"num_key_value_heads": 8, "tie_word_embeddings": False},
    "olmo2": {},
    "mixtral": {
        **FOUR_BIT,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 512,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}


@dataclass(frozen=True)
class Row:
    """One model and one way to train it."""

    family: str
    rows: int
    width: int
    options: dict[str, Any]

    @property
    def title(self) -> str:
        """The row's name in the table."""
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.family} {self.rows}x{self.width} {options}".strip()


ROWS = [
    *(Row(name, 4, 128, {"grad_checkpoint": False}) for name in FAMILIES),
    *(Row(name, 4, 128, {"grad_checkpoint": True}) for name in FAMILIES),
    Row("llama", 2, 512, {"grad_checkpoint": False}),
    Row("llama", 2, 512, {"grad_checkpoint": True}),
    Row("qwen3", 1, 1024, {"grad_checkpoint": True}),
    Row("olmo2", 1, 1024, {"grad_checkpoint": False}),
    Row("llama", 4, 128, {"method": "lora", "rank": 64}),
    Row("llama", 4, 128, {"grad_accumulation_steps": 4}),
    Row("llama", 4, 128, {"num_layers": 2}),
    Row("llama", 2, 256, {"pack": True}),
    Row("olmo2", 4, 64, {"method": "full"}),
]


def facts_of(family: str) -> ModelFacts:
    """The synthetic model of a family."""
    return ModelFacts("hub", None, {"model_type": family, **SIZES, **FAMILIES[family]}, None)


def config_of(row: Row) -> TrainConfig:
    """The options of a row, all of them settled."""
    checkpoint = {"grad_checkpoint": row.options.get("grad_checkpoint", False)}
    settled = {"steps": 2, "learning_rate": 1e-4, "batch_size": row.rows}
    return TrainConfig(**{**row.options, **checkpoint, **settled})


def predicted(row: Row) -> dict[str, int]:
    """Bytes of the parts, by the plan."""
    shape = BatchShape(row.rows, row.width, row.rows * row.width, bool(row.options.get("pack")))
    return predict(facts_of(row.family), config_of(row), shape)


def measured(row: Row, parts: dict[str, int]) -> int:
    """MLX's peak in bytes during two optimizer steps, above what was there before."""
    config = config_of(row)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.random.seed(0)
    model = build_skeleton(facts_of(row.family))
    mx.eval(model.parameters())
    spec = attach(model, config.method, config.rank, num_layers=config.num_layers)
    length = row.width // 2 + 1 if config.pack else row.width + 1
    count = 8 * row.rows * config.grad_accumulation_steps
    example = Example(np.ones(length, np.int32), np.arange(length) > 0)
    window = row.width + 1 if config.pack else None
    batches = BatchStream([example] * count, row.rows, 0, window)
    with tempfile.TemporaryDirectory() as folder, EventLog(Path(folder)) as log:
        trainer = Trainer(model, spec, config, batches, [], Path(folder), log, Workers())
        mx.reset_peak_memory()
        planned = before + sum(parts.values())
        with memory_held_to(planned, planned - parts["in flight"]):
            trainer.run(lambda: False)
    return mx.get_peak_memory() - before


def main() -> None:
    """Predict, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="Rows whose title contains this.")
    parser.add_argument("--json", type=Path, help="Write the numbers to this file.")
    parser.add_argument(
        "--lean", action="store_true", help="What the lean backward spares in every family."
    )
    arguments = parser.parse_args()
    about = environment()
    print("\n".join(f"- {name}: {value}" for name, value in about.items()), flush=True)
    results = lean(arguments.only) if arguments.lean else plans(arguments.only)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": about, "results": results}, indent=2))


def lean(only: str) -> dict[str, Any]:
    """Peaks in bytes of every family with the lean backward and without, printed as they come."""
    print("\n| family | everything kept MB | lean MB | ratio |\n|---|---|---|---|")
    results = {}
    for family in (name for name in FAMILIES if only in name):
        row = Row(family, 2, 512, {"grad_checkpoint": False})
        parts = predicted(row)
        spared = measured(row, parts)
        with standing_in(loop, {"lean_backward": lambda *_: nullcontext()}):
            kept = measured(row, parts)
        results[family] = {"kept": kept, "lean": spared}
        ratio = spared / kept
        print(f"| {family} | {kept / 1e6:.1f} | {spared / 1e6:.1f} | {ratio:.2f} |", flush=True)
    return results


def plans(only: str) -> dict[str, Any]:
    """Peaks in bytes of every row by the plan and measured, printed as they come."""
    print("\n| step | predicted MB | measured MB | ratio |\n|---|---|---|---|")
    results = {}
    for row in (row for row in ROWS if only in row.title):
        parts = predicted(row)
        peak, found = sum(parts.values()), measured(row, parts)
        results[row.title] = {"predicted": peak, "measured": found, "parts": parts}
        print(
            f"| {row.title} | {peak / 1e6:.1f} | {found / 1e6:.1f} | {peak / found:.2f} |",
            flush=True,
        )
    return results


if __name__ == "__main__":
    main()
