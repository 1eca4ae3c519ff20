"""How a drawing becomes SVG: text stays text, in the font of the page, and colours are CSS variables of the page."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from io import StringIO
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import PathPatch
from matplotlib.transforms import Affine2D

from resformer.palette import DASHES, GREY, GRID, INK, MARKERS, RC, SERIES, SOFT

# Drawn in the colours of the light page, then exchanged for the variables: the page has values for light and dark.
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", GREY: "grey"} | {color: f"s{i}" for i, color in enumerate(SERIES)}
DOTTED = (0, (1.5, 1.5))
GUESS: dict[str, Any] = {"color": SOFT, "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 1}
HEAT = colormaps["cividis"]  # rises in lightness, and looks the same to the colour-blind


@dataclass(frozen=True)
class Style:
    color: str
    marker: str
    dash: Any
    control: bool = False


Styles = dict[str, Style]
Draw = Callable[[Axes], None]


def styles(arms: Sequence[dict[str, Any]]) -> Styles:
    """Colour, marker and dash of each arm: the baseline in ink, controls grey and dotted, the others in colours.

    The cycles of the others differ in length, so that no two look the same.
    """
    looks = zip(cycle(SERIES), cycle(MARKERS), cycle(DASHES), strict=False)
    greys = cycle("XPd*")

    def style(arm: dict[str, Any]) -> Style:
        if arm["baseline"]:
            return Style(INK, "o", "-")
        return Style(GREY, next(greys), DOTTED, control=True) if arm["control"] else Style(*next(looks))

    return {arm["name"]: style(arm) for arm in arms}


@cache
def swatch(style: Style) -> str:
    """The legend entry of a style: a line with its marker, 34 x 14 pixels; without ids, since it is used often."""

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        axes.set_position((0, 0, 1, 1))
        axes.set_xlim(0, 34)
        axes.set_ylim(0, 14)
        axes.plot([0, 34], [7, 7], color=style.color, linestyle=style.dash, linewidth=1.5, clip_on=False)
        marker = MarkerStyle(style.marker)
        shape = marker.get_path().transformed(marker.get_transform() + Affine2D().scale(5.5).translate(17, 7))
        axes.add_patch(PathPatch(shape, color=style.color, clip_on=False))

    return panel(draw, "", f"legend {style}", (34, 14))


def panel(draw: Draw, name: str, salt: str, size: tuple[int, int]) -> str:
    """The drawing as an <svg> element of so many CSS pixels. `name` is what a screen reader says; without: decoration.

    `salt` keeps ids from colliding within a page, and the same from one report to the next.
    """
    with matplotlib.rc_context(RC | {"svg.hashsalt": salt}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained" if name else None)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        svg = _text(figure)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    spoken = f'role="img" aria-label="{escape(name)}"' if name else 'aria-hidden="true"'
    head = f"<svg {_box(size)} {spoken}>"
    return head + re.sub(r"font-family: [^;\"]*;?", "", _inner(svg))


def sheet(rows: Sequence[Sequence[tuple[str, Draw] | None]], looks: Styles, size: tuple[int, int]) -> str:
    """A file of its own: drawings with their titles in rows, each so many pixels, under one legend by arm."""
    across = 4 if max(map(len, looks), default=0) > 16 else 6
    columns = max(map(len, rows))
    across = max(1, min(across, columns * size[0] // 170))
    legend = 18 * -(-len(looks) // across) + 16
    whole = (columns * size[0], legend + size[1] * len(rows))
    with matplotlib.rc_context(RC | {"svg.hashsalt": "sheet", "figure.facecolor": "white"}):
        figure = Figure(figsize=(whole[0] / 72, whole[1] / 72), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for row, places in zip(rows, grid, strict=True):
            for entry, axes in zip([*row, *[None] * (columns - len(row))], places, strict=True):
                if entry is None:
                    axes.set_axis_off()
                else:
                    entry[1](axes)
                    axes.set_title(_literal(entry[0]), loc="left")
        handles = [
            Line2D([], [], color=look.color, marker=look.marker, linestyle=look.dash, label=_label(name, look))
            for name, look in looks.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=across, handlelength=3)
        svg = _text(figure)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {_box(whole)}>'
    return head + _inner(svg)


def strip(values: Sequence[float], low: float, high: float) -> str:
    """Values as colours from left to right, on a logarithmic scale from `low` to `high`; what is 0 is left blank."""
    cells = [
        f'<rect x="{i}" width="1.05" height="1" fill="{_heat(value, low, high)}"/>'
        for i, value in enumerate(values)
        if value > 0
    ]
    box = f'viewBox="0 0 {max(len(values), 1)} 1" preserveAspectRatio="none" shape-rendering="crispEdges"'
    return f'<svg class="strip" {box} aria-hidden="true">{"".join(cells)}</svg>'


def scale(low: float, high: float) -> str:
    """The legend of `strip`."""
    return strip([float(v) for v in np.geomspace(low, high, 32)], low, high)


def _heat(value: float, low: float, high: float) -> str:
    place = 0.5 if high <= low else float(np.log(value / low) / np.log(high / low))
    return to_hex(HEAT(min(max(place, 0.0), 1.0)))


def _box(size: tuple[int, int]) -> str:
    return f'viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" height="{size[1]}"'


def _inner(svg: str) -> str:
    """What follows the opening tag."""
    return svg[svg.index(">", svg.index("<svg")) + 1 :].strip() + "\n"


def _text(figure: Figure) -> str:
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # matplotlib's own, the same in every figure
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: system-ui, sans-serif", svg)


def _label(arm: str, look: Style) -> str:
    return _literal(f"{arm} (control)" if look.control else arm)


def _literal(text: str) -> str:
    """Text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")
