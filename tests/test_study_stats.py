"""Estimates against cases computed by hand."""

import numpy as np
import pytest

from resformer.study.stats import Estimate, comparison, detectable, estimate, paired_difference, stars


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


def test_p_value_by_hand() -> None:
    # Mean 2, standard deviation 1: t = 2 sqrt(3), and with 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(t^2 + 2)
    found = estimate([1, 2, 3])
    assert found.p_value == pytest.approx(1 - np.sqrt(12 / 14))
    assert estimate([-1, -2, -3]).p_value == pytest.approx(found.p_value)
    assert estimate([-1, 0, 1]).p_value == pytest.approx(1.0)


def test_p_value_agrees_with_the_interval() -> None:
    for shift in np.linspace(-3, 3, 61):
        found = estimate([shift - 1, shift, shift + 0.5, shift + 1.2])
        assert found.p_value is not None
        assert (found.p_value < 0.05) == found.excludes(0)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.7], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0]])
def test_no_p_value_without_a_spread_to_test_against(values: list[float]) -> None:
    assert estimate(values).p_value is None


@pytest.mark.parametrize(
    ("sd", "expected"),
    [(2.4, [11.1, 5.7, 3.4, 2.2]), (1.0, [4.6, 2.4, 1.4, 0.9]), (0.3, [1.4, 0.7, 0.4, 0.3])],
)
def test_detectable_differences_of_glue_tasks(sd: float, expected: list[float]) -> None:
    found = [detectable(np.sqrt(2) * sd, n) for n in (3, 5, 10, 20)]
    assert found == pytest.approx(expected, abs=0.051)


def test_a_true_difference_of_the_detectable_size_is_found_that_often() -> None:
    generator = np.random.default_rng(0)
    size = detectable(2.0, 5, power=0.9)
    assert size is not None
    draws = generator.normal(size, 2.0, size=(4000, 5))
    found = [gap for gap in map(estimate, draws) if gap.excludes(0) and gap.mean > 0]
    assert len(found) / len(draws) == pytest.approx(0.9, abs=0.015)


def test_detectable_at_its_limits() -> None:
    assert detectable(1.0, 2) is None
    assert detectable(0.0, 5) == 0.0
    for bad in ({"sd": -1.0}, {"sd": np.nan}, {"power": 0.4}, {"power": 1.0}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match="allowed are"):
            detectable(**{"sd": 1.0, "n": 5, **bad})


def test_a_comparison_says_no_more_than_it_knows() -> None:
    # A half width of 0.95 at n = 5: sd = 0.95 sqrt(5) / 2.7764451
    gap = Estimate(0.15, 5, 0.95 * np.sqrt(5) / 2.7764451)
    assert comparison(gap, 1) == "no detectable difference (95% interval −0.8 to +1.1, n=5, detectable 1.3)"
    # 2.63 standard deviations at alpha 0.01, n = 5, against 1.68 at 0.05
    strict = comparison(Estimate(0.15, 5, gap.sd, 0.99), 1)
    assert strict == "no detectable difference (99% interval −1.4 to +1.7, n=5, detectable 2.0)"
    assert comparison(Estimate(2.0, 5, gap.sd), 2) == "+2.00 (95% interval +1.05 to +2.95, n=5)"
    assert comparison(Estimate(2.0, 5, gap.sd, 0.99), 2) == "+2.00 (99% interval +0.42 to +3.58, n=5)"
    assert comparison(estimate([0.01, 0.02])) == "+0.015 (exploratory: n=2, no interval)"
    assert comparison(estimate([-0.1, -0.1, -0.1])) == "−0.100 at every seed (n=3, no spread to judge by)"


def test_stars_need_six_pairs() -> None:
    assert [stars(p, 6) for p in (0.2, 0.05, 0.049, 0.009, 0.0009, None)] == ["", "", "*", "**", "***", ""]
    assert stars(0.0009, 5) == ""
