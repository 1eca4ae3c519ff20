"""How often the bootstrap intervals of `aggregate.py` cover the truth: by simulation, and as kept for reports."""

import numpy as np

from resformer.study.aggregate import aggregate, aggregate_difference, interquartile_mean

TASKS = 8
SHARED = 0.5  # correlation between the scores of one seed in two tasks, as of tasks on one pre-trained encoder
FAILING = 0.15  # share of seeds that fail in all tasks, where some do

# (runs, share of seeds that fail) -> coverage of the nominal 95 % interval of `aggregate` and of
# `aggregate_difference`: `bootstrap_coverage` with 4000 trials and np.random.default_rng(0)
MEASURED = {
    (10, 0.0): (0.941, 0.940),
    (20, 0.0): (0.951, 0.948),
    (10, FAILING): (0.805, 0.926),
    (20, FAILING): (0.942, 0.934),
}


def coverage_sentence() -> str:
    """What was measured, for the reader of a bootstrap interval."""

    def covered(failing: float) -> str:
        (one, gap), (later, later_gap) = MEASURED[10, failing], MEASURED[20, failing]
        return f"{one:.0%} at 10 seeds and {later:.0%} at 20 (paired difference: {gap:.0%} and {later_gap:.0%})"

    return (
        f"In simulations of {TASKS} tasks the nominal 95% bootstrap interval covered the truth in {covered(0.0)}; "
        f"where {FAILING:.0%} of seeds fail in all tasks in {covered(FAILING)}, since few seeds may show no failure."
    )


def bootstrap_coverage(
    runs: int, failing: float, generator: np.random.Generator, trials: int, tasks: int = TASKS
) -> tuple[float, float]:
    """The share of `trials` studies whose interval covers the truth: of one scheme, and of a paired difference.

    Task k scores c_k + s_k e_k in seeds that train, with centres c_k from 0.2 to 0.8, spreads s_k from 0.02 to 0.1 and
    e standard normal, correlated by `SHARED` between tasks; a seed fails with probability `failing`, and then scores
    0 in all tasks but for a spread of 0.02. The baseline of the difference has the same distribution and fails
    independently; one half of the variance of e is common to both. The truth is that of 200,000 seeds, and 0.
    """
    truth = interquartile_mean(_scores(200_000, tasks, failing, generator)[0])
    covered = np.zeros(2)
    for _ in range(trials):
        scores, baseline = _scores(runs, tasks, failing, generator)
        one, gap = aggregate(scores, generator), aggregate_difference(scores, baseline, generator)
        if one.low is None or one.high is None or gap.low is None or gap.high is None:
            raise ValueError(f"bootstrap_coverage: received {runs} runs, for which no interval is given")
        covered += one.low <= truth <= one.high, gap.low <= 0 <= gap.high
    return float(covered[0] / trials), float(covered[1] / trials)


def _scores(runs: int, tasks: int, failing: float, generator: np.random.Generator) -> np.ndarray:
    """Of a scheme and its baseline: (2, runs, tasks)."""
    centre, spread = np.linspace(0.2, 0.8, tasks), np.linspace(0.02, 0.1, tasks)
    own, common = (
        np.sqrt(SHARED) * generator.normal(size=(arms, runs, 1))
        + np.sqrt(1 - SHARED) * generator.normal(size=(arms, runs, tasks))
        for arms in (2, 1)
    )
    trained = centre + spread * (own + common) / np.sqrt(2)
    fails = generator.random((2, runs, 1)) < failing
    return np.where(fails, 0.02 * generator.normal(size=trained.shape), trained)
