"""What a claim is: laws stated as data, and a measurement of one number a seed for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from statistics import fmean, stdev

import torch

from resformer.errors import unknown

RELATIONS = ("=", "≤", "≥")


@dataclass(frozen=True)
class Law:
    """What is predicted of one measured quantity.

    Attributes:
        quantity: its key among the measured values, in words that the table prints.
        predicted: the published or derived number. relation: "=", "≤" or "≥".
        tolerance: how far the mean over the seeds may be off. Set from `spread` and from what the law neglects.
        spread: the standard deviation over single seeds when the tolerance was set, from 20 of them.
        popular: for a claim that is often made and does not hold here: why, or under which condition it does. The law
            is then as expected when the measured mean contradicts it, by more than the tolerance.
    """

    quantity: str
    predicted: float
    tolerance: float
    spread: float
    relation: str = "="
    popular: str = ""

    def __post_init__(self) -> None:
        assert self.relation in RELATIONS, self.relation
        assert self.tolerance >= 0, self.tolerance

    def holds(self, measured: float) -> bool:
        """Whether a mean agrees with the law; what is not finite agrees with none."""
        if not math.isfinite(measured):
            return False
        if self.relation == "≤":
            return measured <= self.predicted + self.tolerance
        if self.relation == "≥":
            return measured >= self.predicted - self.tolerance
        return abs(measured - self.predicted) <= self.tolerance


@dataclass(frozen=True)
class Curve:
    """A line of the claim's plot: x, and y as a row a seed. One whose name begins with "theory" is a prediction."""

    x: Sequence[float]
    y: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Measured:
    """A number a seed for each quantity, and curves for the plot."""

    values: dict[str, list[float]]
    curves: dict[str, Curve] = field(default_factory=dict)


Measure = Callable[[Sequence[int]], Measured]
Values = dict[str, float]  # of one seed, by quantity
Lines = dict[str, tuple[Sequence[float], Sequence[float]]]  # x and y of one seed, by curve


@dataclass(frozen=True)
class Claim:
    """One claim of the literature: `measure` takes seeds and returns a number a seed for the quantity of each law."""

    name: str
    source: str  # author and year, as short as the table needs
    reference: str  # where to read it
    laws: tuple[Law, ...]
    measure: Measure
    seeds: int  # how many the tolerances are for
    seconds: float  # of one processor, about: the longest start first, and those of up to 3 are part of the tests
    axes: tuple[str, str]  # of the plot
    log: str  # which of its axes are logarithmic: "", "x", "y" or "xy"

    @property
    def statement(self) -> str:
        """What is claimed, and the protocol that measures it."""
        return cleandoc(self.measure.__doc__ or "")


@dataclass(frozen=True)
class Verdict:
    """What a law and its measurement come to."""

    law: Law
    mean: float
    deviation: float | None  # over seeds; None for a single one, or one that is not finite

    @property
    def word(self) -> str:
        """`holds` or `FAILS`; of what is popularly claimed `false`, or `TRUE?` where it turns out not to be."""
        if self.law.popular:
            return "TRUE?" if self.law.holds(self.mean) or not math.isfinite(self.mean) else "false"
        return "holds" if self.law.holds(self.mean) else "FAILS"

    @property
    def expected(self) -> bool:
        return self.word in ("holds", "false")


def judge(laws: Sequence[Law], values: dict[str, list[float]]) -> list[Verdict]:
    """Each law against the mean over the seeds of what was measured; raises a ValueError for one that was not."""
    verdicts = []
    for law in laws:
        if not values.get(law.quantity):
            raise ValueError(f"nothing was measured for {law.quantity!r}; measured: {', '.join(values) or 'nothing'}")
        numbers = values[law.quantity]
        spread = stdev(numbers) if len(numbers) > 1 and all(map(math.isfinite, numbers)) else None
        verdicts.append(Verdict(law, fmean(numbers), spread))
    return verdicts


_CLAIMS: dict[str, Claim] = {}


def register(
    name: str,
    source: str,
    reference: str,
    laws: Sequence[Law],
    *,
    seconds: float,
    axes: tuple[str, str],
    seeds: int = 10,
    log: str = "",
) -> Callable[[Measure], Measure]:
    """Make a measurement known as a claim; a name is given once, and so is a quantity within it."""
    quantities = [law.quantity for law in laws]
    assert name not in _CLAIMS, name
    assert len(set(quantities)) == len(quantities), quantities

    def add(measure: Measure) -> Measure:
        _CLAIMS[name] = Claim(name, source, reference, tuple(laws), measure, seeds, seconds, axes, log)
        return measure

    return add


def claims() -> dict[str, Claim]:
    """All registered claims, by name."""
    import resformer.theory.claims  # noqa: F401

    return dict(_CLAIMS)


def find_claim(name: str) -> Claim:
    """The claim of that name; else a `ValueError` with the nearest names."""
    known = claims()
    if name not in known:
        raise unknown("claim", name, known)
    return known[name]


def each(one: Callable[[int], tuple[Values, Lines]]) -> Measure:
    """A measurement of many seeds from that of one, which returns values and curves and may draw from torch's global
    generator: it is seeded before, and put back as it was afterwards."""

    def measure(seeds: Sequence[int]) -> Measured:
        values: dict[str, list[float]] = {}
        lines: dict[str, tuple[Sequence[float], list[Sequence[float]]]] = {}
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                numbers, curves = one(seed)
            for key, number in numbers.items():
                values.setdefault(key, []).append(float(number))
            for key, (x, y) in curves.items():
                lines.setdefault(key, (x, []))[1].append(y)
        return Measured(values, {key: Curve(x, y) for key, (x, y) in lines.items()})

    measure.__doc__ = one.__doc__
    return measure
