"""What a study holds: its runs as cells (scheme x depth) under one setting.

A setting is a task and what else differs between runs besides scheme, depth and seed (a learning rate, an
initialisation), so that runs made under different conditions are never averaged.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from resformer.data.tasks import TASKS
from resformer.study.plan import Run, Settings, Study
from resformer.study.results import Result
from resformer.study.stats import Estimate, estimate, paired_difference

AXES = ("scheme", "depth", "task", "seed")  # config keys that are no part of a setting
NEAR = 0.98  # a final training loss from this share of the constant guess's on is "at chance"
FAR = 1.5  # a final training loss above this many times the threshold of chance is "worse than chance"
BASELINES = ("pre_ln", "post_ln", "identity")  # the first of these in a study is what others are compared with


@dataclass(frozen=True)
class Cell:
    """The runs of one scheme at one depth, one a seed. `threshold`: the training loss that counts as chance."""

    scheme: str
    depth: int
    runs: tuple[Result, ...]
    threshold: float | None  # None: there is no constant guess to compare with (regression)

    @cached_property
    def finished(self) -> list[Result]:
        return [run for run in self.runs if run.finished]

    @cached_property
    def learned(self) -> int:
        """How many runs learned: see `learned`."""
        return sum(learned(run, self.threshold) for run in self.runs)

    @cached_property
    def scores(self) -> dict[int, float]:
        """Score by seed, of the runs that have one."""
        return {run.config["seed"]: run.score for run in self.runs if run.score is not None}

    @property
    def score(self) -> Estimate | None:
        return estimate(list(self.scores.values())) if self.scores else None

    def count(self, status: str) -> int:
        return sum(run.status == status for run in self.runs)

    @property
    def state(self) -> str:
        """The `outcome` of the finished runs: learned, chance, worse, diverged or scored.

        Where they differ: "mixed" if some learned, "failed" if none did. Without any: error, unfinished or missing.
        """
        if not self.runs:
            return "missing"
        if not self.finished:
            return "error" if self.count("failed") else "unfinished"
        outcomes = {outcome(run, self.threshold) for run in self.finished}
        if len(outcomes) == 1:
            return outcomes.pop()
        return "scored" if "scored" in outcomes else "mixed" if "learned" in outcomes else "failed"

    @property
    def verdict(self) -> str:
        """The state in words with counts: "2/2 learned", "at chance 0/2", "1/2 learned, 1 diverged"."""
        n = len(self.finished)
        words = {
            "learned": f"{n}/{n} learned",
            "mixed": f"{self.learned}/{n} learned",
            "failed": f"0/{n} learned",
            "chance": f"at chance 0/{n}",
            "worse": f"worse than chance 0/{n}",
            "diverged": f"diverged {n}/{n}",
            "scored": f"n = {n}",
            "missing": "not run",
        }
        parts = [words[self.state]] if self.state in words else []
        if self.state != "diverged" and self.count("diverged"):
            parts.append(f"{self.count('diverged')} diverged")
        for status, word in (("failed", "error"), ("unfinished", "unfinished")):
            if self.count(status):
                parts.append(f"{self.count(status)} {word}")
        return ", ".join(parts)


def learned(run: Result, threshold: float | None) -> bool:
    """Whether a run ended with a training loss below `threshold`. One that diverged did not."""
    return run.finished and outcome(run, threshold) == "learned"


def outcome(run: Result, threshold: float | None) -> str:
    """How a finished run ended: learned, chance, worse (than chance), diverged, or scored without a threshold."""
    if run.status == "diverged":
        return "diverged"
    if threshold is None:
        return "scored"
    if run.train_loss is None:
        return "chance"
    return "learned" if run.train_loss < threshold else "chance" if run.train_loss <= FAR * threshold else "worse"


@dataclass(frozen=True)
class Setting:
    """The runs of one task under one set of conditions."""

    task: str
    differs: dict[str, Any]  # the config keys, with values, that set it apart from the task's other settings
    schemes: tuple[str, ...]
    runs: tuple[Result, ...]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        return tuple(sorted({run.config["depth"] for run in self.runs}))

    @cached_property
    def cells(self) -> dict[tuple[str, int], Cell]:
        """Every scheme at every depth, also where there are no runs."""
        runs: dict[tuple[str, int], list[Result]] = {(s, d): [] for s in self.schemes for d in self.depths}
        for run in sorted(self.runs, key=lambda run: run.config["seed"]):
            runs[run.config["scheme"], run.config["depth"]].append(run)
        return {(s, d): Cell(s, d, tuple(own), self.threshold) for (s, d), own in runs.items()}

    @cached_property
    def finished(self) -> list[Result]:
        return [run for run in self.runs if run.finished]

    @cached_property
    def majority(self) -> float | None:
        """Share of the most frequent class of the validation split, as the runs report it."""
        shares = [run.metrics["majority"] for run in self.finished if "majority" in run.metrics]
        return sum(shares) / len(shares) if shares else None

    @cached_property
    def guess_loss(self) -> float | None:
        """The loss of the best constant guess: ln C, or the entropy of two classes of known shares."""
        task = TASKS.get(self.task)
        if task is None or task.labels is None:
            return None
        if len(task.labels) == 2 and self.majority is not None and self.majority < 1:
            return -sum(p * math.log(p) for p in (self.majority, 1 - self.majority))
        return math.log(len(task.labels))

    @cached_property
    def guess_score(self) -> float | None:
        """The score of the best constant guess, where it is known."""
        metrics = TASKS[self.task].metrics if self.task in TASKS else ()
        return self.majority if metrics == ("accuracy",) else 0.0 if metrics == ("matthews",) else None

    @cached_property
    def threshold(self) -> float | None:
        """The final training loss from which on a run is at chance; always below the constant guess's."""
        if self.guess_loss is None:
            return None
        near = NEAR * self.guess_loss
        short = round(near, 2)  # for people; too coarse where the guess is nearly always right
        return short if abs(short - near) < (self.guess_loss - near) / 2 else float(f"{near:.3g}")

    @cached_property
    def deepest(self) -> int:
        """The deepest depth with a finished run; 0 where none is finished."""
        return max((run.config["depth"] for run in self.finished), default=0)

    @property
    def most_seeds(self) -> int:
        """The largest number of finished runs in a cell."""
        return max((len(cell.finished) for cell in self.cells.values()), default=0)

    def row(self, scheme: str) -> list[Cell]:
        """The cells of a scheme that have a finished run, by depth."""
        return [self.cells[scheme, depth] for depth in self.depths if self.cells[scheme, depth].finished]

    def learns_to(self, scheme: str) -> int:
        """The depth down to which all finished runs of all measured depths learned; 0: not at the shallowest."""
        deepest = 0
        for cell in self.row(scheme):
            if cell.state != "learned":
                break
            deepest = cell.depth
        return deepest

    def fails_from(self, scheme: str) -> int:
        """The depth from which on no run learned at any measured depth; 0: some run learned at the deepest."""
        smallest = 0
        for cell in reversed(self.row(scheme)):
            if cell.state not in ("chance", "worse", "diverged", "failed"):
                break
            smallest = cell.depth
        return smallest

    @property
    def baseline(self) -> str | None:
        return next((name for name in BASELINES if name in self.schemes), None)

    def difference(self, scheme: str, other: str, depth: int) -> Estimate | None:
        """Score of `scheme` minus that of `other` at a depth, paired by seed; None where no seed has both."""
        return paired_difference(self.cells[scheme, depth].scores, self.cells[other, depth].scores)


def not_started(studies: Sequence[Mapping[str, Any]], results: Sequence[Result], output: Path) -> list[Result]:
    """The runs that the studies of study.json plan and that have no directory yet, as unfinished results."""
    known = {result.directory.name for result in results}
    planned: dict[str, Run] = {}
    for entry in studies:
        settings = Settings(**entry["study"]["settings"])
        planned |= {run.id: run for run in Study(**{**entry["study"], "settings": settings}).runs()}
    return [
        Result(output / "runs" / name, run.config, "unfinished") for name, run in planned.items() if name not in known
    ]


def split(results: Sequence[Result], schemes: Sequence[str] = (), tasks: Sequence[str] = ()) -> list[Setting]:
    """The results by setting; schemes and tasks in the order given, others after them by name.

    A config key that is tied to depth (one value at each depth) does not set settings apart, since the curves
    over depth would fall apart: `tied` names such keys, and the report tells.
    """
    settings = []
    for task in _order(tasks, (run.config["task"] for run in results)):
        runs = [run for run in results if run.config["task"] == task]
        keys = [key for key in varying(runs) if not _tied(key, runs)]
        groups: dict[tuple[Any, ...], list[Result]] = {}
        for run in runs:
            groups.setdefault(tuple(run.config[key] for key in keys), []).append(run)
        for values in sorted(groups, key=lambda values: [(value is None, value) for value in values]):
            own = tuple(groups[values])
            names = _order(schemes, (run.config["scheme"] for run in own))
            settings.append(Setting(task, dict(zip(keys, values, strict=True)), names, own))
    return settings


def _order(wanted: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    there = set(names)
    return (*(name for name in dict.fromkeys(wanted) if name in there), *sorted(there - set(wanted)))


def varying(runs: Sequence[Result]) -> list[str]:
    """The config keys that all runs have and in which they differ, besides `AXES`."""
    shared = [key for key in (runs[0].config if runs else ()) if all(key in run.config for run in runs)]
    return [key for key in shared if key not in AXES and len(_values(key, runs)) > 1]


def tied(runs: Sequence[Result]) -> list[str]:
    """Those of `varying` that have one value at each depth: a change of depth changes them too."""
    return [key for key in varying(runs) if _tied(key, runs)]


def _tied(key: str, runs: Sequence[Result]) -> bool:
    depths = {run.config["depth"] for run in runs}
    return all(len(_values(key, [run for run in runs if run.config["depth"] == depth])) == 1 for depth in depths)


def _values(key: str, runs: Sequence[Result]) -> set[str]:
    return {json.dumps(run.config[key], sort_keys=True) for run in runs}
