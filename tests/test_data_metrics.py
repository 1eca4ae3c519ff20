import math
import warnings

import numpy as np
import pytest

from resformer.data.metrics import evaluate, loss, score
from resformer.data.tasks import TASKS, Task


def test_accuracy_and_f1_by_hand():
    # true positives 2, false positives 1, false negatives 1, true negatives 1
    found = evaluate(TASKS["mrpc"], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0])
    assert found == {"accuracy": pytest.approx(3 / 5), "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1))}
    assert score(TASKS["mrpc"], found) == pytest.approx((3 / 5 + 2 / 3) / 2)


def test_matthews_by_hand():
    # tp 2, fp 1, fn 1, tn 3
    found = evaluate(TASKS["cola"], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0])
    assert found == {"matthews": pytest.approx((2 * 3 - 1 * 1) / math.sqrt(3 * 3 * 4 * 4)), "accuracy": 5 / 7}
    assert score(TASKS["cola"], found) == found["matthews"]  # accuracy is stored, and no part of the score


def test_correlations_by_hand():
    found = evaluate(TASKS["stsb"], [0.0, 1.0, 2.0, 5.0], [0.0, 2.0, 1.0, 5.0])
    # means 2 and 2; products (-2)(-2) + (-1)(0) + 0(-1) + 3*3 = 13; squares 14 and 14
    # ranks differ by 0, 1, -1, 0: 1 - 6*2/(4*15)
    assert found == {"pearson": pytest.approx(13 / 14), "spearman": pytest.approx(0.8)}
    assert score(TASKS["stsb"], found) == pytest.approx((13 / 14 + 0.8) / 2)


@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("name", ["mrpc", "cola", "sst2"])
def test_constant_classes_give_numbers(name, constant):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(TASKS[name], [constant] * 4, [0, 1, 1, 1])
        assert evaluate(TASKS["cola"], [0, 1], [1, 1])["matthews"] == 0.0  # constant labels
    expected = {"accuracy": [0.25, 0.75], "f1": [0.0, 6 / 7], "matthews": [0.0, 0.0]}
    assert found == {metric: pytest.approx(expected[metric][constant]) for metric in found}


@pytest.mark.parametrize("constant", [0.0, 2.5, -1e-3])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_constant_scores_give_zero(constant, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(TASKS["stsb"], np.full(5, constant, kind), [0, 1, 2, 3, 4])
        one = evaluate(TASKS["stsb"], [1.0], [2.0])
    assert found == one == {"pearson": 0.0, "spearman": 0.0}


def test_three_classes():
    assert evaluate(TASKS["mnli"], np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])) == {"accuracy": 0.75}


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match=r"predictions \(2, 2\) and labels \(2,\).*argmax"):
        evaluate(TASKS["sst2"], [[0.1, 0.9], [0.8, 0.2]], [1, 0])
    with pytest.raises(ValueError, match="at least one"):
        evaluate(TASKS["sst2"], [], [])
    with pytest.raises(ValueError, match=r"labels hold .*-1.*'sst2' has the classes 0 to 1"):
        evaluate(TASKS["sst2"], [0, 1], [-1, -1])
    with pytest.raises(ValueError, match=r"predictions hold .*0.5"):
        evaluate(TASKS["sst2"], [0.5, 1.0], [0, 1])
    with pytest.raises(ValueError, match="predictions hold a value that is not finite"):
        evaluate(TASKS["stsb"], [float("nan"), 1.0], [0.0, 1.0])


def test_score_ignores_others_and_misses_none():
    assert score(TASKS["sst2"], {"accuracy": 0.5, "majority": 0.9}) == 0.5
    with pytest.raises(ValueError, match="'mrpc' needs f1; given: accuracy"):
        score(TASKS["mrpc"], {"accuracy": 0.5})


def test_macro_f1_by_hand():
    # class 0: precision 1, recall 1/2; class 1: 1/2, 1; class 2: nothing right
    task = Task("own", "", ("text",), ("a", "b", "c"), ("accuracy", "macro_f1"))
    found = evaluate(task, [0, 1, 1, 1], [0, 0, 1, 2])
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 1 / 2 + 0) / 3)}


def test_every_metric_of_glue_is_reported():
    found = {name: set(evaluate(task, [0, 1, 1], [0, 1, 0])) for name, task in TASKS.items()}
    assert found["cola"] == {"matthews", "accuracy"}
    assert found["mrpc"] == found["qqp"] == {"accuracy", "f1"}
    assert found["stsb"] == {"pearson", "spearman"}
    assert all(found[name] == {"accuracy"} for name in ("sst2", "mnli", "qnli", "rte", "wnli", "snli"))


def test_held_out_loss_by_hand():
    logits, labels = [[0.0, 0.0], [math.log(3), 0.0], [1000.0, 0.0]], [0, 1, 0]
    assert loss(TASKS["sst2"], logits, labels) == pytest.approx((math.log(2) + math.log(4) + 0) / 3)
    assert loss(TASKS["stsb"], [[1.0], [2.0]], [3.0, 2.5]) == pytest.approx((4 + 0.25) / 2)
