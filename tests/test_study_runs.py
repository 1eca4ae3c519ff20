"""What single runs tell, against cases computed by hand: failures, learning-rate curves, steps to a target."""

import numpy as np
import pytest

from resformer.study.convergence import Steps, median_steps, steps_to
from resformer.study.failures import failure_rate
from resformer.study.sensitivity import Sensitivity, sensitivity


def test_wilson_interval_by_hand() -> None:
    # z = 1.959964, z^2 = 3.841459. None of 5: 0 to z^2 / (5 + z^2). 1 of 4: centre (1/4 + z^2 / 8) / (1 + z^2 / 4).
    none = failure_rate(0, 5)
    assert (none.rate, none.low, none.high) == pytest.approx((0.0, 0.0, 3.841459 / 8.841459), abs=1e-6)
    one = failure_rate(1, 4)
    centre, half = 0.25 + 3.841459 / 8, 1.959964 * np.sqrt(0.25 * 0.75 / 4 + 3.841459 / 64)
    scale = 1 + 3.841459 / 4
    assert (one.rate, one.low, one.high) == pytest.approx((0.25, (centre - half) / scale, (centre + half) / scale))
    assert failure_rate(4, 4).high == pytest.approx(1.0)
    assert failure_rate(1, 4, level=0.5).high < one.high


@pytest.mark.parametrize(("failed", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_counts(failed: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= failed <= n"):
        failure_rate(failed, n)


def test_learning_rate_curves() -> None:
    assert sensitivity({1e-3: 0.8, 3e-4: 0.75, 3e-3: 0.5}) == Sensitivity(1e-3, pytest.approx(0.3), False)
    assert sensitivity({1e-3: 0.8, 3e-4: 0.85, 3e-3: 0.5}) == Sensitivity(3e-4, pytest.approx(0.35), True)
    assert sensitivity({1e-3: 0.6, 3e-4: 0.5, 3e-3: 0.7}) == Sensitivity(3e-3, pytest.approx(0.2), True)
    assert sensitivity({1e-3: 0.8, 3e-4: 0.5, 3e-3: 0.8}) == Sensitivity(1e-3, pytest.approx(0.3), True)
    assert sensitivity({1e-3: 0.8}) is None
    assert sensitivity({}) is None


def test_steps_to_a_target() -> None:
    curve = [(25, 0.7), (50, 0.6), (75, 0.5), (100, 0.55)]
    assert steps_to(0.6, curve, 100) == Steps(50, True)
    assert steps_to(0.5, curve, 100) == Steps(75, True)
    assert steps_to(0.4, curve, 100) == Steps(100, False)
    assert steps_to(0.5, [(25, 0.7), (50, float("nan"))], 100) == Steps(100, False)
    assert steps_to(0.5, [], 100) == Steps(100, False)


def runs(reached: list[int], censored: list[int] | None = None) -> list[Steps]:
    return [*(Steps(step, True) for step in reached), *(Steps(step, False) for step in censored or [])]


def test_median_steps_by_hand() -> None:
    assert median_steps(runs([30, 10, 20])) == 20
    assert median_steps(runs([10, 20])) == 10  # S(10) = 1/2
    assert median_steps(runs([10, 20, 30, 40, 50, 60])) == 30  # 5/6 * 4/5 * 3/4 = 1/2
    assert median_steps(runs([10, 20], [100])) == 20
    # 5/6 at 10; the two censored at 12 leave 3 at risk: 5/6 * 2/3 = 5/9 at 20, 5/6 * 1/3 = 5/18 at 30.
    assert median_steps(runs([10, 20, 30, 40], [12, 12])) == 30
    assert median_steps(runs([10, 20, 30, 40])) == 20  # had they been left out
    assert median_steps(runs([10, 20, 30, 40], [100, 100])) == 30  # 5/6 * 4/5 * 3/4 = 1/2
    # 5/6 at 10; three censored at 12 leave 2 at risk: 5/6 * 1/2 = 5/12 at 20. To the end they would give 2/3.
    assert median_steps(runs([10, 20, 30], [12, 12, 12])) == 20
    assert median_steps(runs([10, 20, 30], [100, 100, 100])) == 30


def test_a_median_that_is_not_reached() -> None:
    assert median_steps(runs([10], [100, 100])) is None
    assert median_steps(runs([], [100, 100])) is None
    with pytest.raises(ValueError, match="no runs"):
        median_steps([])
