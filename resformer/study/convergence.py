"""How fast runs converge: steps to a target training loss, censored where a run does not reach it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import CensoredData, ecdf


@dataclass(frozen=True)
class Steps:
    """The step at which a run reached the target; where not `reached`, the step to which it is known not to have."""

    step: int
    reached: bool


def steps_to(target: float, curve: Sequence[Sequence[float]], watched: int) -> Steps:
    """The first logged step of a loss `curve` (step, loss) at which the loss is at or below `target`.

    Where there is none the run is censored at `watched`: the last step of the schedule for a run that finished or
    diverged, since a diverged run would not have got there either, and the last step logged for one that is still
    going. Precise to the distance between logged steps.
    """
    reached = [step for step, loss in curve if loss <= target]
    return Steps(int(min(reached)), True) if reached else Steps(watched, False)


def median_steps(runs: Sequence[Steps]) -> int | None:
    """The Kaplan-Meier median of steps to the target: the smallest s with S(s) <= 1/2, None where S stays above.

    S(s) = prod_{s_i <= s} (1 - d_i / r_i) over the steps s_i at which runs reached the target: d_i runs did, of r_i
    that had neither reached it nor been censored before. With all runs watched to one step it is the (lower) median
    of the runs, and None where fewer than half reached the target. Raises ValueError without runs.
    """
    if not runs:
        raise ValueError("median_steps: received no runs; pass at least one")
    reached = [run.step for run in runs if run.reached]
    if not reached:
        return None
    survival = ecdf(CensoredData(uncensored=reached, right=[run.step for run in runs if not run.reached])).sf
    below = np.flatnonzero(survival.probabilities <= 0.5 + 1e-9)  # products of fractions: 1/2 but for rounding counts
    return int(survival.quantiles[below[0]]) if len(below) else None
