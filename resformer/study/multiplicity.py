"""P-values adjusted for the number of tests: Holm for declared ones, Benjamini-Hochberg for exploratory ones.

A test that could not be made (None: too few pairs, no spread) still counts as one of the family, as if its p-value
were 1: the family is what was planned, not what happened to finish.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import false_discovery_control


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values that control the probability of any false finding among the tests, in the order given.

    p~_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)) for the m sorted p-values p_(1) <= ... <= p_(m). Holds however
    the tests depend on each other; meant for the primary endpoint that was declared before the runs.
    """
    p = _family(p_values)
    order = np.argsort(p)
    steps = np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(steps)
    return _where_tested(p_values, adjusted)


def benjamini_hochberg(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values that control the expected share of false findings among the findings, in the order given.

    p~_(i) = min_{j >= i} min(1, m p_(j) / j) for the m sorted p-values. Holds for tests that are independent or
    positively dependent, as those against one common baseline roughly are; meant for exploratory cells.
    """
    p = _family(p_values)
    return _where_tested(p_values, false_discovery_control(p, method="bh") if len(p) else p)


def _family(p_values: Sequence[float | None]) -> np.ndarray:
    p = np.array([1.0 if value is None else value for value in p_values], dtype=float)
    wrong = p[~((p >= 0) & (p <= 1))]
    if len(wrong):
        raise ValueError(f"received p-value {wrong[0]}; allowed are 0 to 1, and None for a test that was not made")
    return p


def _where_tested(p_values: Sequence[float | None], adjusted: np.ndarray) -> list[float | None]:
    return [None if p is None else float(value) for p, value in zip(p_values, adjusted, strict=True)]
