"""Colours, markers and settings that all figures share. Needs no matplotlib."""

from __future__ import annotations

from typing import Any

INK, SOFT, GRID, GREY = "#1d2025", "#5f656e", "#dfe1e4", "#6b7078"
SERIES = ("#0065a6", "#c8470b", "#00805a", "#9c4a8b", "#a87300", "#3b93cc")  # told apart without red or green
MARKERS = "sD^vPX<>*ph"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (6, 2, 1.5, 2)), (0, (9, 3)))

RC: Any = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib and is wide: what fits in it fits in the page's font
    "font.size": 11,
    "axes.titlesize": 12,
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "legend.frameon": False,
}
