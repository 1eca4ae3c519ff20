"""A run made ready, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from resformer.train.loop import Part, Step


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    score: float  # larger is better
    metrics: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)  # examples of each split
    found: Any = None  # what the metrics were computed from, for whoever evaluates

    @property
    def finite(self) -> bool:
        """Whether the model still computes numbers."""
        return math.isfinite(self.score)


@dataclass(frozen=True)
class Job:
    """What a run trains on, checked and made ready.

    Args:
        config: all that the outcome depends on.
        accelerator: of the precision that is asked for.
        epoch: optimizer steps in one pass over the data.
        batches: (steps taken, process, processes) -> this process's parts of each further batch.
        first: the first batch whole, by which schemes calibrate that ask for it.
        evaluate: the prepared model -> an `Evaluation`; called on every process.
        flags: (the last evaluation, the final training loss) -> what to notice.
        units: what is counted ("examples", "tokens"), and how many of them a step has on average.
        tokens: of text in a step, on average.
        heaviest: n -> the n examples that take the most memory, as one batch.
        predicted: share of the tokens for which the model computes logits over its vocabulary.
        around: within which the model computes the job.
    """

    config: dict[str, Any]
    accelerator: Accelerator
    epoch: int
    batches: Callable[[int, int, int], Iterator[list[Part]]]
    first: Callable[[], dict[str, Tensor]]
    evaluate: Callable[[Any], Evaluation]
    flags: Callable[[Evaluation, float], list[str]]
    units: tuple[str, float]
    tokens: float
    heaviest: Callable[[int], dict[str, Tensor]]
    predicted: float = 1.0
    around: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass
class Outcome:
    """What a run did.

    `status` is "ok", "diverged" (a loss or an evaluation that is not finite) or "stopped" (asked to, and saved).
    """

    status: str = "ok"
    steps: list[Step] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # {"step", "score", "metrics"}
    last: Evaluation | None = None
    seconds: float = 0.0  # of training alone, over all sittings
    notes: list[str] = field(default_factory=list)  # what a user should know: a broken checkpoint, a full disk

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation, the earliest of equals."""
        return max(self.evaluations, key=lambda one: one["score"], default=None)
