"""Charts as the page's ``<dora-chart>`` draws them, from any number of steps.

What is sent has a bounded number of points, whatever the length of the run, so that a page with a
run of thousands of steps is as quick as one with ten.
"""

import json
from collections.abc import Sequence
from typing import Any

from app.views.html import escape

Point = tuple[float, float]

# More points than a chart has pixels for would only cost time.
_POINTS = 360
_SMOOTHED_SHARE = 1 / 40


def line(name: str, points: Sequence[Point], color: int = 1, kind: str = "line") -> dict[str, Any]:
    """A series of a chart, thinned; ``color`` is 1 to 6, ``kind`` raw, line or dots."""
    kept = thinned(points) if kind == "raw" else every_nth(points)
    short = [[x, float(f"{y:.5g}")] for x, y in kept]
    return {"name": name, "kind": kind, "color": color, "points": short}


def chart(
    element_id: str,
    label: str,
    series: Sequence[dict[str, Any]],
    *,
    steps: float,
    first: float = 0,
    unit: str = "",
    y: tuple[float, float] | None = None,
    marks: Sequence[dict[str, Any]] = (),
    small: bool = False,
) -> str:
    """A chart with a legend.

    Args:
        element_id: Names the chart among all of the page.
        label: What it shows, for those who do not see it.
        series: From ``line``.
        steps: Where the axis of steps ends.
        first: Where it begins.
        unit: Of the values.
        y: The range of values to show; what lies beyond is cut off. Default: all.
        marks: Vertical lines, each ``{"x": step, "kind": "best" or "saved"}``.
        small: Half as high, without a legend.
    """
    data: dict[str, Any] = {
        "x": [first, max(first + 1, steps)],
        "series": [one for one in series if one["points"]],
        "unit": unit,
        "marks": list(marks),
    }
    if y is not None:
        data["y"] = y
    keys = "".join(
        f'<li class="{one["kind"]}"><i style="--key:var(--series-{one["color"]})"></i>'
        f"{escape(one['name'])}</li>"
        for one in data["series"]
    )
    legend = "" if small else f'<ul class="legend">{keys}</ul>'
    return (
        f'{legend}<dora-chart id="{escape(element_id)}" role="img" aria-label="{escape(label)}" '
        f'class="{"small" if small else ""}" data="{escape(json.dumps(data))}"></dora-chart>'
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The running mean of the values, over a fortieth of the points but at least ten."""
    weight = 1 / max(10.0, len(points) * _SMOOTHED_SHARE)
    mean, share = 0.0, 0.0
    result = []
    for x, y in points:
        # Divided by the weights so far, the mean does not start at zero.
        mean += weight * (y - mean)
        share += weight * (1 - share)
        result.append((x, mean / share))
    return result


def thinned(points: Sequence[Point], most: int = _POINTS) -> list[Point]:
    """At most ``most`` points: the lowest and the highest of every stretch, and the last."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    stretches = (most - 1) // 2
    for number in range(stretches):
        begin = number * len(points) // stretches
        stretch = points[begin : (number + 1) * len(points) // stretches]
        low = min(stretch, key=lambda point: point[1])
        high = max(stretch, key=lambda point: point[1])
        kept += sorted({low, high})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def every_nth(points: Sequence[Point], most: int = _POINTS) -> list[Point]:
    """At most ``most`` of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def value_range(raw: Sequence[Point], others: Sequence[Point]) -> tuple[float, float] | None:
    """The range that shows all of ``others`` and all of ``raw`` but its odd peaks."""
    ordered = sorted(y for _, y in raw)
    if not ordered and not others:
        return None
    cut = len(ordered) // 100
    values = [*ordered[cut : len(ordered) - cut], *(y for _, y in others)]
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room
