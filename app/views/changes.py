"""What the tab What changed draws of an inspection."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from app.views import html
from app.views.html import escape

_LARGEST = 10


def summary(found: Any) -> str:
    """The inspection in a sentence or two."""
    weights = list(found.weights)
    if not weights:
        return html.empty("Nothing was trained", "This run changed no weight.")
    most = max(weights, key=lambda weight: weight.direction_change)
    said = [
        f"{len(weights)} weights were trained with {found.method}. The direction that turned most "
        f"is {most.name}: {most.direction_change:.2g} (0 is unchanged, 1 is a right angle)."
    ]
    if found.correlation is not None:
        way = "together" if found.correlation > 0 else "against each other"
        said.append(
            f"Magnitude and direction change {way}: correlation {found.correlation:+.2f} over "
            f"{len(found.states)} saved {'state' if len(found.states) == 1 else 'states'}. "
            "The DoRA paper reports a negative one for full fine-tuning, a positive one for LoRA."
        )
    return html.note(" ".join(said), "info")


def heat_maps(found: Any) -> str:
    """Two maps of block by module: how far magnitudes and directions moved."""
    weights = [weight for weight in found.weights if weight.block is not None]
    if not weights:
        return ""
    return _map(
        weights, "Direction", "mean of 1 - cos over rows", lambda weight: weight.direction_change
    ) + _map(
        weights,
        "Magnitude",
        "mean change of a row's length, as a share of it",
        lambda weight: weight.magnitude_change / weight.magnitude if weight.magnitude else 0.0,
    )


def _map(weights: list[Any], title: str, hint: str, value: Callable[[Any], float]) -> str:
    modules = list(dict.fromkeys(weight.module for weight in weights))
    blocks = sorted({weight.block for weight in weights})
    values = {(weight.module, weight.block): value(weight) for weight in weights}
    most = max(values.values()) or 1.0
    power = _power(most)
    head = "".join(f'<th scope="col">{block}</th>' for block in blocks)
    rows = "".join(
        f'<tr><th scope="row">{escape(module)}</th>'
        + "".join(
            _cell(module, block, values.get((module, block)), most, power) for block in blocks
        )
        + "</tr>"
        for module in modules
    )
    unit = f", in units of 1e{power}" if power else ""
    return (
        f'<h3 class="group">{escape(title)} <span class="hint">{escape(hint + unit)}'
        f'</span></h3><div class="scroll" tabindex="0"><table class="heat figures">'
        f'<thead><tr><th scope="col">Block</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
    )


def _power(most: float) -> int:
    """The power of ten, a multiple of three, that the largest value of a map is a few of."""
    return min(0, 3 * math.floor(math.log10(most) / 3))


def _cell(module: str, block: int, value: float | None, most: float, power: int) -> str:
    if value is None:
        return "<td></td>"
    share = 100 * value / most
    label = f"{module}, block {block}: {value:.3g}"
    ink = ' class="strong"' if share > 55 else ""
    return (
        f'<td{ink} style="--heat:{share:.0f}%" title="{escape(label)}">{value / 10**power:.2f}</td>'
    )


def largest(weights: Iterable[Any]) -> str:
    """The rows that changed most, over all weights."""
    rows = [(weight, row) for weight in weights for row in weight.largest_rows]
    rows.sort(key=lambda pair: -pair[1].change)
    if not rows:
        return ""
    cells = "".join(
        f'<tr><th scope="row">{escape(weight.name)}</th><td>{row.row:,}</td>'
        f"<td>{row.change:.1%}</td><td>{row.magnitude_before:.3g} → {row.magnitude_after:.3g}</td>"
        f"<td>{row.direction_change:.2g}</td></tr>"
        for weight, row in rows[:_LARGEST]
    )
    return (
        '<h3 class="group">Largest changes <span class="hint">single rows of a weight</span></h3>'
        '<div class="scroll" tabindex="0"><table class="figures"><thead><tr>'
        '<th scope="col">Weight</th><th scope="col">Row</th><th scope="col">Change</th>'
        '<th scope="col">Magnitude</th><th scope="col">1 - cos</th></tr></thead>'
        f"<tbody>{cells}</tbody></table></div>"
    )
