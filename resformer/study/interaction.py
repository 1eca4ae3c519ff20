"""Whether a scheme's advantage changes with depth: slopes over log2(depth), and from where on it is resolved."""

import math
from collections.abc import Mapping

import numpy as np

from resformer.diagnostics import lines
from resformer.study.stats import Estimate, paired_difference

Scores = Mapping[int, Mapping[int, float]]  # depth -> seed -> score


def slope(scores: Mapping[int, float]) -> float:
    """Least-squares slope of score y on x = log2(depth), depth -> score: the gain in score for a doubling of depth.

    b = sum_d (x_d - mean x)(y_d - mean y) / sum_d (x_d - mean x)^2. Raises ValueError below two depths.
    """
    if len(scores) < 2:
        raise ValueError(f"slope: received depths {sorted(scores)}; a slope takes at least two")
    return lines.slope([math.log2(depth) for depth in scores], list(scores.values()))


def slope_difference(scores: Scores, baseline: Scores, level: float = 0.95) -> Estimate | None:
    """`slope` of a scheme - `slope` of the baseline, paired by seed: the interaction of depth and scheme.

    Only depths that both have count, and only seeds that have a score at all of them: a slope over other depths is
    another quantity. None where fewer than two depths or no seed remain.
    """
    depths = sorted(depth for depth in scores.keys() & baseline.keys() if scores[depth] and baseline[depth])
    if len(depths) < 2:
        return None
    return paired_difference(_slopes(scores, depths), _slopes(baseline, depths), level)


def _slopes(scores: Scores, depths: list[int]) -> dict[int, float]:
    complete = set.intersection(*(set(scores[depth]) for depth in depths))
    return {seed: slope({depth: scores[depth][seed] for depth in depths}) for seed in sorted(complete)}


def resolved_from(gaps: Mapping[int, Estimate | None]) -> int | None:
    """The smallest depth from which on the paired difference excludes zero, with one sign, at every depth of `gaps`.

    None where there is no such depth ("none found"); a depth without an interval excludes nothing. The deepest
    interval has to exclude zero whatever the others do, so that without any true difference a depth is found with
    probability 1 - level at most, at any number of depths. It is the depth where the difference rises above the
    noise of these seeds, not where it begins: more seeds find smaller depths.
    """
    found, sign = None, 0.0
    for depth, gap in sorted(gaps.items(), reverse=True):
        if gap is None or not gap.excludes(0) or (found is not None and np.sign(gap.mean) != sign):
            break
        found, sign = depth, np.sign(gap.mean)
    return found
