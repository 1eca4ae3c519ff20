"""How often intervals cover the truth, by simulation with a fixed generator."""

import numpy as np
import pytest

from resformer.study.stats import estimate


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_t_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    generator = np.random.default_rng(0)
    draws = generator.normal(size=(4000, n))
    missed = sum(estimate(draw).excludes(0.0) for draw in draws)
    assert 0.93 <= 1 - missed / len(draws) <= 0.97
