"""What a constant guess of a task gets: the line that a run has to pass before it has learned anything."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from resformer.data.tasks import TASKS
from resformer.study.results import Result

FAR = 1.5  # a final training loss above this many times the threshold of chance is "worse than chance"
NEAR = 0.98  # a final training loss from this share of the constant guess's on is "at chance"


@dataclass(frozen=True)
class Chance:
    """What the best constant guess of a task gets; None where that is not known."""

    score: float | None = None
    loss: float | None = None  # on the training data: the entropy of their classes

    @cached_property
    def threshold(self) -> float | None:
        """The final training loss from which on a run is at chance; always below the constant guess's."""
        if self.loss is None:
            return None
        near = NEAR * self.loss
        short = round(near, 2)  # for people; too coarse where the guess is nearly always right
        return short if abs(short - near) < (self.loss - near) / 2 else float(f"{near:.3g}")

    def of(self, endpoint: str) -> float | None:
        return self.score if endpoint == "score" else self.loss


def chance(name: str, finished: Sequence[Result]) -> Chance:
    """What a constant guess of a task gets: by score always the most frequent class of the evaluated examples, by loss
    the shares of the training examples' classes; of runs that report no such shares, those of the evaluated ones.

    F1 is that of class 1, the majority of MRPC and a minority elsewhere; a correlation with a constant counts as 0.
    """
    task = TASKS.get(name)
    if task is None:
        return Chance()
    shares = [value for run in finished for key, value in run.metrics.items() if key.startswith("majority")]
    majority = sum(shares) / len(shares) if shares else None
    found: list[float | None] = []
    for metric in task.metrics:
        if metric in ("matthews", "pearson", "spearman"):
            found.append(0.0)
        elif metric == "f1":
            found.append(0.0 if name != "mrpc" else None if majority is None else 2 * majority / (1 + majority))
        else:
            found.append(majority)
    known = [value for value in found if value is not None]
    score = sum(known) / len(known) if len(known) == len(found) else None
    if task.labels is None:
        return Chance(score, None)
    entropies = [_entropy(run.diagnostics["class_shares"]) for run in finished if run.diagnostics.get("class_shares")]
    if entropies:
        return Chance(score, sum(entropies) / len(entropies))
    if len(task.labels) == 2 and majority is not None and majority < 1:
        return Chance(score, _entropy((majority, 1 - majority)))
    return Chance(score, math.log(len(task.labels)))


def outcome(run: Result, threshold: float | None) -> str:
    """How a finished run ended: learned, chance, worse (than chance), diverged, or scored without a threshold.

    One that gives every example the same answer has not learned, whatever its last batches happened to hold.
    """
    if run.status == "diverged":
        return "diverged"
    if threshold is None:
        return "scored"
    if run.train_loss is None:
        return "chance"
    if run.train_loss < threshold and "constant_prediction" not in run.flags:
        return "learned"
    return "chance" if run.train_loss <= FAR * threshold else "worse"


def _entropy(shares: Iterable[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0)
