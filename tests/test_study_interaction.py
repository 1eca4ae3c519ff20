"""Slopes over depth and the depth of resolution against cases computed by hand."""

import numpy as np
import pytest

from resformer.study.interaction import resolved_from, slope, slope_difference
from resformer.study.stats import Estimate, estimate


def test_slope_by_hand() -> None:
    # x = log2 of 2, 4, 16 = 1, 2, 4; mean 7/3; deviations -4/3, -1/3, 5/3; sum of squares 42/9
    # y = 0.5, 0.7, 0.6: the sum of products is (-4/3) 0.5 + (-1/3) 0.7 + (5/3) 0.6 = 0.1
    assert slope({2: 0.5, 4: 0.7, 16: 0.6}) == pytest.approx(0.1 * 9 / 42)
    assert slope({16: 0.6, 2: 0.5, 4: 0.7}) == pytest.approx(0.1 * 9 / 42)
    assert slope({6: 0.9, 12: 0.8, 24: 0.7}) == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="at least two"):
        slope({6: 0.9})


def test_slopes_are_compared_by_seed() -> None:
    # Over depths 6 and 12 a slope is the difference: 0.1, 0.2, 0.3 less 0.0, 0.2, 0.1
    scheme = {6: {0: 0.5, 1: 0.5, 2: 0.5, 5: 0.1}, 12: {0: 0.6, 1: 0.7, 2: 0.8}}
    baseline = {6: {2: 0.4, 1: 0.4, 0: 0.4}, 12: {0: 0.4, 1: 0.6, 2: 0.5, 7: 0.9}}
    found = slope_difference(scheme, baseline)
    assert found is not None
    assert (found.n, found.mean) == (3, pytest.approx(0.1))
    assert found.sd == pytest.approx(0.1)


def test_slopes_take_the_depths_that_both_have() -> None:
    scheme = {6: {0: 0.5, 1: 0.6}, 12: {0: 0.6, 1: 0.6}, 24: {0: 9.0}}
    baseline = {6: {0: 0.5, 1: 0.5}, 12: {0: 0.5, 1: 0.5}, 24: {}, 48: {0: 9.0, 1: 9.0}}
    found = slope_difference(scheme, baseline)
    assert found is not None
    assert (found.n, found.mean) == (2, pytest.approx(0.05))
    assert slope_difference({6: {0: 0.5}}, baseline) is None
    assert slope_difference({6: {0: 0.5}, 12: {1: 0.5}}, baseline) is None


UP, DOWN, OPEN = Estimate(1.0, 5, 0.1), Estimate(-1.0, 5, 0.1), Estimate(0.1, 5, 1.0)
FEW, FLAT = Estimate(1.0, 2, None), Estimate(1.0, 5, 0.0)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ({6: OPEN, 12: UP, 24: UP}, 12),
        ({24: UP, 6: OPEN, 12: UP}, 12),
        ({6: UP, 12: OPEN, 24: UP}, 24),
        ({6: DOWN, 12: DOWN, 24: DOWN}, 6),
        ({6: DOWN, 12: UP, 24: UP}, 12),
        ({6: UP, 12: UP, 24: OPEN}, None),
        ({6: UP, 12: UP, 24: FEW}, None),
        ({6: UP, 12: UP, 24: FLAT}, None),
        ({6: UP, 12: None, 24: UP}, 24),
        ({6: UP, 12: UP, 24: None}, None),
        ({}, None),
    ],
)
def test_resolved_from(gaps: dict[int, Estimate | None], expected: int | None) -> None:
    assert resolved_from(gaps) == expected


def test_without_a_difference_a_depth_is_rarely_found() -> None:
    draws = np.random.default_rng(0).normal(size=(2000, 4, 5))
    found = sum(
        resolved_from(dict(zip((6, 12, 24, 48), map(estimate, draw), strict=True))) is not None for draw in draws
    )
    assert found / len(draws) == pytest.approx(0.05, abs=0.015)
