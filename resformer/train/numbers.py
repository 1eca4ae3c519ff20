"""What numbers a run takes. Needs no torch."""

import math


def check_positive(**values: float) -> None:
    """Every value is a finite number above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}; it must be a number above 0")


def check_not_negative(**values: float) -> None:
    """Every value is a finite number of at least 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}; it must be a number of at least 0")
