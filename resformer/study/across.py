"""An arm over several tasks at once, on a scale that the tasks share."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from resformer.study.aggregate import Aggregate, aggregate, aggregate_difference
from resformer.study.apart import conditions
from resformer.study.findings import apart
from resformer.study.stats import estimate
from resformer.study.summary import Setting

# Below so many tasks the middle half of all values is the worst of an easy task with the best of a hard one.
FEWEST_TASKS = 4


@dataclass(frozen=True)
class Across:
    """An arm at a depth over tasks, by the seeds that it finished in all of them: the interquartile mean, or of fewer
    than 4 tasks the mean, which has its Student-t interval over seeds from 3 on."""

    apart: tuple[str, ...]  # what sets these settings apart from others of the same tasks, in words
    tasks: tuple[str, ...]
    arm: str
    depth: int
    value: Aggregate
    gap: Aggregate | None  # to the baseline, over the seeds that both have; None for the baseline

    @property
    def statistic(self) -> str:
        return "mean" if len(self.tasks) < FEWEST_TASKS else "interquartile mean"


def across(settings: Sequence[Setting], endpoint: str) -> list[Across]:
    """Of every arm and depth that at least two tasks have under the same conditions: equal in all that sets the
    settings of any task apart, whether or not it sets those of their own task apart.

    The scale is (value - guess) / (perfect - guess): 0 is the constant guess of the task and 1 a perfect score, or a
    training loss of 0. Tasks whose constant guess is not known are left out.
    """
    keys = list(dict.fromkeys(key for setting in settings for key in setting.differs))
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        if setting.chance.of(endpoint) is not None:
            values = [sorted({json.dumps(conditions(run.config).get(key)) for run in setting.runs}) for key in keys]
            groups.setdefault(json.dumps(values), []).append(setting)
    found = []
    for group in groups.values():
        if len({setting.task for setting in group}) < 2 or len({setting.task for setting in group}) < len(group):
            continue
        depths = sorted(set.intersection(*(set(setting.depths) for setting in group)))
        arms = [arm for arm in group[0].arms if all(arm in setting.arms for setting in group)]
        base = group[0].baseline
        together = replace(group[0], differs={key: value for s in group for key, value in s.differs.items()})
        for depth in depths:
            tables = {arm: _table(group, arm, depth, endpoint) for arm in arms}
            for arm, table in tables.items():
                if not table:
                    continue
                shared = sorted(table.keys() & tables.get(base or "", {}).keys()) if arm != base else []
                gap = None
                if shared:
                    own, other = ([t[seed] for seed in shared] for t in (table, tables[str(base)]))
                    gap = _together(own, other)
                value = _together(list(table.values()))
                tasks = tuple(setting.task for setting in group)
                found.append(Across(tuple(apart(together)), tasks, arm, depth, value, gap))
    return found


def _together(scores: list[list[float]], baseline: list[list[float]] | None = None) -> Aggregate:
    """Of scores, or of their difference from a baseline, both runs x tasks with the same seeds.

    The mean needs no bootstrap: each seed gives one number, the mean over tasks, whatever its scores have in common.
    """
    runs, tasks = np.shape(scores)
    if tasks >= FEWEST_TASKS:
        generator = np.random.default_rng(0)
        return aggregate(scores, generator) if baseline is None else aggregate_difference(scores, baseline, generator)
    found = estimate(np.mean(np.subtract(scores, 0.0 if baseline is None else baseline), axis=1).tolist())
    low, high = (None, None) if found.flat else (found.low, found.high)
    return Aggregate(found.mean, runs, tasks, low, high)


def _table(group: Sequence[Setting], arm: str, depth: int, endpoint: str) -> dict[int, list[float]]:
    """Seed -> a value for each task, of the seeds that have all of them."""
    columns = [setting.cells[arm, depth].values(endpoint) for setting in group]
    guesses = [setting.chance.of(endpoint) or 0.0 for setting in group]
    perfect = 1.0 if endpoint == "score" else 0.0
    return {
        seed: [(column[seed] - guess) / (perfect - guess) for column, guess in zip(columns, guesses, strict=True)]
        for seed in sorted(set.intersection(*map(set, columns)))
    }
