"""Times side by side: interleaved pairs, and medians of their ratios with intervals that assume no distribution."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor, nn

LEVEL = 0.95
WARM_UP = 2  # steps: the first one makes the optimizer's numbers, and the allocator settles


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Of the median of what `values` were drawn from, with the probability that it covers it.

    With x sorted, P(x_k <= median <= x_{n+1-k}) = 1 - 2 P(Bin(n, 1/2) < k), whatever the distribution; k is the largest
    for which that is at least `level`, and 1 where there are too few values for it: five cover with 0.94.
    """
    x, n = sorted(values), len(values)
    covered = {k: 1 - 2 * float(binom.cdf(k - 1, n, 0.5)) for k in range(1, n // 2 + 1)} or {1: 0.0}
    k = max((k for k, share in covered.items() if share >= level), default=1)
    return x[k - 1], x[n - k], covered[k]


def estimate(values: Sequence[float]) -> dict[str, float]:
    """The median of `values` and its interval, as it is kept."""
    low, high, coverage = interval(values)
    return {"median": median(values), "low": low, "high": high, "n": len(values), "coverage": coverage}


def seconds(act: Callable[[], object], device: torch.device) -> float:
    """Wall clock of `act`, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    act()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    acts: dict[str, Callable[[], object]], pairs: int, device: torch.device, tell: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each of `acts`, once in every round and in turned order, so that what drifts hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(WARM_UP if pairs else 0):
        for act in acts.values():
            act()
    for number in range(pairs):
        tell(f"{number + 1} of {pairs}")
        for name in list(acts)[:: -1 if number % 2 else 1]:
            taken[name].append(seconds(acts[name], device))
    return taken


def ratios(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """`one` over `other`, pair by pair."""
    return estimate([a / b for a, b in zip(one, other, strict=True)])


Product = tuple[int, int, int]  # rows, in, out of x W'


def products(model: nn.Module, forward: Callable[[], object]) -> dict[Product, int]:
    """The matrix products of the linear layers in one forward, and how often each is taken."""
    found: dict[Product, int] = {}

    def seen(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        shape = (args[0].numel() // module.in_features, module.in_features, module.out_features)
        found[shape] = found.get(shape, 0) + 1

    hooks = [m.register_forward_hook(seen) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def matrix_rate(shapes: dict[Product, int], dtype: torch.dtype, device: torch.device, *, repeats: int = 20) -> float:
    """Operations a second of the three products of each linear layer (output, and both gradients), in their shares.

    In float32 at the faster of torch's matrix-product precisions, which is the rate that can be had.
    """
    kept = torch.get_float32_matmul_precision()
    best = 0.0
    try:
        for precision in ("highest", "medium") if dtype == torch.float32 else (kept,):
            torch.set_float32_matmul_precision(precision)
            taken = sum(count * _product_seconds(shape, dtype, device, repeats) for shape, count in shapes.items())
            best = max(best, sum(6 * n * i * o * count for (n, i, o), count in shapes.items()) / taken)
    finally:
        torch.set_float32_matmul_precision(kept)
    return best


def _product_seconds(shape: Product, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    n, i, o = shape
    x, w, g = (torch.randn(size, dtype=dtype, device=device) for size in ((n, i), (o, i), (n, o)))
    acts: list[Callable[[], Tensor]] = [lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x]
    return sum(median([seconds(act, device) for _ in range(repeats)][repeats // 4 :]) for act in acts)
