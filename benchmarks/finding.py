"""The DoRA paper's finding on a small model: how magnitude and direction move together.

python -m benchmarks.finding [--seeds 3] [--steps 20] [--output runs/finding]

Trains the starter model, its weights dequantized so that all methods start from the same dense
ones, by full fine-tuning, LoRA, DoRA and DoRA of half the rank, on two tasks, at the best of the
learning rates below, and prints what `docs/does-dora-pay.md` shows: the
correlation of dM and dD (arXiv 2402.09353, section 3.2) and the validation losses. An interrupted
run goes on when it is started again.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import environment  # isort: skip  # loads OpenBLAS before MLX
import mlx.core as mx

from dora_mlx.analysis.findings import Inspection, WeightChange
from dora_mlx.analysis.inspection import correlation, inspect_run
from dora_mlx.analysis.pictures import can_draw, save_figure, scatter_by_module
from dora_mlx.comparing.comparison import Comparison, Watch, run_comparison
from dora_mlx.comparing.report import Spread, lines_below, measured
from dora_mlx.comparing.settings import Budget, Contender, Settings
from dora_mlx.config import TrainConfig
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.loading import load_base
from dora_mlx.run_folder import RunFolder

MODELS = Path(__file__).resolve().parent.parent / "models"
RANK = 8
CONTENDERS = (
    Contender("full"),
    Contender("lora"),
    Contender("dora"),
    Contender("dora", RANK // 2),
)
# Tried on the first seed; the best by validation loss is taken.
_LOW_RANK_RATES, _FULL_RATES = (4e-3, 8e-3), (5e-4, 1e-3)
# The paper looks at queries and values.
_QUERY_VALUE = ("self_attn.q_proj", "self_attn.v_proj")
_CHECKPOINTS = 4
_EXAMPLES = 390


def main() -> None:
    """Run both tasks and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=20, metavar="N")
    parser.add_argument("--output", type=Path, default=Path("runs/finding"), metavar="DIR")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tasks = {
        "pirate": MODELS / "samples" / "pirate.jsonl",
        "backwards": write_backwards(arguments.output / "backwards.jsonl"),
    }
    model = write_dense_starter(arguments.output / "starter-dense")
    found = {}
    for task, data in tasks.items():
        folder = arguments.output / task
        comparison = run_task(model, data, folder, arguments.seeds, arguments.steps)
        found[task] = comparison, inspections(comparison, folder)
    print("\n".join(report(found)))
    saved = {
        "environment": environment(),
        "tasks": {
            task: {
                "comparison": asdict(comparison),
                "correlations": {n: [correlations(i) for i in by] for n, by in seen.items()},
            }
            for task, (comparison, seen) in found.items()
        },
    }
    (arguments.output / "finding.json").write_text(json.dumps(saved, indent=1) + "\n")
    if can_draw():
        draw(found, arguments.output / "finding.png")


def write_dense_starter(path: Path) -> Path:
    """The starter model with float32 weights of the values that its quantized ones stand for."""
    if not path.exists():
        base = load_base(MODELS / "starter")
        shutil.copytree(MODELS / "starter", path)
        config = {k: v for k, v in base.config.items() if not k.startswith("quantization")}
        (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        mx.save_safetensors(
            str(path / "model.safetensors"), dict(MergedWeights(base.model).items())
        )
    return path


def write_backwards(path: Path) -> Path:
    """A task whose answers have the words of the starter's answers in reverse order."""
    sys.path.insert(0, str(MODELS))
    from starter_corpus.conversation import training_example

    rng = random.Random(7)
    answers: dict[str, str] = {}
    while len(answers) < _EXAMPLES:
        example = training_example(rng)
        answers[example.question] = " ".join(reversed(example.answer.split()))
    rows = [{"prompt": question, "completion": answer} for question, answer in answers.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_task(model: Path, data: Path, folder: Path, seeds: int, steps: int) -> Comparison:
    """Every contender at the best of its learning rates, over ``seeds``."""
    config = TrainConfig(
        model=str(model.absolute()),
        data=str(data.absolute()),
        rank=RANK,
        valid_fraction=0.05,
        warmup_steps=max(1, steps // 8),
        steps_per_eval=max(1, steps // 3),
        steps_per_save=max(1, steps // _CHECKPOINTS),
        keep_checkpoints=_CHECKPOINTS,
        max_seq_length=96,
    )
    rates = {c.name: _FULL_RATES if c.method == "full" else _LOW_RANK_RATES for c in CONTENDERS}
    settings = Settings(config, CONTENDERS, seeds, Budget(steps, "steps"), rates, None)
    watch = Watch(
        lambda name, n, total: print(f"{folder.name} {n}/{total} {name}", file=sys.stderr)
    )
    return run_comparison(settings, folder, watch)


def inspections(comparison: Comparison, folder: Path) -> dict[str, list[Inspection]]:
    """What every run did to the weights, at each of its checkpoints, by contender."""
    return {
        name: [inspect_run(RunFolder(folder / "runs" / r.run)) for r in comparison.of(name)]
        for name in comparison.contenders
    }


def correlations(inspection: Inspection) -> dict[str, float]:
    """Of dM and dD: ``q, v`` as in the paper and ``all`` weights of the blocks, over checkpoints.

    ``... at the end`` leaves out what both owe to the number of steps alone: it is over the
    weights at the last state.
    """
    found = {}
    for name, states in (("", inspection.states), (" at the end", inspection.states[-1:])):
        points = [w for state in states for w in state.weights if w.block is not None]
        found[f"q, v{name}"] = _defined([p for p in points if p.module in _QUERY_VALUE])
        found[f"all{name}"] = _defined(points)
    return found


def _defined(points: list[WeightChange]) -> float:
    value = correlation(points)
    if value is None:
        raise ValueError("a run whose weights did not change has no correlation")
    return value


def report(found: dict[str, tuple[Comparison, dict[str, list[Inspection]]]]) -> Iterator[str]:
    """The tables as Markdown."""
    for task, (comparison, seen) in found.items():
        yield f"\n### {task}\n"
        kinds = list(correlations(next(iter(seen.values()))[0]))
        yield "| method | trainable | learning rate | best validation loss | " + (
            " | ".join(f"corr. {kind}" for kind in kinds) + " |"
        )
        yield "|---|---|---|---|" + "---|" * len(kinds)
        for name in comparison.contenders:
            results = comparison.of(name)
            by_run = [correlations(inspection) for inspection in seen[name]]
            cells = [Spread.of([run[kind] for run in by_run]).rounded(2, "+") for kind in kinds]
            losses = measured(results, lambda result: result.best_validation)
            yield (
                f"| {name} | {results[0].trainable_parameters:,} | {results[0].learning_rate:g} "
                f"| {losses} | {' | '.join(cells)} |"
            )
        yield ""
        yield from (f"- {line}" for line in lines_below(comparison))


def draw(found: dict[str, tuple[Comparison, dict[str, list[Inspection]]]], path: Path) -> None:
    """The first seed's points of dM against dD, a row for every task and a column a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(CONTENDERS), squeeze=False)
    for row, (task, (_, seen)) in zip(grid, found.items(), strict=True):
        for axes, (name, by_seed) in zip(row, seen.items(), strict=True):
            scatter_by_module(axes, by_seed[0], list(_QUERY_VALUE))
            axes.set_title(f"{task}: {name}, {correlations(by_seed[0])['q, v']:+.2f}")
            axes.ticklabel_format(style="sci", scilimits=(0, 0))
    grid[0][0].legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
