"""Means with Student-t intervals, for few seeds. Plain numbers in, plain numbers out.

The percentile bootstrap is not used: at a nominal 95 % it covered 74 % at n = 3 and 84 % at n = 5 in trials.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

FEWEST = 3  # runs below which no interval is given


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` runs; `half` is half the width of its interval, None where `n` < 3."""

    mean: float
    n: int
    half: float | None

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half

    def excludes(self, value: float) -> bool:
        """Whether there is an interval, `value` lies outside of it, and it is not `flat`."""
        return self.half is not None and not self.flat and abs(self.mean - value) > self.half

    @property
    def flat(self) -> bool:
        """Whether all values were the same but for rounding: the interval has no width, and tells nothing."""
        return self.half is not None and self.half <= 1e-9 * abs(self.mean)


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of `values` with its Student-t interval at `level`.

    Raises ValueError for an empty sequence: a mean of nothing is no estimate.
    """
    if not len(values):
        raise ValueError("estimate: received no values; pass at least one")
    array = np.asarray(values, dtype=float)
    n = len(array)
    if n < FEWEST:
        return Estimate(float(array.mean()), n, None)
    half = student_t.ppf((1 + level) / 2, n - 1) * array.std(ddof=1) / np.sqrt(n)
    return Estimate(float(array.mean()), n, float(half))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], level: float = 0.95
) -> Estimate | None:
    """`values` - `baseline` over the seeds that both have, as an `Estimate`; None where they share none."""
    shared = sorted(values.keys() & baseline.keys())
    return estimate([values[seed] - baseline[seed] for seed in shared], level) if shared else None
