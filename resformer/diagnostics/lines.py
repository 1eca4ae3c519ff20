"""Straight lines through points: every rate and every exponent in the diagnostics is the slope of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """A straight line through points."""

    slope: float
    error: float  # standard error of the slope
    r2: float  # share of the variance that the line explains


def fit(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """Least squares; None with fewer than two points, or all at one x. Two points leave an error of NaN."""
    n = len(x)
    if n < 2:
        return None
    mean_x, mean_y = sum(x) / n, sum(y) / n
    sxx = sum((a - mean_x) ** 2 for a in x)
    if sxx == 0:
        return None
    sxy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    syy = sum((b - mean_y) ** 2 for b in y)
    slope = sxy / sxx
    rest = max(0.0, syy - slope * sxy)
    error = math.sqrt(rest / (n - 2) / sxx) if n > 2 else math.nan
    return Fit(slope, error, 1 - rest / syy if syy > 0 else 1.0)


def fit_log(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The line through (x, ln y) over the points with y > 0: its slope is a rate, exp of it a factor for each x."""
    points = [(a, math.log(b)) for a, b in zip(x, y, strict=True) if b > 0]
    return fit(*zip(*points, strict=True)) if points else None


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line; raises a ValueError where no line is determined."""
    line = fit(x, y)
    if line is None:
        raise ValueError(f"a slope needs points at two different x, got {len(x)} points at x = {list(x)!r:.60}")
    return line.slope


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of the power law y = c x^p that fits best in logarithms; all numbers above 0."""
    return slope([math.log(a) for a in x], [math.log(b) for b in y])
