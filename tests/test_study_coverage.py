"""How often intervals cover the truth, by simulation with a fixed generator."""

import numpy as np
import pytest

from resformer.study.coverage import MEASURED, bootstrap_coverage, coverage_sentence
from resformer.study.stats import estimate


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_t_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    generator = np.random.default_rng(0)
    draws = generator.normal(size=(4000, n))
    missed = sum(estimate(draw).excludes(0.0) for draw in draws)
    assert 0.93 <= 1 - missed / len(draws) <= 0.97


@pytest.mark.parametrize(
    ("runs", "failing"), [case if case[0] == 10 else pytest.param(*case, marks=pytest.mark.slow) for case in MEASURED]
)
def test_the_bootstrap_covers_what_was_measured(runs: int, failing: float) -> None:
    found = bootstrap_coverage(runs, failing, np.random.default_rng(1), trials=250)
    assert found == pytest.approx(MEASURED[runs, failing], abs=0.05)


def test_no_coverage_of_intervals_that_are_not_given() -> None:
    with pytest.raises(ValueError, match="9 runs"):
        bootstrap_coverage(9, 0.0, np.random.default_rng(0), trials=1)


def test_the_coverage_in_words() -> None:
    assert coverage_sentence() == (
        "In simulations of 8 tasks the nominal 95% bootstrap interval covered the truth in 94% at 10 seeds and 95% at "
        "20 (paired difference: 94% and 95%); where 15% of seeds fail in all tasks in 80% at 10 seeds and 94% at 20 "
        "(paired difference: 93% and 93%), since few seeds may show no failure."
    )
