"""What a study holds: its runs as cells (arm x depth) under one setting.

An arm is what is compared: a scheme, or a control. A setting is a task and what else differs between runs besides arm,
depth, seed and learning rate, which is chosen for each cell: runs made under different conditions are never averaged.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from resformer.data.tasks import TASKS
from resformer.spelling import parse_scheme
from resformer.study.failures import Rate, failure_rate
from resformer.study.identity import PLACES
from resformer.study.plan import BASELINES, STATIC, arm
from resformer.study.results import Result
from resformer.study.stats import Estimate, estimate, paired_difference

# config keys that are no part of a setting
AXES = ("scheme", "extra_ffn", "depth", "task", "seed", "learning_rate", "tuning", *PLACES)
NEAR = 0.98  # a final training loss from this share of the constant guess's on is "at chance"
FAR = 1.5  # a final training loss above this many times the threshold of chance is "worse than chance"
FAILING = ("chance", "worse", "diverged", "failed")
SIGN = {"score": 1, "train_loss": -1}  # of an endpoint's differences that are better


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


@dataclass(frozen=True)
class Cell:
    """The runs of one arm at one depth, one a seed."""

    arm: str
    depth: int
    runs: tuple[Result, ...]
    chance: Chance

    @cached_property
    def finished(self) -> list[Result]:
        return [run for run in self.runs if run.finished]

    @cached_property
    def outcomes(self) -> list[str]:
        """The `outcome` of each finished run."""
        return [outcome(run, self.chance.threshold) for run in self.finished]

    @property
    def learned(self) -> int:
        return self.outcomes.count("learned")

    @property
    def failures(self) -> Rate | None:
        """How many of the finished runs diverged or did not learn; None where none is finished."""
        return failure_rate(sum(o in FAILING for o in self.outcomes), len(self.outcomes)) if self.outcomes else None

    def values(self, endpoint: str) -> dict[int, float]:
        """Score, or training loss at the end, by seed. A run that diverged counts with that of a constant guess."""
        found = {}
        for run in self.finished:
            value = self.chance.of(endpoint) if run.status == "diverged" else getattr(run, endpoint)
            if value is not None:
                found[run.config["seed"]] = float(value)
        return found

    def estimate(self, endpoint: str) -> Estimate | None:
        values = list(self.values(endpoint).values())
        return estimate(values) if values else None

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
        outcomes = set(self.outcomes)
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


@dataclass(frozen=True)
class Setting:
    """The runs of one task under one set of conditions."""

    task: str
    differs: dict[str, Any]  # the config keys, with values, that set it apart from the task's other settings
    arms: tuple[str, ...]  # controls last
    controls: tuple[str, ...]  # those of the arms that are there to be beaten
    baseline: str | None  # the arm that others are compared with
    runs: tuple[Result, ...]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        return tuple(sorted({run.config["depth"] for run in self.runs}))

    @cached_property
    def cells(self) -> dict[tuple[str, int], Cell]:
        """Every arm at every depth, also where there are no runs."""
        runs: dict[tuple[str, int], list[Result]] = {(a, d): [] for a in self.arms for d in self.depths}
        for run in sorted(self.runs, key=lambda run: run.config["seed"]):
            runs[arm(run.config), run.config["depth"]].append(run)
        return {(a, d): Cell(a, d, tuple(own), self.chance) for (a, d), own in runs.items()}

    @cached_property
    def finished(self) -> list[Result]:
        return [run for run in self.runs if run.finished]

    @cached_property
    def chance(self) -> Chance:
        return chance(self.task, self.finished)

    @cached_property
    def deepest(self) -> int:
        """The deepest depth with a finished run; 0 where none is finished."""
        return max((run.config["depth"] for run in self.finished), default=0)

    def row(self, arm: str) -> list[Cell]:
        """The cells of an arm that have a finished run, by depth."""
        return [self.cells[arm, depth] for depth in self.depths if self.cells[arm, depth].finished]

    def learns_to(self, arm: str) -> int:
        """The depth down to which all finished runs of all measured depths learned; 0: not at the shallowest."""
        deepest = 0
        for cell in self.row(arm):
            if cell.state != "learned":
                break
            deepest = cell.depth
        return deepest

    def fails_from(self, arm: str) -> int:
        """The depth from which on no run learned at any measured depth; 0: some run learned at the deepest."""
        smallest = 0
        for cell in reversed(self.row(arm)):
            if cell.state not in FAILING:
                break
            smallest = cell.depth
        return smallest

    def difference(self, arm: str, other: str, depth: int, endpoint: str, level: float = 0.95) -> Estimate | None:
        """`arm` minus `other` at a depth, paired by seed; None where no seed has both."""
        own, others = self.cells[arm, depth], self.cells[other, depth]
        return paired_difference(own.values(endpoint), others.values(endpoint), level)


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


def _entropy(shares: Iterable[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0)


def is_control(config: Mapping[str, Any]) -> bool:
    """Whether a run is of a negative control: more parameters alone, or a scheme that means nothing."""
    return bool(config.get("extra_ffn")) or parse_scheme(config["scheme"])[0] == STATIC


def split(
    results: Sequence[Result], schemes: Sequence[str] = (), tasks: Sequence[str] = (), baseline: str | None = None
) -> list[Setting]:
    """The results by setting; schemes and tasks in the order given, others after them by name, controls last.

    A config key that is tied to depth (one value at each depth) does not set settings apart, since the curves
    over depth would fall apart: `tied` names such keys, and the report tells.
    """
    settings = []
    for task in _order(tasks, (run.config["task"] for run in results)):
        runs = [run for run in results if run.config["task"] == task]
        keys = [key for key in varying(runs) if not _tied(key, runs)]
        groups: dict[tuple[Any, ...], list[Result]] = {}
        for run in runs:
            groups.setdefault(tuple(value_of(run, key) for key in keys), []).append(run)
        for values in sorted(groups, key=lambda values: [(value is None, str(value)) for value in values]):
            own = tuple(groups[values])
            names = _order(schemes, (arm(run.config) for run in own))
            main = next((name for name in (baseline, *BASELINES) if name in names), None)
            checks = {arm(run.config) for run in own if is_control(run.config)} - {main}
            controls = tuple(name for name in names if name in checks)
            arms = (*(name for name in names if name not in checks), *controls)
            settings.append(Setting(task, dict(zip(keys, values, strict=True)), arms, controls, main, own))
    return settings


def _order(wanted: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    there = set(names)
    return (*(name for name in dict.fromkeys(wanted) if name in there), *sorted(there - set(wanted)))


def varying(runs: Sequence[Result]) -> list[str]:
    """The config keys in which runs differ, besides `AXES`."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [key for key in keys if key not in AXES and len(_values(key, runs)) > 1]


def tied(runs: Sequence[Result]) -> list[str]:
    """Those of `varying` that have one value at each depth: a change of depth changes them too."""
    return [key for key in varying(runs) if _tied(key, runs)]


def _tied(key: str, runs: Sequence[Result]) -> bool:
    depths = {run.config["depth"] for run in runs}
    return all(len(_values(key, [run for run in runs if run.config["depth"] == depth])) == 1 for depth in depths)


def _values(key: str, runs: Sequence[Result]) -> set[str]:
    return {json.dumps(value_of(run, key), sort_keys=True) for run in runs}


def value_of(run: Result, key: str) -> Any:
    """Of a config; of the encoder that a run starts from, of which each cell has its own, only that there is one."""
    value = run.config.get(key)
    return "pre-trained" if key == "encoder" and value is not None else value
