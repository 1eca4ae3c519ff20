import math

import numpy as np
import pytest

from resformer.data.tasks import Task
from resformer.train.flags import flags, spiked, text_flags

CLASSES = Task("toy", "", ("sentence",), ("a", "b", "c"), ("accuracy",))
SCORE = Task("toy_score", "", ("sentence",), None, ("pearson",))


def test_a_spike_is_far_above_the_steps_before_it_and_not_at_the_start():
    calm = [1.0 + 0.5 * (i % 3) for i in range(120)]
    assert not spiked(calm)
    assert not spiked([30.0, *calm[1:]]), "gradients at the start are often large"
    assert spiked([*calm[:100], 16.0, *calm[101:]])
    assert not spiked([*calm[:100], 14.0, *calm[101:]]), "less than ten times the median of 1.5"
    assert not spiked([*calm[:100], float("inf"), *calm[101:]]), "that is a divergence"
    assert spiked([1.3**i for i in range(60)]), "a gradient that grows fast"
    assert not spiked([1.1**i for i in range(60)])


def found(task, predictions, labels, *, train_loss=0.0, truncated=0.0):
    return flags(task, np.array(predictions), np.array(labels), train_loss=train_loss, truncated=truncated)


def test_a_loss_above_chance_is_over_it_by_five_per_cent():
    labels = [0, 1, 2] * 4
    for times, expected in ((1.04, []), (1.06, ["loss_above_chance"])):
        assert found(CLASSES, labels, labels, train_loss=times * math.log(3)) == expected
        metrics = {"loss": 1.0, "unigram_loss": 2.0}
        assert text_flags(metrics, train_loss=times * math.log(500), vocabulary=500) == expected
    assert found(SCORE, labels, labels, train_loss=100.0) == [], "squares have no such chance"


@pytest.mark.parametrize(("times", "expected"), [(1.9, ["at_chance"]), (2.1, [])])
def test_at_chance_is_a_correlation_below_two_standard_errors(times, expected):
    """Of scores, Pearson's: cosine and sine over whole periods are orthogonal. Of classes, Matthews'."""
    n, angle = 1600, np.arange(1600) * 2 * np.pi / 20
    r = times / math.sqrt(n)
    assert found(SCORE, r * np.cos(angle) + math.sqrt(1 - r**2) * np.sin(angle), np.cos(angle)) == expected
    right = round((1 + r) / 2 * n / 2)  # of each of two classes
    each = np.arange(n // 2) < right
    assert found(CLASSES, np.concatenate([each, ~each]).astype(int), [1] * (n // 2) + [0] * (n // 2)) == expected


def test_scores_that_hardly_differ_are_constant():
    labels = np.linspace(0.0, 1.0, 50)
    assert found(SCORE, 3.0 + 0.9e-9 * labels, labels) == ["constant_prediction", "at_chance"]
    assert found(SCORE, 3.0 + 1.1e-9 * labels, labels) == []


def test_inputs_are_truncated_above_five_per_cent():
    labels = [0, 1, 2] * 4
    assert found(CLASSES, labels, labels, truncated=0.05) == []
    assert found(CLASSES, labels, labels, truncated=0.06) == ["truncated_inputs"]
