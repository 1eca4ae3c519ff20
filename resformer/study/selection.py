"""The learning rate of a condition, chosen on a slice of the training data. Stdlib only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from resformer.study.chance import chance, outcome
from resformer.study.plan import Condition, Run, Study
from resformer.study.results import Result

Look = Callable[[Run], Result]


@dataclass(frozen=True)
class Choice:
    """What the tuning runs of a condition found."""

    results: dict[float, Result]  # by learning rate, rising
    endpoint: str  # of the study: by it the rate is chosen

    @property
    def complete(self) -> bool:
        return all(result.finished for result in self.results.values())

    @property
    def rate(self) -> float | None:
        """The best of the grid; None while a run is not finished, or where all diverged.

        By score the highest, by training loss that with the lowest loss, on the slice; where it is equal the other of
        the two decides, and then the smaller rate. A run that diverged is worse than any other.
        """
        if not self.complete:
            return None
        ranked = {rate: _merit(result, self.endpoint) for rate, result in self.results.items()}
        sound = {rate: merit for rate, merit in ranked.items() if merit is not None}
        return max(sound, key=lambda rate: (sound[rate], -rate)) if sound else None

    @property
    def learned(self) -> bool:
        """Whether a run came below chance at any rate; of a task without such a line, whether one did not diverge."""
        runs = [result for result in self.results.values() if result.finished]
        threshold = chance(runs[0].config["task"], runs).threshold if runs else None
        return any(outcome(run, threshold) in ("learned", "scored") for run in runs)

    @property
    def edge(self) -> str | None:
        """ "smallest" or "largest" where the rate is the last of its side of the grid: better ones may lie beyond.

        None as well where the runs learned at no rate: which of them is least at chance says nothing.
        """
        rates = list(self.results)
        if self.rate is None or len(rates) < 2 or not self.learned:
            return None
        return "smallest" if self.rate == rates[0] else "largest" if self.rate == rates[-1] else None


def choices(study: Study, look: Look) -> dict[Condition, Choice]:
    """For every condition that is tuned, what its runs found; `look` reads a run as it stands on disk."""
    found = {condition: study.tuning(condition) for condition in study.conditions()}
    return {
        condition: Choice({run.learning_rate or 0.0: look(run) for run in sorted(runs, key=_rate)}, study.endpoint)
        for condition, runs in found.items()
        if runs
    }


def chosen(study: Study, look: Look) -> dict[Condition, float | None]:
    """The learning rate of each condition that has one by now, for `Study.runs`.

    Where every rate diverged it is the smallest: that the condition cannot be trained at any is a result, which its
    runs are to show.
    """
    return {
        condition: choice.rate if choice.rate is not None or not choice.complete else min(choice.results)
        for condition, choice in choices(study, look).items()
    }


def _rate(run: Run) -> float:
    return run.learning_rate or 0.0


def _merit(result: Result, endpoint: str) -> tuple[float, float] | None:
    """What is to be large; None for a run that diverged."""
    if result.status == "diverged" or result.score is None:
        return None
    loss = result.metrics.get("loss", 0.0)
    return (result.score, -loss) if endpoint == "score" else (-loss, result.score)
