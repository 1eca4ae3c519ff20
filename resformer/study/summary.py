"""What a study holds: its runs as cells (arm x depth) under one setting.

An arm is what is compared: a scheme, or a control. A setting is a task and what else differs between runs besides arm,
depth, seed and learning rate, which is chosen for each cell: runs made under different conditions are never averaged.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from resformer.study.chance import FAR as FAR
from resformer.study.chance import Chance, chance
from resformer.study.chance import outcome as outcome
from resformer.study.failures import Rate, failure_rate
from resformer.study.plan import arm
from resformer.study.results import Result
from resformer.study.stats import Estimate, estimate, paired_difference

FAILING = ("chance", "worse", "diverged", "failed")
SIGN = {"score": 1, "train_loss": -1}  # of an endpoint's differences that are better


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
        """The state in words with counts: "2/2 above chance", "at chance 0/2", "1/2 above chance, 1 diverged"."""
        n = len(self.finished)
        words = {
            "learned": f"{n}/{n} above chance",
            "mixed": f"{self.learned}/{n} above chance",
            "failed": f"0/{n} above chance",
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


@dataclass(frozen=True)
class Setting:
    """The runs of one task under one set of conditions."""

    task: str
    differs: dict[str, Any]  # those of its `conditions` that set it apart from the task's other settings
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
