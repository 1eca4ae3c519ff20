"""How often runs fail (diverge, collapse, stay at chance), with an interval that holds for few runs and for none."""

from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """`failed` of `n` runs, with the bounds of the interval for the true rate."""

    failed: int
    n: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.failed / self.n


def failure_rate(failed: int, n: int, level: float = 0.95) -> Rate:
    """The share of `n` runs that failed, with the Wilson score interval at `level`.

    With p = failed / n and z the (1 + level) / 2 quantile of the standard normal,
    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n): inside [0, 1], and of some width also where
    no run failed. Raises ValueError unless 0 <= failed <= n and n >= 1.
    """
    if not 0 <= failed <= n or n < 1:
        raise ValueError(f"failure_rate: received {failed} failed of {n} runs; pass 0 <= failed <= n with n >= 1")
    interval = binomtest(failed, n).proportion_ci(level, method="wilson")
    return Rate(failed, n, float(interval.low), float(interval.high))
