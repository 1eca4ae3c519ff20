"""What the tuning runs of a setting found: a curve over learning rates for each arm and depth."""

from collections.abc import Sequence
from dataclasses import dataclass

from resformer.study.apart import conditions
from resformer.study.chance import Chance, chance
from resformer.study.plan import arm
from resformer.study.reading import Reading
from resformer.study.selection import Choice
from resformer.study.sensitivity import Sensitivity, sensitivity
from resformer.study.summary import SIGN, Setting
from resformer.study.words import counted, joined, number


@dataclass(frozen=True)
class Grid:
    """The rates that a cell was tried with, on a slice of the training data, and what became of each."""

    arm: str
    depth: int
    choice: Choice
    chance: Chance

    @property
    def values(self) -> dict[float, float]:
        """By rate what it was judged by on the slice: the score, or the loss where that of training is the endpoint.

        A run that diverged has that of a constant guess; one that is not finished is left out.
        """
        score = self.choice.endpoint == "score"
        found = {}
        for rate, result in self.choice.results.items():
            value = result.score if score else result.metrics.get("loss")
            if result.status == "diverged":
                value = self.chance.of(self.choice.endpoint)
            if result.finished and value is not None:
                found[rate] = float(value)
        return found

    @property
    def sensitivity(self) -> Sensitivity | None:
        """Of the values; None until all rates have one."""
        values, sign = self.values, SIGN[self.choice.endpoint]
        if len(values) < len(self.choice.results):
            return None
        return sensitivity({rate: sign * value for rate, value in values.items()})

    @property
    def diverged(self) -> list[float]:
        return [rate for rate, result in self.choice.results.items() if result.status == "diverged"]


def grids(setting: Setting, reading: Reading) -> list[Grid]:
    """Of the cells of a setting, in their order; empty where the study has one learning rate."""
    known = chance(setting.task, [result for result in reading.tuning if result.config["task"] == setting.task])
    found = {}
    for choice in reading.choices:
        config = next(iter(choice.results.values())).config
        own = conditions(config)
        if config["task"] == setting.task and all(own.get(key) == value for key, value in setting.differs.items()):
            cell = arm(config), config["depth"]
            found[cell] = Grid(*cell, choice, known)
    return [found[cell] for cell in setting.cells if cell in found]


def bounded(tried: Sequence[Grid]) -> str:
    """That the grid of a setting was too short, where the rate of at least half of its cells is at an edge; else "".

    Counted are the cells whose grid is complete and in which a run learned at some rate.
    """
    known = [grid.choice for grid in tried if grid.choice.complete and grid.choice.learned]
    parts: list[str] = []
    for edge in ("largest", "smallest"):
        rates = [choice.rate for choice in known if choice.edge == edge and choice.rate is not None]
        if rates:
            of = "" if parts else f" of {counted(len(known), 'cell')}"
            parts.append(f"in {len(rates)}{of} the {edge} that was tried ({joined(map(number, sorted(set(rates))))})")
    if not parts or 2 * sum(choice.edge is not None for choice in known) < len(known):
        return ""
    return (
        f"The chosen learning rate is {joined(parts)}: better ones may lie beyond, and what is found holds for this "
        "grid alone."
    )


def by_training_loss(tried: Sequence[Grid]) -> tuple[int, int, float]:
    """In how many cells another rate than the chosen one ended tuning with a lower training loss, of how many with a
    rate that was chosen, and by how much at most."""
    gaps = []
    for choice in (grid.choice for grid in tried):
        own = None if choice.rate is None else choice.results[choice.rate].train_loss
        if own is not None:
            losses = [run.train_loss for run in choice.results.values() if run.status == "ok"]
            gaps.append(own - min(loss for loss in losses if loss is not None))
    return sum(gap > 0 for gap in gaps), len(gaps), max(gaps, default=0.0)
