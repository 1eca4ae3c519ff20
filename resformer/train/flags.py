"""What to notice about a finished run. Needs no torch."""

import math
from collections.abc import Sequence
from statistics import median

import numpy as np

from resformer.data.tasks import Task

SPIKE, BEFORE = 10.0, 25  # times the median norm of the gradient over so many steps before

FLAGS: dict[str, str] = {
    "gradient_spikes": f"a gradient was over {SPIKE:.0f} times as large as the median of the {BEFORE} steps before",
    "constant_prediction": "gave every validation example the same answer",
    "at_chance": "correlation of answers and labels below two standard errors (2 / sqrt(examples))",
    "loss_above_chance": "final training loss above that of guessing uniformly, ln(classes), by more than 5 %",
    "truncated_inputs": "more than 5 % of the training examples were cut to the maximal length",
    "no_context": "held-out loss not below that of the best guess without context (context_free_loss, unigram_loss)",
}


def flags(task: Task, predictions: np.ndarray, labels: np.ndarray, *, train_loss: float, truncated: float) -> list[str]:
    """The flags of a run, from its predictions (classes or scores) on one split, in the order of `FLAGS`.

    `train_loss` is the final training loss, `truncated` the share of training examples that were cut.
    """
    constant = bool(np.ptp(predictions) <= 1e-9)
    raised = {
        "constant_prediction": constant,
        "at_chance": constant or _correlation(task, predictions, labels) < 2 / math.sqrt(len(labels)),
        "loss_above_chance": task.labels is not None and train_loss > 1.05 * math.log(len(task.labels)),
        "truncated_inputs": truncated > 0.05,
    }
    return [name for name in FLAGS if raised.get(name)]


def text_flags(metrics: dict[str, float], *, train_loss: float, vocabulary: int) -> list[str]:
    """The flags of a pre-training run, from what its evaluation found and its final training loss."""
    raised = {
        "loss_above_chance": train_loss > 1.05 * math.log(vocabulary),
        "no_context": metrics["loss"] >= metrics.get("context_free_loss", metrics["unigram_loss"]),
    }
    return [name for name in FLAGS if raised.get(name)]


def spiked(norms: Sequence[float]) -> bool:
    """Whether the norm of any gradient, after the first steps, was far larger than those before it."""
    return any(
        norms[i] > SPIKE * median(norms[i - BEFORE : i])
        for i in range(2 * BEFORE, len(norms))
        if math.isfinite(norms[i])
    )


def _correlation(task: Task, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' coefficient for classes, Pearson's for scores; both are 0 within 1 / sqrt(n) by chance."""
    if task.labels is None:
        return float(np.corrcoef(predictions, labels)[0, 1]) if labels.std() > 0 else 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))
