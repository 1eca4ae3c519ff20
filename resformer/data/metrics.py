"""The metrics of the tasks, from scikit-learn and scipy: no download, and a number also for constant predictions."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from resformer.data.tasks import Task


def _correlation(correlate: Callable) -> Callable[[NDArray, NDArray], float]:
    """The coefficient; 0.0 if either side is constant up to rounding, where it is not defined."""

    def measure(labels: NDArray, predictions: NDArray) -> float:
        if any(np.ptp(side) <= 1e-9 * np.abs(side).max() for side in (labels, predictions)):
            return 0.0
        return float(correlate(labels, predictions).statistic)

    return measure


def _matthews(labels: NDArray, predictions: NDArray) -> float:
    constant = len(np.unique(labels)) == 1 or len(np.unique(predictions)) == 1
    return 0.0 if constant else float(matthews_corrcoef(labels, predictions))


# Functions of (labels, predictions), each (examples,). F1 is that of class 1 and 0.0 where nothing is of class 1;
# macro F1 is the mean over the classes that occur on either side.
METRICS: dict[str, Callable[[NDArray, NDArray], float]] = {
    "accuracy": lambda labels, predictions: float(accuracy_score(labels, predictions)),
    "f1": lambda labels, predictions: float(f1_score(labels, predictions, zero_division=0.0)),
    "macro_f1": lambda labels, predictions: float(f1_score(labels, predictions, average="macro", zero_division=0.0)),
    "matthews": _matthews,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}


def evaluate(task: Task, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """All metrics of the task, those of its score first, as fractions (not percent).

    predictions, labels   (examples,): class ids, or finite scores for a regression

    Constant predictions give a correlation of 0.0. Raises ValueError for other shapes, no examples, ids that the
    task does not have (the test splits of GLUE are labelled -1) and scores that are not finite.
    """
    sides = {"predictions": np.asarray(predictions), "labels": np.asarray(labels)}
    shapes = {name: side.shape for name, side in sides.items()}
    if shapes["predictions"] != shapes["labels"] or len(shapes["labels"]) != 1 or not sides["labels"].size:
        raise ValueError(
            f"predictions {shapes['predictions']} and labels {shapes['labels']} must both be (examples,), at least one"
            "; take the argmax of class scores first"
        )
    for name, side in sides.items():
        if task.labels is None:
            side = sides[name] = side.astype(np.float64)
            if not np.isfinite(side).all():
                raise ValueError(f"{name} hold a value that is not finite")
        elif not np.isin(side, range(len(task.labels))).all():
            wrong = side[~np.isin(side, range(len(task.labels)))][0]
            raise ValueError(f"{name} hold {wrong!r}; {task.name!r} has the classes 0 to {len(task.labels) - 1}")
    return {name: METRICS[name](sides["labels"], sides["predictions"]) for name in (*task.metrics, *task.also)}


def loss(task: Task, logits: ArrayLike, labels: ArrayLike) -> float:
    """Mean cross-entropy in nats, of a regression mean squared error.

    logits   (examples, classes), of a regression (examples, 1)
    labels   (examples,)
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if task.labels is None:
        return float(np.mean((logits[:, 0] - labels) ** 2))
    return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]))


def score(task: Task, metrics: Mapping[str, float]) -> float:
    """The mean of `task.metrics`, as in official GLUE (mrpc: of accuracy and F1).

    `metrics` may hold others besides. Raises ValueError if one of these is missing.
    """
    missing: Sequence[str] = [name for name in task.metrics if name not in metrics]
    if missing:
        raise ValueError(f"the score of {task.name!r} needs {', '.join(missing)}; given: {', '.join(metrics)}")
    return sum(metrics[name] for name in task.metrics) / len(task.metrics)
