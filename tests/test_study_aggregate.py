"""Interquartile means and their intervals against cases computed by hand."""

import numpy as np
import pytest

from resformer.study.aggregate import aggregate, aggregate_difference, interquartile_mean, normalised


def test_scores_on_a_common_scale() -> None:
    found = normalised([[0.5, 0.9], [0.8, 0.6], [0.95, 0.7]], majority=[0.5, 0.7], reference=[0.9, 0.8])
    assert found == pytest.approx(np.array([[0.0, 2.0], [0.75, -1.0], [1.125, 0.0]]))
    with pytest.raises(ValueError, match="above the score of the constant guess"):
        normalised([[0.5, 0.9]], majority=[0.5, 0.7], reference=[0.9, 0.7])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[7.0]], 7.0),
        ([[1.0, 5.0]], 3.0),  # each of the two reaches half into the middle
        ([[9.0], [1.0], [2.0]], 3.0),  # quartiles at 0.75 and 2.25: (0.25 * 1 + 1 * 2 + 0.25 * 9) / 1.5
        ([[0.0, 1.0], [3.0, 100.0]], 2.0),  # four: the middle two
        ([[0.0, 1.0, 2.0], [4.0, 8.0, 100.0]], 3.5),  # 1.5 to 4.5: (0.5 * 1 + 2 + 4 + 0.5 * 8) / 3
        ([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 1000.0]], 4.5),
    ],
)
def test_interquartile_mean_by_hand(scores: list[list[float]], expected: float) -> None:
    assert interquartile_mean(scores) == pytest.approx(expected)
    assert interquartile_mean(scores[::-1]) == pytest.approx(expected)


def test_no_interval_below_ten_runs() -> None:
    scores = np.random.default_rng(0).normal(size=(9, 3))
    found = aggregate(scores, np.random.default_rng(0))
    assert (found.value, found.runs, found.tasks) == (interquartile_mean(scores), 9, 3)
    assert found.low is found.high is None
    assert aggregate(np.vstack([scores, scores[:1]]), np.random.default_rng(0)).low is not None


def test_the_interval_by_hand() -> None:
    # One task, 12 runs, 8 of them 1 and 4 of them 0. A resample has k ones, k ~ Binomial(12, 2/3), and the middle
    # half of 12 has the mean (min(max(k, 3), 9) - 3) / 6. The tail is Phi(-2.2010 sqrt(12 / 11)) = 1.1 %, where
    # k = 4: P(k <= 3) = 0.4 %, P(k <= 4) = 1.9 %. A tail of 2.5 % would end at k = 5.
    found = aggregate(np.array([[1.0]] * 8 + [[0.0]] * 4), np.random.default_rng(0))
    assert (found.low, found.value, found.high) == pytest.approx((1 / 6, 5 / 6, 1.0))
    narrow = aggregate(np.array([[1.0]] * 8 + [[0.0]] * 4), np.random.default_rng(0), level=0.5)
    assert narrow.low == pytest.approx(2 / 3)  # 23.3 %, where k = 7: P(k <= 6) = 17.8 %, P(k <= 7) = 36.8 %


def test_a_seed_is_drawn_with_all_its_tasks() -> None:
    # Task 2 mirrors task 1, so that every resample of whole rows is symmetric about 0: its middle half has mean 0.
    column = np.random.default_rng(0).normal(size=(12, 1))
    found = aggregate(np.hstack([column, -column]), np.random.default_rng(0))
    assert (found.low, found.value, found.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def test_a_difference_is_paired_by_seed() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(12, 3))
    found = aggregate_difference(scores + 0.25, scores, np.random.default_rng(0))
    assert (found.low, found.value, found.high) == pytest.approx((0.25, 0.25, 0.25))
    other = generator.normal(size=(12, 3))
    apart = aggregate_difference(scores, other, np.random.default_rng(0))
    assert apart.value == pytest.approx(interquartile_mean(scores) - interquartile_mean(other))
    back = aggregate_difference(other, scores, np.random.default_rng(0))
    assert (back.low, back.high) == pytest.approx((-apart.high, -apart.low))
    assert aggregate_difference(scores[:9], other[:9], generator).low is None


def test_the_same_generator_gives_the_same_interval() -> None:
    scores = np.random.default_rng(0).normal(size=(10, 2))
    assert aggregate(scores, np.random.default_rng(3)) == aggregate(scores, np.random.default_rng(3))
    assert aggregate(scores, np.random.default_rng(3)) != aggregate(scores, np.random.default_rng(4))


def test_scores_that_are_no_table() -> None:
    generator = np.random.default_rng(0)
    for wrong in ([0.5, 0.6], np.empty((0, 3)), [[[0.5]]]):
        with pytest.raises(ValueError, match="runs x tasks"):
            aggregate(wrong, generator)
    with pytest.raises(ValueError, match="1 scores that are missing"):
        aggregate([[0.5, np.nan]], generator)
    with pytest.raises(ValueError, match="same seeds and tasks"):
        aggregate_difference([[0.5, 0.6]], [[0.5], [0.6]], generator)
