"""What the tuning runs of a setting found: a curve over learning rates for each arm and depth."""

from dataclasses import dataclass

from resformer.study.apart import conditions
from resformer.study.chance import Chance, chance
from resformer.study.plan import arm
from resformer.study.reading import Reading
from resformer.study.selection import Choice
from resformer.study.sensitivity import Sensitivity, sensitivity
from resformer.study.summary import SIGN, Setting


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
