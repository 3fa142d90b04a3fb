"""The table of a comparison: a row for every contender, mean and spread over seeds."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_mlx.analysis.pictures import save_figure
from dora_mlx.comparing.comparison import Comparison, RunResult


@dataclass(frozen=True)
class Spread:
    """Mean of ``count`` values and their standard deviation (n - 1; ``None`` for one value)."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """That of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def __str__(self) -> str:
        return self.rounded(4)

    def rounded(self, digits: int, sign: str = "") -> str:
        """Both with ``digits`` decimals; with ``sign="+"`` a positive mean has one."""
        said = f"{self.mean:{sign}.{digits}f}"
        return said if self.deviation is None else f"{said} ± {self.deviation:.{digits}f}"


def measured(results: list[RunResult], measure: Callable[[RunResult], float | None]) -> Spread:
    """Spread of a measure over runs that all have it."""
    return Spread.of([value for result in results if (value := measure(result)) is not None])


def table(comparison: Comparison) -> list[list[str]]:
    """Cells of the table, a row for every contender and the head first."""
    general = comparison.general_before is not None
    head = [
        "method",
        "trainable",
        "learning rate",
        "steps",
        "step time",
        "tokens/s",
        "peak memory",
        "best validation loss",
        *(["general loss"] if general else []),
        "adapter",
    ]
    return [head, *(_row(comparison, name, general) for name in comparison.contenders)]


def _row(comparison: Comparison, name: str, general: bool) -> list[str]:
    results = comparison.of(name)
    first = results[0]
    share = first.trainable_parameters / first.total_parameters
    return [
        name,
        f"{first.trainable_parameters:,} ({share:.1%})",
        f"{first.learning_rate:g}",
        f"{first.steps}",
        f"{measured(results, lambda r: 1e3 * r.step_seconds).rounded(0)} ms",
        measured(results, lambda r: r.tokens_per_second).rounded(0),
        f"{max(r.peak_memory_bytes for r in results) / 1e9:.3f} GB",
        str(measured(results, lambda r: r.best_validation)),
        *([str(measured(results, lambda r: r.general_loss))] if general else []),
        f"{first.adapter_bytes / 1e6:.2f} MB",
    ]


def lines_below(comparison: Comparison) -> Iterator[str]:
    """What has to be said with the table."""
    first = comparison.of(comparison.contenders[0])
    seeds = len(first)
    start = statistics.fmean(result.validations[0][1] for result in first)
    yield f"The base model has a validation loss of {start:.4f}."
    if comparison.general_before is None:
        yield "Forgetting was not measured: give a --general-data file for it."
    else:
        yield (
            f"The base model has a general loss of {comparison.general_before:.4f}; what it rises "
            "by was forgotten."
        )
    spread = "± is the standard deviation over them." if seeds > 1 else "So there is no spread."
    yield (
        f"{seeds} seed{'s' if seeds > 1 else ''}; for each, all methods have the same split, the "
        f"same batches and the same start. {spread}"
    )
    yield from _paired(comparison)
    for name in comparison.contenders:
        own = [f"{r.learning_rate:g}: {_outcome(r)}" for r in comparison.tried(name)]
        if len(own) > 1:
            yield (
                f"The learning rate of {name} is the best of {len(own)} by validation loss on the "
                f"first seed ({', '.join(own)})."
            )
        lost = [str(r.seed) for r in comparison.of(name) if r.best_validation is None]
        if lost:
            yield (
                f"{name} diverged at that rate with seed {' and '.join(lost)}, which its losses "
                "leave out."
            )
    yield from comparison.notes


def _outcome(result: RunResult) -> str:
    loss = result.best_validation
    return "diverged" if loss is None else f"{loss:.4f}"


def _paired(comparison: Comparison) -> Iterator[str]:
    """Differences to LoRA on the same seed: they leave out what the seed does to both."""
    if "lora" not in comparison.contenders:
        return
    reference = _losses_by_seed(comparison.of("lora"))
    for name in comparison.contenders:
        pairs = [
            loss - reference[seed]
            for seed, loss in _losses_by_seed(comparison.of(name)).items()
            if name != "lora" and seed in reference
        ]
        if len(pairs) > 1:
            lower = sum(difference < 0 for difference in pairs)
            yield (
                f"{name} - lora on the same seed: {Spread.of(pairs).rounded(4, '+')}, "
                f"lower on {lower} of {len(pairs)}."
            )


def _losses_by_seed(results: list[RunResult]) -> dict[int, float]:
    return {r.seed: r.best_validation for r in results if r.best_validation is not None}


def markdown(comparison: Comparison) -> str:
    """The whole report."""
    head, *rows = table(comparison)
    lines = [f"# Comparison on {comparison.settings['config']['model']}", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", *(f"- {line}" for line in lines_below(comparison))]
    return "\n".join(lines) + "\n"


def text(comparison: Comparison) -> str:
    """The whole report for a terminal."""
    rows = table(comparison)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), "", *lines_below(comparison)])


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Validation loss by step: a thin line for each seed, a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(comparison.contenders):
        results = comparison.of(name)
        curves = [dict(result.validations) for result in results]
        for curve in curves:
            axes.plot(list(curve), list(curve.values()), color=f"C{number}", alpha=0.3, linewidth=1)
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
        axes.plot(steps, means, color=f"C{number}", linewidth=2, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("validation loss")
    axes.legend()
    save_figure(figure, path)
