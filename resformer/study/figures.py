"""The figures of the report, drawn from a setting of the document: panels as wide as a phone, and files of their own.

The legend stands outside of the panels, see `svg.swatch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from resformer.study.drawings import (
    Setting,
    beginnings,
    begun,
    bounds,
    ceiling,
    cosine,
    costs,
    curves,
    gradients,
    guess_of,
    over_depth,
    rates,
    roof,
    seeds_of,
    top_of,
)
from resformer.study.svg import Draw, Styles, panel, sheet
from resformer.study.words import joined

WIDTH, HEIGHT = 348, 250  # of a panel, in CSS pixels
SMALL = (270, 200)
NAMES = {"score": "Score", "train_loss": "Training loss at the end"}


@dataclass(frozen=True)
class Panel:
    title: str
    svg: str
    note: str = ""


def endpoint_panel(setting: Setting, looks: Styles, endpoint: str, place: str = "") -> Panel:
    """Score or training loss against depth: a mark a seed, a line through the means, intervals from 3 seeds on.

    `place` tells apart the ids of a panel that a page shows twice.
    """
    guess = guess_of(setting, endpoint)
    notes = [] if guess is None else [f"Dotted: the constant guess, {guess:.3f}."]
    if endpoint == "train_loss":
        notes.append(_at_the_top(top_of(setting), [v for c in setting["cells"] for v in seeds_of(c, endpoint)]))
    low, high = bounds(setting, endpoint)
    ends = [cell[endpoint] for cell in setting["cells"] if cell[endpoint] and cell[endpoint]["low"] is not None]
    if any(end["low"] < low or end["high"] > high for end in ends):
        notes.append("Intervals that leave the panel are cut off at its edge.")
    draw = partial(over_depth, setting=setting, looks=looks, endpoint=endpoint)
    name = f"{NAMES[endpoint]} against depth, by scheme"
    title = f"{NAMES[endpoint]}, {setting['title']}" if place else NAMES[endpoint]
    return Panel(
        title, panel(draw, name, f"{name} {setting['title']} {place}", (WIDTH, HEIGHT)), " ".join(filter(None, notes))
    )


def cosine_panel(setting: Setting, looks: Styles) -> Panel | None:
    """Token cosine at initialisation against depth; None where it was not measured."""
    if not any(cell["token_cosine"] for cell in setting["cells"]):
        return None
    note = "1: all token states of a sentence point the same way. The axis spreads the values close to 1."
    draw = partial(cosine, setting=setting, looks=looks)
    name = "Token cosine at initialisation"
    return _panel(name, draw, f"{name} against depth, by scheme", setting, note)


def beginnings_panel(setting: Setting, looks: Styles) -> Panel | None:
    """Final training loss against the token cosine before training, a mark a run; None where that was not measured."""
    if not begun(setting):
        return None
    draw = partial(beginnings, setting=setting, looks=looks)
    name = "Training loss at the end against the start"
    note = "A mark a run, of all depths; a correlation over schemes, not a cause."
    return _panel(name, draw, name, setting, note)


def curve_panels(setting: Setting, looks: Styles) -> list[Panel]:
    """Training loss against step, a panel a depth on one scale."""

    def note(depth: int) -> str:
        own = [curve for curve in setting["curves"] if curve["depth"] == depth]
        above = dict.fromkeys(c["arm"] for c in own if c["points"][-1][1] > roof(setting))
        return f"With a run that ends above the panel: {joined(above)}." if above else ""

    return [
        _panel(f"Depth {depth}", draw, f"Training loss by step, depth {depth}", setting, note(depth), SMALL)
        for depth, draw in curves(setting, looks)
    ]


def rate_panels(setting: Setting, looks: Styles) -> list[Panel]:
    """The study's endpoint on the tuning slice against learning rate, a panel a depth."""

    def note(depth: int) -> str:
        own = [grid for grid in setting["learning_rates"] if grid["depth"] == depth]
        return _at_the_top(ceiling(setting), [value for grid in own for value in grid["values"].values()])

    return [
        _panel(f"Depth {depth}", draw, f"Learning rates tried, depth {depth}", setting, note(depth), SMALL)
        for depth, draw in rates(setting, looks)
    ]


def cost_panels(setting: Setting, looks: Styles, endpoint: str) -> list[Panel]:
    """The study's endpoint against each cost, a line an arm over its depths."""
    means = [cell[endpoint]["mean"] for cell in setting["cells"] if cell[endpoint] and cell["cost"]]
    note = _at_the_top(top_of(setting), means) if endpoint == "train_loss" else ""
    return [
        _panel(f"Against {title}", draw, f"{NAMES[endpoint]} against {title}", setting, note, SMALL)
        for title, draw in costs(setting, looks, endpoint)
    ]


def sheets(document: dict[str, Any], looks: Styles) -> dict[str, str]:
    """The figures as SVG files by name, rows of settings; a figure for which nothing was measured is left out."""
    settings = [s for s in document["settings"] if any(cell["finished"] for cell in s["cells"])]
    if not settings:
        return {}
    endpoint = document["endpoint"]

    def titled(setting: Setting, entries: Sequence[tuple[Any, Draw]], word: str) -> list[tuple[str, Draw] | None]:
        return [(f"{setting['title']}: {word}{what}", draw) for what, draw in entries]

    found: dict[str, tuple[list[list[tuple[str, Draw] | None]], tuple[int, int]]] = {
        "report": (
            [
                [
                    (f"{s['title']}: score", partial(over_depth, setting=s, looks=looks, endpoint="score")),
                    (NAMES["train_loss"].lower(),
                     partial(over_depth, setting=s, looks=looks, endpoint="train_loss")),
                    ("token cosine at initialisation", partial(cosine, setting=s, looks=looks))
                    if any(cell["token_cosine"] for cell in s["cells"]) else None,
                ]
                for s in settings
            ],
            (WIDTH, 290),
        ),
        "curves": ([titled(s, curves(s, looks), "depth ") for s in settings], (300, 230)),
        "learning_rates": ([titled(s, rates(s, looks), "depth ") for s in settings], (300, 230)),
        "gradients": ([titled(s, gradients(s, looks), "depth ") for s in settings], (300, 230)),
        "start": ([titled(s, [("training loss at the end", partial(beginnings, setting=s, looks=looks))], "")
                   if begun(s) else [] for s in settings], (WIDTH, 290)),
        "cost": ([titled(s, costs(s, looks, endpoint), "") for s in settings], (300, 230)),
    }  # fmt: skip
    return {name: sheet(rows, looks, size) for name, (rows, size) in found.items() if any(rows)}


def _at_the_top(top: float, values: Sequence[float]) -> str:
    return f"Above {top:.2f}: drawn at the top." if any(value > top for value in values) else ""


def _panel(
    title: str, draw: Draw, name: str, setting: Setting, note: str = "", size: tuple[int, int] = (WIDTH, HEIGHT)
) -> Panel:
    return Panel(title, panel(draw, name, f"{name} {setting['title']}", size), note)
