"""The pictures of an inspection. They need matplotlib, which is the extra ``plots``."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dora_mlx.analysis.findings import Inspection
from dora_mlx.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOW_TO_DRAW = "No pictures were drawn: they need matplotlib (pip install 'dora-mlx[plots]')."

_DOTS_PER_INCH = 150


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_heat_map(inspection: Inspection, path: Path) -> None:
    """A grid of blocks by modules for dM and one for dD, at the best adapter."""
    from matplotlib.figure import Figure

    weights = [(w.block, w) for w in inspection.weights if w.block is not None]
    blocks = sorted({block for block, _ in weights})
    modules = list(dict.fromkeys(weight.module for _, weight in weights))
    figure = Figure(
        figsize=(3 + 1.1 * len(modules), 2.2 + 0.22 * len(blocks)), layout="constrained"
    )
    measures = {
        "magnitude_change": "magnitude change dM",
        "direction_change": "direction change dD",
    }
    for axes, (measure, title) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        grid = np.full((len(blocks), len(modules)), np.nan)
        for block, weight in weights:
            place = blocks.index(block), modules.index(weight.module)
            grid[place] = getattr(weight, measure)
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        axes.set_title(title)
        axes.set_xticks(range(len(modules)), modules, rotation=45, ha="right")
        axes.set_yticks(*_some(blocks))
        axes.set_ylabel("block")
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"{inspection.run} ({inspection.method})")
    save_figure(figure, path)


def draw_scatter(inspection: Inspection, path: Path) -> None:
    """A point of dM against dD for every weight at every state, and the line of least squares."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    points = [weight for state in inspection.states for weight in state.weights]
    scatter_by_module(axes, inspection, list(inspection.correlation_by_module))
    if inspection.correlation is not None:
        x = np.array([point.direction_change for point in points])
        y = np.array([point.magnitude_change for point in points])
        slope, start = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, slope * ends + start, color="black", linewidth=1)
    said = "" if inspection.correlation is None else f", correlation {inspection.correlation:+.2f}"
    axes.set_title(f"{inspection.run} ({inspection.method}){said}")
    axes.legend(fontsize="small")
    save_figure(figure, path)


def scatter_by_module(axes: "Axes", inspection: Inspection, modules: list[str]) -> None:
    """The points of some modules, a colour for each; later states are darker."""
    for number, module in enumerate(modules):
        for age, state in enumerate(inspection.states, 1):
            own = [weight for weight in state.weights if weight.module == module]
            axes.scatter(
                [weight.direction_change for weight in own],
                [weight.magnitude_change for weight in own],
                s=14,
                color=f"C{number % 10}",
                alpha=0.25 + 0.75 * (age / len(inspection.states)),
                label=module if age == len(inspection.states) else None,
                linewidths=0,
            )
    axes.set_xlabel("direction change dD")
    axes.set_ylabel("magnitude change dM")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=_DOTS_PER_INCH)


def _some(blocks: list[int]) -> tuple[list[int], list[int]]:
    """Places and labels of up to about thirty ticks."""
    every = -(-len(blocks) // 30)
    return list(range(0, len(blocks), every)), blocks[::every]
