"""Learning-rate schedules as shapes over the run. Needs no torch."""

import math
from collections.abc import Callable

from resformer.errors import unknown

# A shape maps the share of the run done after warm-up, t in [0, 1), to a factor of the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1.0 - t,  # to 0
    "hold": lambda t: 1.0 - 0.9 * max(0.0, 2.0 * t - 1.0),  # constant, then to 10 % over the second half
    "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t),  # to 0
    "constant": lambda t: 1.0,
}


def factor(schedule: str, *, steps: int, warmup: float) -> Callable[[int], float]:
    """The factor of the learning rate at step 0 .. steps - 1: a linear rise over `warmup`, then the schedule.

    `warmup` is a share of the steps in [0, 1). The first step already learns (1 / number of warm-up steps).
    Raises `ValueError` for an unknown schedule or a warm-up outside [0, 1).
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is {warmup!r}; it is a share of the steps, at least 0 and below 1, such as 0.1")
    shape, rise = SCHEDULES[schedule], round(warmup * steps)

    def at(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        # LambdaLR asks once more after the last step; a run of warm-up alone has no shape to follow.
        return shape(min(1.0, (step - rise) / max(1, steps - rise)))

    return at
