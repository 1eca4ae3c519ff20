"""An arm over several tasks at once, on a scale that the tasks share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resformer.study.aggregate import Aggregate, aggregate, aggregate_difference
from resformer.study.findings import apart
from resformer.study.summary import Setting


@dataclass(frozen=True)
class Across:
    """The interquartile mean of an arm at a depth, over tasks and the seeds that it finished in all of them."""

    apart: tuple[str, ...]  # what sets these settings apart from others of the same tasks, in words
    tasks: tuple[str, ...]
    arm: str
    depth: int
    value: Aggregate
    gap: Aggregate | None  # to the baseline, over the seeds that both have; None for the baseline


def across(settings: Sequence[Setting], endpoint: str) -> list[Across]:
    """Of every arm and depth that at least two tasks have.

    The scale is (value - guess) / (perfect - guess): 0 is the constant guess of the task and 1 a perfect score, or a
    training loss of 0. Tasks whose constant guess is not known are left out.
    """
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        if setting.chance.of(endpoint) is not None:
            groups.setdefault(repr(sorted(setting.differs.items())), []).append(setting)
    found = []
    for group in groups.values():
        if len({setting.task for setting in group}) < 2 or len({setting.task for setting in group}) < len(group):
            continue
        depths = sorted(set.intersection(*(set(setting.depths) for setting in group)))
        arms = [arm for arm in group[0].arms if all(arm in setting.arms for setting in group)]
        base = group[0].baseline
        for depth in depths:
            tables = {arm: _table(group, arm, depth, endpoint) for arm in arms}
            for arm, table in tables.items():
                if not table:
                    continue
                shared = sorted(table.keys() & tables.get(base or "", {}).keys()) if arm != base else []
                gap = None
                if shared:
                    own, other = ([t[seed] for seed in shared] for t in (table, tables[str(base)]))
                    gap = aggregate_difference(own, other, np.random.default_rng(0))
                value = aggregate(list(table.values()), np.random.default_rng(0))
                tasks = tuple(setting.task for setting in group)
                found.append(Across(tuple(apart(group[0])), tasks, arm, depth, value, gap))
    return found


def _table(group: Sequence[Setting], arm: str, depth: int, endpoint: str) -> dict[int, list[float]]:
    """Seed -> a value for each task, of the seeds that have all of them."""
    columns = [setting.cells[arm, depth].values(endpoint) for setting in group]
    guesses = [setting.chance.of(endpoint) or 0.0 for setting in group]
    perfect = 1.0 if endpoint == "score" else 0.0
    return {
        seed: [(column[seed] - guess) / (perfect - guess) for column, guess in zip(columns, guesses, strict=True)]
        for seed in sorted(set.intersection(*map(set, columns)))
    }
