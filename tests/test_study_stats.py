"""Estimates against cases computed by hand, and their coverage."""

import numpy as np
import pytest

from resformer.study.stats import estimate, paired_difference


def test_mean_and_half_width_by_hand() -> None:
    # mean 3, standard deviation 1, t(0.975, 4) = 2.776445: half = 2.776445 * sqrt(2.5) / sqrt(5)
    found = estimate([1, 2, 3, 4, 5])
    assert (found.mean, found.n) == (3.0, 5)
    assert found.half == pytest.approx(2.7764451 * np.sqrt(2.5 / 5), rel=1e-6)
    assert found.excludes(0.9)
    assert not found.excludes(1.1)
    assert estimate([1, 2, 3, 4, 5], level=0.99).half == pytest.approx(4.6040949 * np.sqrt(2.5 / 5), rel=1e-6)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.7]])
def test_no_interval_below_three_runs(values: list[float]) -> None:
    found = estimate(values)
    assert found.half is None
    assert not found.excludes(100.0)


def test_identical_values_exclude_nothing() -> None:
    found = estimate([0.7 - 0.6, 0.8 - 0.7, 0.9 - 0.8])  # the same but for rounding
    assert found.flat
    assert not found.excludes(0.0)
    assert not estimate([0.1, 0.1, 0.1001]).flat
    assert not estimate([0.1, 0.1]).flat


def test_a_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_differences_are_paired_by_seed() -> None:
    found = paired_difference({0: 0.9, 1: 0.7, 2: 0.8, 9: 0.0}, {2: 0.6, 0: 0.8, 1: 0.6, 7: 1.0})
    assert found is not None
    assert found.n == 3
    assert found.mean == pytest.approx(0.4 / 3)  # 0.1, 0.1, 0.2
    assert found.half == pytest.approx(4.3026527 * np.std([0.1, 0.1, 0.2], ddof=1) / np.sqrt(3), rel=1e-6)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    generator = np.random.default_rng(0)
    draws = generator.normal(size=(4000, n))
    missed = sum(estimate(draw).excludes(0.0) for draw in draws)
    assert 0.93 <= 1 - missed / len(draws) <= 0.97
