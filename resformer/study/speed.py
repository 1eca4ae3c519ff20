"""How fast the arms of a setting converge: training loss at fixed steps, and steps to a loss that all are held to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from resformer.study.convergence import Steps, median_steps, steps_to
from resformer.study.results import Result
from resformer.study.stats import Estimate, estimate
from resformer.study.summary import Cell, Setting

FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the steps of a run


@dataclass(frozen=True)
class Target:
    """The training loss that counts as having got there, in words too."""

    loss: float
    words: str


@dataclass(frozen=True)
class Speed:
    """Of one cell: mean loss at each of `FRACTIONS`, and the steps that its runs took to the target."""

    cell: Cell
    at: tuple[Estimate | None, ...]
    runs: tuple[Steps, ...]  # empty without a target

    @cached_property
    def median(self) -> int | None:
        """Over seeds; None where half of them did not get there."""
        return median_steps(self.runs) if self.runs else None

    @property
    def reached(self) -> int:
        return sum(run.reached for run in self.runs)


def target(setting: Setting) -> Target | None:
    """What the baseline's median run has at three quarters of its steps, at the shallowest depth where it finished.

    Not its last loss: half of its own runs would then just miss it. None where the baseline does not learn there, and
    where no curve was kept: then there is nothing to be held to.
    """
    for depth in setting.depths if setting.baseline else ():
        cell = setting.cells[str(setting.baseline), depth]
        losses = [loss for run in cell.finished if (loss := loss_at(run, 0.75, setting)) is not None]
        if not losses:
            continue
        loss, threshold = median(losses), setting.chance.threshold
        if threshold is not None and loss >= threshold:
            return None
        where = f"{setting.baseline} at depth {depth}"
        return Target(loss, f"{loss:.3g}, which the median run of {where} has after three quarters of its steps")
    return None


def speeds(setting: Setting) -> list[Speed]:
    """Of every cell with a finished run that kept its curve."""
    goal = target(setting)
    found = []
    for cell in setting.cells.values():
        runs = [run for run in cell.finished if run.loss_curve or run.status == "diverged"]
        if runs:
            at = tuple(_mean_at(runs, fraction, setting) for fraction in FRACTIONS)
            taken = [steps_to(goal.loss, run.loss_curve, length(run, setting)) for run in runs] if goal else []
            found.append(Speed(cell, at, tuple(taken)))
    return found


def length(run: Result, setting: Setting) -> int:
    """The steps of a run's schedule; of one that diverged and counts epochs, those of the others."""
    if run.config.get("steps"):
        return int(run.config["steps"])
    made = [r.cost.get("steps") or (r.loss_curve[-1][0] if r.loss_curve else 0) for r in (run, *setting.finished)]
    return int(made[0] if run.status == "ok" else max(made))


def loss_at(run: Result, fraction: float, setting: Setting) -> float | None:
    """Mean loss of the window that ends nearest to a fraction of the steps; None where the run did not get there."""
    step, curve = fraction * length(run, setting), run.loss_curve
    if not curve:
        return None
    window = curve[0][0]
    end, loss = min(curve, key=lambda point: abs(point[0] - step))
    return loss if abs(end - step) <= window / 2 else None


def _mean_at(runs: Sequence[Result], fraction: float, setting: Setting) -> Estimate | None:
    """A run that diverged counts with the loss of a constant guess from then on."""
    found = []
    for run in runs:
        loss = loss_at(run, fraction, setting)
        if loss is None and run.status == "diverged":
            loss = setting.chance.loss
        if loss is not None:
            found.append(loss)
    return estimate(found) if found else None
