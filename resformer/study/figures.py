"""The figures of the report: small SVG panels, as wide as a phone, whose colours are CSS variables of the page.

Text stays text, in the font of the page. The legend stands outside of the panels, see `swatch`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from io import StringIO
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import PathPatch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Affine2D

from resformer.palette import DASHES, GRID, INK, MARKERS, RC, SERIES, SOFT
from resformer.study.findings import number, title
from resformer.study.results import Result
from resformer.study.stats import estimate
from resformer.study.summary import Setting

# Drawn in the colours of the light page, then exchanged for the variables: the page has values for light and dark.
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid"} | {color: f"s{i}" for i, color in enumerate(SERIES)}
GUESS: dict[str, Any] = {"color": SOFT, "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 1}

WIDTH, HEIGHT = 348, 250  # of a panel, in CSS pixels
FLAT = 1e-5  # 1 - cosine is drawn no smaller than this


@dataclass(frozen=True)
class Panel:
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Style:
    color: str
    marker: str
    dash: Any


Styles = dict[str, Style]


def styles(schemes: Sequence[str]) -> Styles:
    """Colour, marker and dash of each scheme. The three cycles differ in length, so that no two look the same."""
    looks = zip(schemes, cycle(SERIES), cycle(MARKERS), cycle(DASHES), strict=False)
    return {scheme: Style(*look) for scheme, *look in looks}


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

    return _panel(draw, "", f"legend {style}", (34, 14))


def score_panel(setting: Setting, looks: Styles) -> Panel:
    """Score against depth: every seed a mark, a line through the means, bars for intervals from 3 seeds on."""
    guess = setting.guess_score
    note = "" if guess is None else f"Dotted: the constant guess, {guess:.3f}."
    draw = partial(_score, setting=setting, looks=looks)
    return Panel("Score", _panel(draw, "Score against depth, by scheme", f"score {title(setting)}"), note)


def loss_panel(setting: Setting, looks: Styles) -> Panel:
    """Training loss at the end against depth."""
    guess = setting.guess_loss
    note = "" if guess is None else f"Dotted: the loss of the constant guess, {guess:.3f}."
    draw = partial(_loss, setting=setting, looks=looks)
    name = "Training loss at the end against depth, by scheme"
    return Panel("Training loss at the end", _panel(draw, name, f"loss {title(setting)}"), note)


def cosine_panel(setting: Setting, looks: Styles) -> Panel | None:
    """Token cosine at initialisation against depth; None where it was not measured."""
    if all(_distance(run) is None for run in setting.finished):
        return None
    draw = partial(_cosine, setting=setting, looks=looks)
    name = "Token cosine at initialisation against depth, by scheme"
    note = "1: all token states of a sentence point the same way. The axis spreads the values close to 1."
    return Panel("Token cosine at initialisation", _panel(draw, name, f"cosine {title(setting)}"), note)


def gradient_panel(setting: Setting, looks: Styles) -> Panel | None:
    """Gradient norm by layer at initialisation, a line a seed, at the deepest depth where it was measured."""
    runs = [run for run in setting.finished if run.diagnostics.get("gradient_norms")]
    depth = max((run.config["depth"] for run in runs), default=0)
    norms = [
        (run.config["scheme"], np.array(run.diagnostics["gradient_norms"], dtype=float))
        for run in runs
        if run.config["depth"] == depth
    ]
    positive = np.concatenate([values[values > 0] for _, values in norms]) if norms else np.array([])
    if not len(positive):
        return None
    low, high = positive.min(), positive.max()
    floor = low / 10
    zeros = [scheme for scheme in looks if any(name == scheme and (values == 0).any() for name, values in norms)]

    def draw(axes: Axes) -> None:
        axes.set_yscale("log")
        for scheme, look in looks.items():
            for values in (values for name, values in norms if name == scheme):
                drawn = np.where(values > 0, values, floor)
                axes.plot(drawn, color=look.color, linestyle=look.dash, linewidth=1.2)
                marked = np.arange(0, len(drawn), max(1, len(drawn) // 6))
                axes.plot(marked, drawn[marked], look.marker, color=look.color, markersize=4)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        between = (1, 2, 5) if high < 30 * low else (1, 3) if high < 100 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=between, numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
        axes.set_xlabel("after layer (0: the embeddings)")

    note = (
        "Gradient of the loss in the state after each layer, at initialisation, a line a seed. "
        "In this project's trials it did not track which schemes fail."
    )
    if zeros:
        note += f" Exactly zero somewhere, and drawn at the floor there: {', '.join(zeros)}."
    name = f"Gradient norm by layer, depth {depth}"
    return Panel(name, _panel(draw, f"{name}, at initialisation", f"gradient {title(setting)}"), note)


def curve_panels(setting: Setting, looks: Styles) -> list[Panel]:
    """Training loss against step, a panel a depth on one scale, a line a seed."""
    runs = [run for run in setting.finished if run.loss_curve]
    if not runs:
        return []
    # A run that blows up must not flatten the others.
    starts = [run.loss_curve[0][1] for run in runs]
    top = 1.1 * max(float(np.median(starts)), setting.guess_loss or 0)

    def draw(axes: Axes, depth: int) -> None:
        for scheme, look in looks.items():
            for run in runs:
                if (run.config["scheme"], run.config["depth"]) == (scheme, depth):
                    steps, losses = zip(*run.loss_curve, strict=True)
                    axes.plot(steps, losses, color=look.color, linestyle=look.dash, linewidth=1.2)
                    axes.plot(steps[-1], losses[-1], look.marker, color=look.color, markersize=4)
        if setting.guess_loss is not None:
            axes.axhline(setting.guess_loss, **GUESS)
        axes.set_ylim(0, top)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("step")

    panels = []
    for depth in sorted({run.config["depth"] for run in runs}):
        name = f"Training loss by step, depth {depth}"
        svg = _panel(partial(draw, depth=depth), name, f"{name} {title(setting)}", (260, 190))
        panels.append(Panel(f"Depth {depth}", svg))
    return panels


def picture(settings: Sequence[Setting], looks: Styles) -> str:
    """A file of its own: score, training loss and token cosine against depth, a row a setting, with the legend."""
    rows = [setting for setting in settings if setting.finished]
    names = [scheme for scheme in looks if any(scheme in setting.schemes for setting in rows)]
    across = 4 if max(map(len, names), default=0) > 16 else 6
    legend = 18 * -(-len(names) // across) + 16
    size = (3 * WIDTH, legend + 290 * len(rows))
    with matplotlib.rc_context(RC | {"svg.hashsalt": "picture", "figure.facecolor": "white"}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        grid = figure.subplots(len(rows), 3, squeeze=False)
        for setting, (score, loss, cosine) in zip(rows, grid, strict=True):
            _score(score, setting, looks)
            _loss(loss, setting, looks)
            score.set_title(f"{title(setting)}: score", loc="left")
            loss.set_title("training loss at the end", loc="left")
            if any(_distance(run) is not None for run in setting.finished):
                _cosine(cosine, setting, looks)
                cosine.set_title("token cosine at initialisation", loc="left")
            else:
                cosine.set_axis_off()
        handles = [
            Line2D([], [], color=looks[s].color, marker=looks[s].marker, linestyle=looks[s].dash, label=_literal(s))
            for s in names
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=across, handlelength=3)
        svg = _text(figure)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {_box(size)}>'
    return head + _inner(svg)


def _score(axes: Axes, setting: Setting, looks: Styles) -> None:
    _over_depth(axes, setting, looks, lambda run: run.score, intervals=True)
    if setting.guess_score is not None:
        axes.axhline(setting.guess_score, **GUESS)


def _loss(axes: Axes, setting: Setting, looks: Styles) -> None:
    _over_depth(axes, setting, looks, lambda run: run.train_loss, intervals=True)
    if setting.guess_loss is not None:
        axes.axhline(setting.guess_loss, **GUESS)
    axes.set_ylim(0, 1.05 * axes.dataLim.ymax)


def _cosine(axes: Axes, setting: Setting, looks: Styles) -> None:
    """On a logarithmic axis of 1 - cosine, upside down, since what matters is how close to 1 it is."""
    axes.set_yscale("log")
    axes.set_ylim(2.4, FLAT / 1.6)
    _over_depth(axes, setting, looks, _distance, average=lambda values: float(np.exp(np.mean(np.log(values)))))
    axes.yaxis.set_major_locator(FixedLocator([1, 0.1, 0.01, 1e-3, 1e-4, FLAT]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{'≥ ' if y <= FLAT else ''}{1 - y:g}"))


def _distance(run: Result) -> float | None:
    cosine = run.diagnostics.get("token_cosine")
    return None if cosine is None else max(1 - cosine, FLAT)


def _over_depth(
    axes: Axes,
    setting: Setting,
    looks: Styles,
    value: Callable[[Result], float | None],
    average: Callable[[Sequence[float]], float] = lambda values: float(np.mean(values)),
    intervals: bool = False,
) -> None:
    """Seeds as marks and a line through their averages over log2 of the depth, schemes a little side by side."""
    places = [float(np.log2(depth)) for depth in setting.depths]
    step = min(0.06, 0.4 * min(np.diff(places), default=1.0) / len(setting.schemes))
    for rank, scheme in enumerate(setting.schemes):
        look, shift = looks[scheme], (rank - (len(setting.schemes) - 1) / 2) * step
        found = {
            place + shift: [v for v in map(value, setting.cells[scheme, depth].finished) if v is not None]
            for place, depth in zip(places, setting.depths, strict=True)
        }
        found = {x: values for x, values in found.items() if values}
        means = [average(values) for values in found.values()]
        axes.plot(list(found), means, color=look.color, linestyle=look.dash, linewidth=1.5)
        for x, values in found.items():
            half = estimate(values).half if intervals else None
            size, alpha = (5.0, 0.8) if half is None else (3.5, 0.5)
            axes.plot([x] * len(values), values, look.marker, color=look.color, markersize=size, alpha=alpha)
            if half is not None:
                axes.errorbar(x, average(values), half, color=look.color, linewidth=1.2)
    margin = len(setting.schemes) * step / 2 + max(0.05 * (places[-1] - places[0]), 0.1)
    axes.set_xlim(places[0] - margin, places[-1] + margin)
    axes.xaxis.set_major_locator(FixedLocator(_legible(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{2**x:.0f}"))
    axes.set_xlabel("depth (layers)")


def _legible(places: Sequence[float]) -> list[float]:
    """Those of the ascending places that are far enough apart for a label each, the last one always."""
    kept: list[float] = []
    for place in reversed(places):
        if not kept or kept[-1] - place >= 0.07 * (places[-1] - places[0]):
            kept.append(place)
    return kept


def _panel(draw: Callable[[Axes], None], name: str, salt: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> str:
    """The drawing as an <svg> element whose text has the page's font and whose colours are variables.

    `name` is what a screen reader says; without one the element is decoration.
    """
    # The salt keeps ids from colliding within a page, and the same from one report to the next.
    with matplotlib.rc_context(RC | {"svg.hashsalt": salt}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained" if name else None)
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        svg = _text(figure)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    spoken = f'role="img" aria-label="{name}"' if name else 'aria-hidden="true"'
    head = f"<svg {_box(size)} {spoken}>"
    return head + re.sub(r"font-family: [^;\"]*;?", "", _inner(svg))


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


def _literal(text: str) -> str:
    """Text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")
