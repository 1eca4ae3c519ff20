"""The factor of the learning rate, step by step."""

import pytest

from resformer.train.schedule import SCHEDULES, factor


def values(schedule, steps=10, warmup=0.0):
    at = factor(schedule, steps=steps, warmup=warmup)
    return [round(at(step), 6) for step in range(steps)]


def test_linear_falls_to_nothing():
    assert values("linear") == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert factor("linear", steps=10, warmup=0.0)(10) == 0


def test_hold_falls_to_a_tenth_over_the_second_half():
    assert values("hold") == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.82, 0.64, 0.46, 0.28]
    assert factor("hold", steps=10, warmup=0.0)(10) == pytest.approx(0.1)


def test_constant_stays():
    assert values("constant") == [1.0] * 10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_first_and_then_the_schedule_starts_at_the_peak(schedule):
    warm = values(schedule, steps=14, warmup=4 / 14)
    assert warm[:4] == [0.25, 0.5, 0.75, 1.0]
    assert warm[4:] == values(schedule, steps=10)


def test_one_step_of_any_schedule_learns():
    for schedule in SCHEDULES:
        assert values(schedule, steps=1, warmup=0.9)[0] == 1.0


@pytest.mark.parametrize("warmup", [-0.1, 1.0, 100, float("nan")])
def test_warmup_is_a_share(warmup):
    with pytest.raises(ValueError, match="share of the steps"):
        factor("linear", steps=10, warmup=warmup)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"unknown schedule 'liner'\. Did you mean 'linear'"):
        factor("liner", steps=10, warmup=0)
