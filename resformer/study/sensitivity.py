"""How much a score depends on the learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sensitivity:
    """`best`: the learning rate with the highest score. `drop`: that score - the lowest over the grid.

    `at_edge`: whether a rate with the highest score is the smallest or the largest of the grid, and so the optimum
    may lie outside of it.
    """

    best: float
    drop: float
    at_edge: bool


def sensitivity(scores: Mapping[float, float]) -> Sensitivity | None:
    """Of scores by learning rate, higher is better (negate a loss); None below two rates, which are no grid.

    Scores of cells should be means over the same seeds. A rate at which runs diverged belongs in with the score of a
    constant guess: without it a scheme that trains at half of the grid alone would look insensitive. Of rates that
    tie the smallest is `best`, and one of them at the edge is enough to be `at_edge`.
    """
    if len(scores) < 2:
        return None
    grid = sorted(scores)
    highest = max(scores.values())
    tops = [rate for rate in grid if scores[rate] == highest]
    return Sensitivity(tops[0], highest - min(scores.values()), grid[0] in tops or grid[-1] in tops)
