"""Does what is measured before training tell how training ends? A rule is chosen at small depths and tested at a
greater one, that took no part in the choice. Plain numbers, no torch.

Letters: M schemes, C cells (a task at a depth), B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEWEST = 5  # schemes: of four, one order in 24 agrees perfectly with any other by chance
PERMUTATIONS, RESAMPLES = 9_999, 4_000
LEVEL = 0.05  # the p-value up to which a rule counts as one that predicts
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A scheme on a task at a depth: a number a seed of each predictor, and of how training ended."""

    task: str
    depth: int
    scheme: str
    predictors: dict[str, list[float]]  # at initialisation
    losses: list[float]  # final training losses
    failed: float  # share of the runs that did not learn


@dataclass(frozen=True)
class Rule:
    """By which predictor schemes are ordered, and from where on they are expected to fail."""

    predictor: str
    worse: str  # "high" | "low": on which side the training loss is higher
    agreement: float  # mean of Kendall's τ over the cells that chose it
    threshold: float | None  # beyond which most runs failed there; None where all or none did
    accuracy: float | None  # of the threshold, in the cells that chose it: mean of the shares told rightly on each side

    def badness(self, value: float) -> float:
        return value if self.worse == "high" else -value

    def fails(self, value: float) -> bool | None:
        """Whether a run is expected to fail; None without a threshold."""
        return None if self.threshold is None else self.badness(value) > self.badness(self.threshold)


@dataclass(frozen=True)
class HeldOut:
    """How a rule did at a depth that was not used to choose it."""

    depth: int
    schemes: tuple[str, ...]
    tasks: tuple[str, ...]
    tau: float  # mean over the tasks of Kendall's τ between predictor and final training loss, badness against loss
    low: float  # bounds of the 95 % interval, over schemes
    high: float
    p: float  # one-sided, of permuted schemes, the rule chosen anew for each
    accuracy: float | None  # of the threshold; None where all runs or none failed
    counts: dict[str, int]  # cells: failed and foretold, failed and not, trained and foretold to fail, trained
    others: dict[str, float]  # τ of every predictor here, each as it was directed at the small depths: exploration
    shallower: float | None  # τ between the losses at the next smaller depth and these: what training less deep tells
    trained: float | None = None  # τ among the schemes that trained on every task; None for fewer than three
    trained_p: float | None = None  # one-sided, of permuted schemes

    @property
    def predicts(self) -> bool:
        """Whether the rule tells how training ends at all."""
        return self.p <= LEVEL and self.low > 0

    @property
    def orders(self) -> bool:
        """Whether it also orders the schemes that train."""
        return self.trained_p is not None and self.trained_p <= LEVEL


@dataclass(frozen=True)
class Calibration:
    """A rule and its test."""

    chosen_on: tuple[int, ...]  # depths
    seeds: int
    rule: Rule
    test: HeldOut
    conditions: dict[str, Any] = field(default_factory=dict)  # settings of the runs that it is from


def calibrate(points: Sequence[Point], generator: np.random.Generator) -> Calibration:
    """Choose the rule on all depths but the greatest, and test it there.

    The predictor is the one with the largest mean |τ| over cells, τ being Kendall's τ-b over schemes between the means
    over seeds of the predictor and of the final training loss; its sign says which side is worse. The threshold has the
    largest balanced accuracy for "most runs of the cell failed", halfway between two values that occur.

    At the greatest depth: the mean τ over tasks, of all schemes and of those that trained on every task, since telling
    failing nets from others is less than ordering the others. p is the share of permutations of the schemes, the same
    in all cells, with a mean τ at least as large, where predictor and side are chosen anew for each permutation (losses
    at one depth go with those at another, so a side chosen by the true order would not be fixed before); the observed
    order counts as one. The interval is by percentiles, from schemes drawn with replacement, with all their tasks, and
    seeds within them.

    Raises a `ValueError` for fewer than two depths, and fewer than five schemes that all cells of a task have.
    """
    points = complete(points)
    depths = sorted({point.depth for point in points})
    if len(depths) < 2:
        raise ValueError(
            f"a rule is chosen at small depths and tested at a greater one; there are runs at depths {depths} alone"
        )
    schemes = sorted({point.scheme for point in points})
    if len(schemes) < FEWEST:
        raise ValueError(
            f"{len(schemes)} schemes have finished runs on every task and depth ({', '.join(schemes)}); a rank "
            f"correlation is worth looking at from {FEWEST} on"
        )
    small = [point for point in points if point.depth < depths[-1]]
    deep = [point for point in points if point.depth == depths[-1]]
    rules = {name: direction(name, small) for name in points[0].predictors}
    best = max(rules.values(), key=lambda rule: abs(rule.agreement))
    threshold, accuracy = split(best, small)
    rule = Rule(best.predictor, best.worse, abs(best.agreement), threshold, accuracy)
    before = [point for point in points if point.depth == depths[-2]]
    return Calibration(
        tuple(depths[:-1]),
        max(len(point.losses) for point in points),
        rule,
        HeldOut(
            depths[-1],
            tuple(schemes),
            tuple(dict.fromkeys(point.task for point in deep)),
            _mean_tau(rule, deep),
            *_interval(rule, deep, generator),
            _p_value(rule, tuple(rules), small, deep, generator),
            *_told(rule, deep),
            {name: _mean_tau(one, deep) for name, one in rules.items()},
            _mean_of_losses(before, deep),
            *_among_trained(rule, deep, generator),
        ),
    )


def complete(points: Sequence[Point]) -> list[Point]:
    """Those of the schemes that all cells have, and of the tasks that have all depths."""
    depths = {point.depth for point in points}
    tasks = [
        task for task in dict.fromkeys(point.task for point in points)
        if {point.depth for point in points if point.task == task} == depths
    ]  # fmt: skip
    cells = {(point.task, point.depth) for point in points if point.task in tasks}
    have: dict[str, set[tuple[str, int]]] = {}
    for point in points:
        if point.losses:
            have.setdefault(point.scheme, set()).add((point.task, point.depth))
    return sorted(
        (point for point in points if point.task in tasks and have.get(point.scheme, set()) >= cells),
        key=lambda point: (point.task, point.depth, point.scheme),
    )


def direction(name: str, points: Sequence[Point]) -> Rule:
    """A predictor with the side that goes with higher losses in these cells, without a threshold."""
    mean = _mean_tau(Rule(name, "high", 0.0, None, None), points)
    return Rule(name, "high" if mean >= 0 else "low", abs(mean), None, None)


def split(rule: Rule, points: Sequence[Point]) -> tuple[float | None, float | None]:
    """The threshold on a predictor that best parts the cells which failed from the others, and its balanced accuracy;
    None where all failed or none did."""
    values = np.array([rule.badness(fmean(point.predictors[rule.predictor])) for point in points])
    failed = np.array([point.failed > 0.5 for point in points])
    if failed.all() or not failed.any():
        return None, None
    order = np.unique(values[np.isfinite(values)])
    between = [(a + b) / 2 for a, b in pairwise(order)]
    between += [order[-1]] if len(order) < len(np.unique(values)) else []  # beyond it the infinite ones
    scores = [balanced(values > cut, failed) for cut in between]
    if not scores:
        return None, None
    best = int(np.argmax(scores))
    return rule.badness(float(between[best])), scores[best]  # badness is its own inverse


def balanced(foretold: NDArray[np.bool_], failed: NDArray[np.bool_]) -> float:
    """Mean of the shares of failed and of trained cells that were told rightly; ½ is what a guess gets."""
    return float((foretold[failed].mean() + (~foretold[~failed]).mean()) / 2)


def tau(x: Array, y: Array) -> Array:
    """Kendall's τ-b between the last axes of two arrays: Σ sign(x_i - x_j) sign(y_i - y_j) over the root of the
    numbers of pairs that are not tied in x and in y; 0 where all are tied."""
    a, b = _signs(x), _signs(y)
    pairs = np.sqrt((a**2).sum((-2, -1)) * (b**2).sum((-2, -1)))
    return (a * b).sum((-2, -1)) / np.where(pairs == 0, 1, pairs)


def _signs(x: Array) -> Array:
    """Of all differences; infinite values are equal to each other."""
    with np.errstate(invalid="ignore"):
        return np.sign(np.nan_to_num(x[..., :, None] - x[..., None, :], nan=0.0))


def _cells(points: Sequence[Point]) -> list[list[Point]]:
    """By task and depth, each with its schemes in one order."""
    found: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        found.setdefault((point.task, point.depth), []).append(point)
    return list(found.values())


def _mean_tau(rule: Rule, points: Sequence[Point]) -> float:
    """Over cells."""
    return fmean(
        float(
            tau(
                np.array([rule.badness(fmean(point.predictors[rule.predictor])) for point in cell]),
                np.array([fmean(point.losses) for point in cell]),
            )
        )
        for cell in _cells(points)
    )


def _mean_of_losses(before: Sequence[Point], after: Sequence[Point]) -> float:
    pairs = zip(_cells(before), _cells(after), strict=True)
    return fmean(float(tau(*(np.array([fmean(point.losses) for point in cell]) for cell in pair))) for pair in pairs)


def _interval(rule: Rule, points: Sequence[Point], generator: np.random.Generator) -> tuple[float, float]:
    """The bounds of the 95 % interval of the mean τ."""
    cells = _cells(points)
    drawn = generator.integers(len(cells[0]), size=(RESAMPLES, len(cells[0])))
    resampled, rows = np.zeros(RESAMPLES), np.arange(RESAMPLES)[:, None]
    for cell in cells:
        xs = _of_seeds([[rule.badness(v) for v in point.predictors[rule.predictor]] for point in cell], generator)
        ys = _of_seeds([point.losses for point in cell], generator)
        resampled += tau(xs[rows, drawn], ys[rows, drawn])
    low, high = np.quantile(resampled / len(cells), [0.025, 0.975])
    return float(low), float(high)


def _p_value(
    rule: Rule, predictors: Sequence[str], small: Sequence[Point], deep: Sequence[Point], generator: np.random.Generator
) -> float:
    """Of the mean τ at the greatest depth, where each permutation chooses its own predictor and side as `rule` was."""
    number = len(_cells(deep)[0])
    orders = np.array([generator.permutation(number) for _ in range(PERMUTATIONS)])
    chosen = np.stack([_permuted(name, small, orders) for name in predictors])  # (predictors B)
    tested = np.stack([_permuted(name, deep, orders) for name in predictors])
    best = np.abs(chosen).argmax(0)[None]
    found = np.sign(np.take_along_axis(chosen, best, 0)) * np.take_along_axis(tested, best, 0)
    return _share(found, _mean_tau(rule, deep))


def _among_trained(
    rule: Rule, points: Sequence[Point], generator: np.random.Generator
) -> tuple[float | None, float | None]:
    """τ and p of the rule, as it is, among the schemes that trained on every task."""
    failing = {point.scheme for point in points if point.failed > 0.5}
    points = [point for point in points if point.scheme not in failing]
    number = len({point.scheme for point in points})
    if number < 3:
        return None, None
    orders = np.array([generator.permutation(number) for _ in range(PERMUTATIONS)])
    side = 1 if rule.worse == "high" else -1
    found = _mean_tau(rule, points)
    return found, _share(side * _permuted(rule.predictor, points, orders), found)


def _permuted(name: str, points: Sequence[Point], orders: NDArray[np.intp]) -> Array:
    """(B) mean τ over cells between a predictor of permuted schemes and the losses."""
    return np.mean(
        [
            tau(
                np.array([fmean(point.predictors[name]) for point in cell])[orders],
                np.array([fmean(point.losses) for point in cell]),
            )
            for cell in _cells(points)
        ],
        axis=0,
    )


def _share(found: Array, observed: float) -> float:
    """Of chance at least as large as what was observed, which counts as one."""
    return (1 + int((found >= observed - 1e-9).sum())) / (1 + found.size)


def _of_seeds(values: Sequence[Sequence[float]], generator: np.random.Generator) -> Array:
    """(B M) means over seeds drawn with replacement."""
    columns = []
    for own in values:
        array = np.array(own)
        columns.append(array[generator.integers(len(array), size=(RESAMPLES, len(array)))].mean(1))
    return np.stack(columns, 1)


def _told(rule: Rule, points: Sequence[Point]) -> tuple[float | None, dict[str, int]]:
    """The balanced accuracy of the threshold, and the counts behind it."""
    if rule.threshold is None:
        return None, {}
    foretold = np.array([bool(rule.fails(fmean(point.predictors[rule.predictor]))) for point in points])
    failed = np.array([point.failed > 0.5 for point in points])
    counts = {
        "failed, foretold": int((failed & foretold).sum()),
        "failed, not foretold": int((failed & ~foretold).sum()),
        "trained, foretold to fail": int((~failed & foretold).sum()),
        "trained, as foretold": int((~failed & ~foretold).sum()),
    }
    mixed = failed.any() and not failed.all()
    return (balanced(foretold, failed) if mixed else None), counts
