"""What a suite is: rows with goals, and a way to measure one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmark.record import Record
from resformer.errors import unknown

SURE = 0.9  # that an interval covers what it is of; five values do
Value = float | str | dict[str, float]  # a number, a word, or a median with its interval
Values = dict[str, Value]


@dataclass(frozen=True)
class Goal:
    """What a quantity is to be; `top`: what its interval must not go beyond, either."""

    quantity: str
    most: float | None = None
    least: float | None = None
    top: float | None = None

    def mark(self, value: Value) -> str:
        """! if the whole interval misses it, ? if the median does or the interval goes beyond `top`; else nothing.

        At the two decimals that the table shows. ? also where there are too few values for an interval.
        """
        if isinstance(value, dict) and value["coverage"] < SURE:
            return "?"
        given = [value[name] for name in ("low", "median", "high")] if isinstance(value, dict) else [value] * 3
        low, middle, high = (round(float(one), 2) for one in given)  # type: ignore[arg-type]
        most, least = (math.inf if self.most is None else self.most), (-math.inf if self.least is None else self.least)
        if low > most or high < least:
            return "!"
        return "" if least <= middle <= most and (self.top is None or high <= self.top) else "?"

    def __str__(self) -> str:
        parts = {"": self.most, "upper end ": self.top}
        texts = [f"{name}<= {value:g}" for name, value in parts.items() if value is not None]
        return f"{self.quantity} " + ", ".join(texts + ([f">= {self.least:g}"] if self.least is not None else []))


@dataclass(frozen=True)
class Row:
    """One thing that is measured."""

    name: str
    goals: tuple[Goal, ...] = ()
    given: Any = None  # what the suite makes it of
    note: str = ""
    asked: bool = False  # too large for every machine: only measured by its name


@dataclass(frozen=True)
class Size:
    """Of the encoder and the batch of the step suites."""

    depth: int = 24
    width: int = 128
    vocabulary: int = 8192
    batch: int = 16
    length: int = 128
    dropout: float = 0.1

    def __str__(self) -> str:
        return f"{self.depth} x {self.width}, vocabulary {self.vocabulary}, {self.batch} inputs of {self.length} tokens"


def silent(text: str) -> None:
    """Of the progress."""


@dataclass
class Bench:
    """What a measurement is asked for."""

    record: Record
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pairs: int = 15
    size: Size = field(default_factory=Size)
    model: Path | None = None
    data: Path | None = None
    seeds: int = 5
    rows: int | None = None  # of a fine-tuning task, at most
    tell: Callable[[str], None] = silent


@dataclass(frozen=True, eq=False)
class Suite:
    """Rows that are measured one by one.

    Args:
        about: what is measured against what, for the reader of the table.
        shown: the quantities of the table, in order; more: those that Markdown has room for.
        measure: (row, bench) -> the quantities; what takes long is kept piecemeal by `bench.record.part`.
        piecemeal: whether rows are only made of kept parts, and so made anew whenever they are asked for.
        needs: options, and packages, without which there is nothing to measure.
    """

    name: str
    about: str
    shown: tuple[str, ...]
    rows: tuple[Row, ...]
    measure: Callable[[Row, Bench], Values]
    more: tuple[str, ...] = ()
    piecemeal: bool = False
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def lacks(self, given: Any) -> str:
        """What is to be done before it can be measured."""
        if any(getattr(given, need) is None for need in self.needs):
            return f"it needs {' and '.join(f'--{need}' for need in self.needs)}"
        if lacking := [name for name in self.packages if find_spec(name) is None]:
            return f"it needs {' and '.join(lacking)}: pip install -e '.[bench]'"
        return ""

    def chosen(self, only: list[str]) -> list[Row]:
        """Those named, or all that need not be."""
        return [row for row in self.rows if (row.name in only if only else not row.asked)]


def choose(suites: dict[str, Suite], names: list[str], only: list[str]) -> dict[Suite, list[Row]]:
    """The rows to measure. Raises `ValueError` for names that are not known, or of no chosen suite."""
    for name in names:
        if name not in (*suites, "all"):
            raise unknown("suite", name, (*suites, "all"))
    chosen = [suite for name, suite in suites.items() if name in names or "all" in names]
    known = {row.name for suite in chosen for row in suite.rows}
    for name in only:
        if name not in known:
            raise unknown("row", name, known, of="the chosen suites")
    return {suite: rows for suite in chosen if (rows := suite.chosen(only))}
