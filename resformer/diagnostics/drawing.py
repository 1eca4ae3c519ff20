"""The picture of a measurement: small panels side by side, in the colours of the reports."""

from __future__ import annotations

import math
from io import StringIO
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from resformer.diagnostics.measured import Matrix, Measured
from resformer.palette import DASHES, MARKERS, RC, SERIES, SOFT

ACROSS = 3  # panels side by side
PANEL = (3.9, 2.9)  # inches
WIDE = 10.0  # largest over smallest, from which an axis is logarithmic: below, its ticks would have no round numbers

FLAT = 1e-3  # a range this small beside the values is drawn as a level line: blown up, rounding looks like a finding


def draw(measured: Measured) -> str:
    """An <svg> document; the same measurement gives the same bytes."""
    number = len(measured.draws) + len(measured.matrices)
    across = min(ACROSS, max(1, number))
    down = max(1, math.ceil(number / across))
    style = RC | {"svg.hashsalt": measured.name, "figure.facecolor": "white", "legend.fontsize": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(PANEL[0] * across, PANEL[1] * down), layout="constrained")
        for position, name in enumerate(measured.draws):
            _lines(figure.add_subplot(down, across, position + 1), measured, name, legend=position == 0)
        for position, (name, matrix) in enumerate(measured.matrices.items(), start=len(measured.draws)):
            _square(figure, figure.add_subplot(down, across, position + 1), name, matrix)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _lines(axes: Axes, measured: Measured, drawn: str | tuple[str, str], *, legend: bool) -> None:
    name, along = (drawn, measured.along) if isinstance(drawn, str) else drawn
    column = next(one for one in measured.columns if one.name == name)
    others = [key for key in measured.keys if key != along and len({row.get(key) for row in measured.rows}) > 1]
    series: dict[str, list[tuple[Any, float]]] = {}
    for row in measured.rows:
        x, y = row.get(along), row.get(name)
        if x is None or y is None or not math.isfinite(y) or (column.log and y <= 0):
            continue  # of a logarithm zeros are left out
        label = " ".join(str(row[key]) for key in others if row.get(key) is not None)
        series.setdefault(label, []).append((x, y))
    looks = zip(series.items(), cycle(SERIES), cycle(MARKERS), cycle(DASHES), strict=False)
    for (label, points), color, marker, dash in looks:
        x, y = zip(*points, strict=True)
        look: Any = {"color": color, "marker": marker, "markersize": 3.5, "label": label}
        if isinstance(drawn, str):
            look |= {"linestyle": dash, "linewidth": 1.3, "markevery": max(1, len(points) // 8)}
        axes.plot(x, y, **({"linestyle": "none"} | look))
    heights = [y for points in series.values() for _, y in points]
    if heights:
        _scale(axes, min(heights), max(heights), column.log)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=along == measured.along))
    axes.set_xlabel(along.replace("_", " "))
    unit = f" ({column.unit})" if column.unit else ""
    axes.set_title(f"{name.replace('_', ' ')}{unit}", loc="left")
    if legend and len(series) > 1:
        axes.legend(handlelength=2.5)


def _scale(axes: Axes, low: float, high: float, log: bool) -> None:
    if log and high > WIDE * low:
        axes.set_yscale("log")
        if high < 100 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    elif 0 < high - low < FLAT * max(abs(low), abs(high)):
        middle = (low + high) / 2
        axes.set_ylim(middle - abs(middle) / 20, middle + abs(middle) / 20)


def _square(figure: Figure, axes: Axes, name: str, matrix: Matrix) -> None:
    shown = axes.imshow(matrix, origin="lower", cmap="viridis", vmin=min(0.0, min(map(min, matrix))), vmax=1.0)
    axes.grid(False)
    axes.set_title(name.replace("_", " "), loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("row of the table", color=SOFT)
    figure.colorbar(shown, ax=axes, shrink=0.8)
