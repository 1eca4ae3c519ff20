"""Learning the identity: how well plain and residual blocks of equal size can be trained to output their input.

Letters: S seeds, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.population import Population
from resformer.diagnostics.small_nets import FeedForward
from resformer.spelling import parse_scheme
from resformer.stack import ResidualStack

BATCH, WINDOW = 128, 20  # inputs of a step; steps that are averaged

COLUMNS = (
    Column("error", "E|y - x|² / E|x|², mean over seeds", log=True),
    Column("spread", "its standard deviation over seeds"),
)


def identity_fit(
    schemes: Sequence[str] = ("plain", "identity", "depth_scaled"),
    depths: Sequence[int] = (1, 4, 16),
    *,
    width: int = 16,
    steps: int = 300,
    learning_rate: float = 1e-3,
    seeds: Sequence[int] = range(4),
) -> Measured:
    """The error of small networks that learn to output their input, by scheme, depth and steps.

    Blocks W_2 ReLU(W_1 x), joined by a scheme and without norms. The inner width is 2 D, so that a plain block can be
    the identity: W_1 = [I; -I], W_2 = [I, -I]. Standard normal inputs, new ones for each step; Adam at a constant rate;
    Xavier-normal weights. error = E|y - x|² / E|x|² over 20 steps up to `step`: 0 is the identity, 1 no better than to
    output nothing.

    schemes: as on the command line, such as "plain" or "scaled:branch=0.1".

    facts: the `final` error by scheme and depth. Raises a ValueError for unknown schemes, steps below 1, and without
    seeds, schemes or depths.

    Reference   He et al. 2015, arXiv:1512.03385, section 3.1
    """
    if not schemes or not depths:
        raise ValueError("identity_fit needs at least one scheme and one depth, got none")
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for spelled in schemes:
        scheme, options = parse_scheme(spelled)
        for depth in depths:
            errors = identity_errors(
                scheme, depth, width=width, steps=steps, learning_rate=learning_rate, seeds=seeds, **options
            )
            for end in range(steps % WINDOW or WINDOW, steps + 1, WINDOW):
                means = [fmean(row[max(0, end - WINDOW) : end]) for row in errors]
                row: Row = {"scheme": spelled, "depth": depth, "step": end, "error": fmean(means)}
                rows.append(row | {"spread": stdev(means) if len(means) > 1 else None})
            facts[f"final, {spelled}, L={depth}"] = fmean(map(final, errors))
    return Measured(
        "identity_fit",
        "Learning the identity",
        COLUMNS,
        rows,
        facts,
        keys=("scheme", "depth", "step"),
        along="step",
        draws=("error",),
    )


def identity_errors(
    scheme: str,
    depth: int,
    *,
    width: int = 16,
    steps: int = 300,
    learning_rate: float = 1e-3,
    seeds: Sequence[int] = range(10),
    **options: Any,
) -> list[list[float]]:
    """What `identity_fit` averages: for each seed the error before each step, on fresh inputs. scheme, options: as for
    `resformer.ResidualStack`. depth: blocks."""
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if not seeds:
        raise ValueError("identity_fit needs at least one seed, got none")

    def build() -> ResidualStack:
        blocks = [FeedForward(width, 2 * width) for _ in range(depth)]
        return ResidualStack(blocks, width, scheme, placement="none", **options)

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def loss(nets: Population, step: int) -> Tensor:
        x = torch.stack([torch.randn(BATCH, width, generator=generator) for generator in generators])
        return (nets(x) - x).square().mean((1, 2))

    return Population(build, seeds).fit(loss, steps, learning_rate).T.tolist()


def final(errors: Sequence[float]) -> float:
    """The mean over the last 20 steps."""
    return fmean(errors[-WINDOW:])
