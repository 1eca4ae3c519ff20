"""What the figures of the report show: drawings on the axes of matplotlib, from a setting of the document."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from resformer.study.svg import GUESS, SOFT, Draw, Styles
from resformer.study.words import number

Setting = dict[str, Any]
FLAT = 1e-5  # 1 - cosine is drawn no smaller than this
CAP = 1.15  # training losses above so many times the constant guess's are drawn at the top
COSTS = {"parameters": "parameters", "flops": "FLOPs of a run", "seconds": "seconds of a run",
         "peak_memory_mb": "peak memory, MiB"}  # fmt: skip


def heat(setting: Setting) -> tuple[float, float] | None:
    """The smallest and the largest gradient norm above 0 in a setting; None where none was measured."""
    norms = [norm for cell in setting["cells"] for norm in cell["gradient_norms"] if norm > 0]
    return (min(norms), max(norms)) if norms else None


def guess_of(setting: Setting, endpoint: str) -> float | None:
    return setting["guess"]["score" if endpoint == "score" else "loss"]


def top_of(setting: Setting) -> float:
    """Of an axis of training loss: one run that blew up must not flatten the others."""
    values = [v for cell in setting["cells"] for v in seeds_of(cell, "train_loss")]
    guess = setting["guess"]["loss"]
    return min(max(values, default=1.0), CAP * guess) if guess else max(values, default=1.0)


def seeds_of(cell: dict[str, Any], endpoint: str) -> list[float]:
    return [seed[endpoint] for seed in cell["seeds"] if seed[endpoint] is not None]


def over_depth(axes: Axes, setting: Setting, looks: Styles, endpoint: str) -> None:
    guess, top = guess_of(setting, endpoint), top_of(setting)
    loss = endpoint == "train_loss"

    def values(cell: dict[str, Any]) -> list[float]:
        return [min(value, top) if loss else value for value in seeds_of(cell, endpoint)]

    def interval(cell: dict[str, Any]) -> tuple[float, float] | None:
        found = cell[endpoint]
        return None if found is None or found["low"] is None else (found["low"], found["high"])

    _by_depth(axes, setting, looks, values, lambda cell, own: float(np.mean(own)), interval)
    if guess is not None:
        axes.axhline(guess, **GUESS)
    low, high = bounds(setting, endpoint)
    axes.set_ylim(low, high)


def bounds(setting: Setting, endpoint: str) -> tuple[float, float]:
    """Of the axis of an endpoint over depth: all seeds, those too high at the top, and the constant guess."""
    guess, top = guess_of(setting, endpoint), top_of(setting) if endpoint == "train_loss" else np.inf
    drawn = [min(value, top) for cell in setting["cells"] for value in seeds_of(cell, endpoint)]
    drawn += [] if guess is None else [guess]
    low, high = min(drawn, default=0.0), max(drawn, default=1.0)
    # An interval may be wider than all that was seen; and a small step is not to look like a large one.
    margin = max(0.1 * (high - low), 0.03 - (high - low) / 2)
    return low - margin, high + margin


def cosine(axes: Axes, setting: Setting, looks: Styles) -> None:
    """On a logarithmic axis of 1 - cosine, upside down, since what matters is how close to 1 it is."""

    def distances(cell: dict[str, Any]) -> list[float]:
        return [max(1 - cosine, FLAT) for cosine in cell["token_cosine"]]

    axes.set_yscale("log")
    axes.set_ylim(2.4, FLAT / 1.6)
    _by_depth(axes, setting, looks, distances, lambda cell, own: float(np.exp(np.mean(np.log(own)))))
    _of_cosines(axes.yaxis, [1, 0.1, 0.01, 1e-3, 1e-4, FLAT])


def _of_cosines(axis: Axis, ticks: Sequence[float]) -> None:
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{'≥ ' if y <= FLAT else ''}{1 - y:g}"))


def begun(setting: Setting) -> list[tuple[str, float, float]]:
    """(arm, token cosine at initialisation, final training loss) of each run that has both."""
    return [
        (cell["arm"], seed["token_cosine"], seed["train_loss"])
        for cell in setting["cells"]
        for seed in cell["seeds"]
        if seed["token_cosine"] is not None and seed["train_loss"] is not None
    ]


def beginnings(axes: Axes, setting: Setting, looks: Styles) -> None:
    """A mark a run, of all depths: how it ended against the token cosine that it began with, as `cosine` draws it."""
    guess, top = guess_of(setting, "train_loss"), top_of(setting)
    for arm, start, loss in begun(setting):
        look = looks[arm]
        axes.plot(max(1 - start, FLAT), min(loss, top), look.marker, color=look.color, markersize=5, alpha=0.7)
    if guess is not None:
        axes.axhline(guess, **GUESS)
    axes.set_xscale("log")
    axes.set_xlim(2.4, FLAT / 1.6)
    axes.set_ylim(*bounds(setting, "train_loss"))
    _of_cosines(axes.xaxis, [1, 0.1, 0.01, 1e-3, FLAT])  # side by side fewer of them fit
    axes.set_xlabel("token cosine at initialisation")


def _by_depth(
    axes: Axes,
    setting: Setting,
    looks: Styles,
    values: Callable[[dict[str, Any]], list[float]],
    average: Callable[[dict[str, Any], list[float]], float],
    interval: Callable[[dict[str, Any]], tuple[float, float] | None] = lambda cell: None,
) -> None:
    """Seeds as marks and a line through their averages over log2 of the depth, arms a little side by side."""
    places = [float(np.log2(depth)) for depth in setting["depths"]]
    step = min(0.06, 0.4 * min(np.diff(places), default=1.0) / len(setting["arms"]))
    cells = {(cell["arm"], cell["depth"]): cell for cell in setting["cells"]}
    for rank, arm in enumerate(setting["arms"]):
        look, shift = looks[arm], (rank - (len(setting["arms"]) - 1) / 2) * step
        row = [(x + shift, cells[arm, depth]) for x, depth in zip(places, setting["depths"], strict=True)]
        drawn = [(x, cell, values(cell)) for x, cell in row if values(cell)]
        means = [average(cell, own) for _, cell, own in drawn]
        axes.plot([x for x, *_ in drawn], means, color=look.color, linestyle=look.dash, linewidth=1.5)
        for x, cell, own in drawn:
            bar = interval(cell)
            size, alpha = (5.0, 0.8) if bar is None else (3.5, 0.5)
            axes.plot([x] * len(own), own, look.marker, color=look.color, markersize=size, alpha=alpha)
            if bar is not None:
                axes.plot([x, x], bar, color=look.color, linewidth=1.2)
    margin = len(setting["arms"]) * step / 2 + max(0.05 * (places[-1] - places[0]), 0.1)
    axes.set_xlim(places[0] - margin, places[-1] + margin)
    axes.xaxis.set_major_locator(FixedLocator(_legible(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{2**x:.0f}"))
    axes.set_xlabel("depth (layers)")


def curves(setting: Setting, looks: Styles) -> list[tuple[int, Draw]]:
    """By depth: the seeds faint, their median strong, a cross where a run diverged."""
    curves = setting["curves"]
    if not curves:
        return []
    guess, top = setting["guess"]["loss"], roof(setting)

    def draw(axes: Axes, depth: int) -> None:
        for arm, look in looks.items():
            own = [c for c in curves if (c["arm"], c["depth"]) == (arm, depth)]
            for curve in own:
                steps, losses = zip(*curve["points"], strict=True)
                alpha = 0.3 if len(own) > 1 else 1.0
                axes.plot(steps, losses, color=look.color, linewidth=0.8, alpha=alpha)
                if curve["status"] == "diverged":
                    axes.plot(steps[-1], min(losses[-1], top), "x", color=look.color, markersize=7, clip_on=False)
            if not own:
                continue
            shared, middle = _median(own)
            axes.plot(shared, middle, color=look.color, linestyle=look.dash, linewidth=1.4)
            axes.plot(shared[-1:], middle[-1:], look.marker, color=look.color, markersize=4)
        if guess is not None:
            axes.axhline(guess, **GUESS)
        axes.set_ylim(0, top)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_xlabel("step")

    return [(depth, partial(draw, depth=depth)) for depth in sorted({curve["depth"] for curve in curves})]


def roof(setting: Setting) -> float:
    """Of the panels of loss by step: a run that blows up must not flatten the others."""
    first = float(np.median([curve["points"][0][1] for curve in setting["curves"]]))
    return 1.1 * max(first, setting["guess"]["loss"] or 0)


def _median(curves: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Of the seeds of a cell, by step; one that diverged is above all others from then on."""
    runs = [dict(map(tuple, curve["points"])) for curve in curves]
    steps = sorted(set().union(*runs))
    last = [np.inf if curve["status"] == "diverged" else np.nan for curve in curves]
    table = np.array([[run.get(step, lost) for step in steps] for run, lost in zip(runs, last, strict=True)])
    middle = np.median(table, axis=0)
    drawn = [(step, float(value)) for step, value in zip(steps, middle, strict=True) if np.isfinite(value)]
    return [step for step, _ in drawn], [value for _, value in drawn]


def rates(setting: Setting, looks: Styles) -> list[tuple[int, Draw]]:
    """By depth: a line an arm, the chosen rate ringed, a cross where the run diverged."""
    grids, endpoint = setting["learning_rates"], setting["endpoint"]
    guess = guess_of(setting, endpoint)
    drawn = [value for grid in grids for value in grid["values"].values()]
    if not drawn:
        return []
    top = ceiling(setting)
    rates = sorted({float(rate) for grid in grids for rate in grid["values"]})
    low, high = min(drawn), min(max(drawn), top)
    margin = 0.08 * (high - low) or 0.05

    def draw(axes: Axes, depth: int) -> None:
        axes.set_xscale("log")
        for grid in (g for arm in looks for g in grids if (g["arm"], g["depth"]) == (arm, depth)):
            look = looks[grid["arm"]]
            curve = {float(rate): min(value, top) for rate, value in sorted(grid["values"].items(), key=_rate)}
            sound = {rate: value for rate, value in curve.items() if rate not in grid["diverged"]}
            axes.plot(list(curve), list(curve.values()), color=look.color, linestyle=look.dash, linewidth=1.2)
            axes.plot(list(sound), list(sound.values()), look.marker, color=look.color, markersize=4, linestyle="none")
            lost = [rate for rate in curve if rate in grid["diverged"]]
            axes.plot(lost, [curve[r] for r in lost], "x", color=look.color, markersize=7, linestyle="none")
            if grid["chosen"] in curve:
                ring: Any = {"markerfacecolor": "none", "markeredgecolor": look.color, "markersize": 10}
                axes.plot(grid["chosen"], curve[grid["chosen"]], "o", **ring)
        if guess is not None and low - margin <= guess <= high + margin:
            axes.axhline(guess, **GUESS)
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)
        axes.xaxis.set_major_locator(FixedLocator(_spread(rates, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(float(f"{x:.3g}"))))
        axes.set_xlabel("learning rate")

    return [(depth, partial(draw, depth=depth)) for depth in sorted({grid["depth"] for grid in grids})]


def ceiling(setting: Setting) -> float:
    """Of the panels of learning rates: losses above it are drawn there."""
    guess, endpoint = guess_of(setting, setting["endpoint"]), setting["endpoint"]
    highest = max((value for grid in setting["learning_rates"] for value in grid["values"].values()), default=1.0)
    return min(highest, CAP * guess) if endpoint == "train_loss" and guess else highest


def costs(setting: Setting, looks: Styles, endpoint: str) -> list[tuple[str, Draw]]:
    def points(arm: str, name: str) -> list[tuple[float, float]]:
        own = [cell for cell in setting["cells"] if cell["arm"] == arm and cell["cost"] and cell[endpoint]]
        return [(c["cost"][name], c[endpoint]["mean"]) for c in own if c["cost"][name]]

    def draw(axes: Axes, name: str) -> None:
        found = {arm: points(arm, name) for arm in setting["arms"]}
        costs = [cost for own in found.values() for cost, _ in own]
        for arm, own in found.items():
            look = looks[arm]
            shown = [(cost, min(v, top_of(setting)) if endpoint == "train_loss" else v) for cost, v in own]
            if shown:
                x, y = zip(*shown, strict=True)
                axes.plot(x, y, color=look.color, linestyle=look.dash, linewidth=1)
                axes.plot(x, y, look.marker, color=look.color, markersize=5, linestyle="none")
        axes.margins(0.12)
        if max(costs) > 4 * min(costs):
            axes.set_xscale("log")
            subs = (1, 3) if max(costs) < 300 * min(costs) else (1,)
            axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
        axes.set_xlabel(COSTS[name])

    return [(title, partial(draw, name=name)) for name, title in COSTS.items()
            if any(points(arm, name) for arm in setting["arms"])]  # fmt: skip


def gradients(setting: Setting, looks: Styles) -> list[tuple[int, Draw]]:
    """By depth: median gradient norm by layer, a line an arm. The page shows the same as colours."""
    bounds = heat(setting)
    if bounds is None:
        return []
    low, high = bounds

    def draw(axes: Axes, depth: int) -> None:
        axes.set_yscale("log")
        axes.set_ylim(low / 2, high * 2)
        for cell in setting["cells"]:
            norms = cell["gradient_norms"]
            if cell["depth"] == depth and norms:
                look = looks[cell["arm"]]
                seen = [norm if norm > 0 else np.nan for norm in norms]
                axes.plot(seen, color=look.color, linestyle=look.dash, linewidth=1.2)
                marked = np.arange(0, len(seen), max(1, len(seen) // 6))
                axes.plot(marked, np.array(seen)[marked], look.marker, color=look.color, markersize=4)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 100 * low else (1,), numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(float(f"{y:.3g}"))))
        axes.set_xlabel("after layer (0: the embeddings)", color=SOFT)

    depths = sorted({cell["depth"] for cell in setting["cells"] if cell["gradient_norms"]})
    return [(depth, partial(draw, depth=depth)) for depth in depths]


def _rate(item: tuple[str, float]) -> float:
    return float(item[0])


def _short(value: float) -> str:
    """12k, 3.4M, 0.5: a number that fits under an axis."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _spread(values: Sequence[float], most: int) -> list[float]:
    """At most so many of the values, evenly, both ends among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _legible(places: Sequence[float]) -> list[float]:
    """Those of the ascending places that are far enough apart for a label each, the last one always."""
    kept: list[float] = []
    for place in reversed(places):
        if not kept or kept[-1] - place >= 0.07 * (places[-1] - places[0]):
            kept.append(place)
    return kept
