"""Learning the identity: how well plain and residual blocks of equal size can be trained to output their input, and
what a deep net gains by growing from a shallow one.

Letters: S seeds, B inputs of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resformer.diagnostics.population import Population
from resformer.diagnostics.small_nets import FeedForward
from resformer.growing import grow
from resformer.stack import ResidualStack

BATCH, LAST = 128, 20


@dataclass(frozen=True)
class IdentityFit:
    """`errors`: for each seed, before each step, E|y - x|² / E|x|² on fresh inputs: 0 is the identity, 1 no better than
    to output nothing."""

    scheme: str
    depth: int
    errors: list[list[float]]

    def final(self) -> list[float]:
        """For each seed the mean over the last 20 steps."""
        return [sum(row[-LAST:]) / len(row[-LAST:]) for row in self.errors]


def identity_fit(
    scheme: str,
    depth: int,
    *,
    width: int = 16,
    steps: int = 300,
    learning_rate: float = 1e-3,
    seeds: Sequence[int] = range(10),
    **options: Any,
) -> IdentityFit:
    """Train blocks W_2 ReLU(W_1 x), joined by a scheme and without norms, to output their input.

    The inner width is 2 D, so that a plain block can be the identity: W_1 = [I; -I], W_2 = [I, -I]. Standard normal
    inputs, new ones for each step; Adam at a constant rate; Xavier-normal weights.

    Args:
        scheme, options: as for `resformer.ResidualStack`, such as "plain" or "depth_scaled". depth: blocks.
    """
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

    losses = Population(build, seeds).fit(loss, steps, learning_rate)
    return IdentityFit(scheme, depth, losses.T.tolist())


@dataclass(frozen=True)
class Grown:
    """Training losses: `shallow` before growing, `grown` after, `fresh` of a net as deep from its start; `jump` is the
    difference of the loss on one batch that growing makes."""

    shallow: list[float]
    grown: list[float]
    fresh: list[float]
    jump: float


def grown_against_fresh(
    build: Callable[[int], PreTrainedModel],
    batches: Callable[[int], dict[str, Any]],
    *,
    shallow: int,
    deep: int,
    steps: tuple[int, int],
    learning_rate: float = 1e-3,
) -> Grown:
    """Train a shallow model, make it deeper with `resformer.grow`, train on; and a fresh deep one for all of the steps.

    Args:
        build: a patched model of so many layers, with a head. batches: step -> batch with labels.
        shallow, deep: layers. steps: before and after growing. Adam at a constant rate, made anew after growing.
    """
    first, second = steps
    model = build(shallow)
    before = _train(model, [batches(step) for step in range(first)], learning_rate)
    probe = batches(first)
    was = _loss(model, probe)
    grow(model, deep)
    jump = _loss(model, probe) - was
    later = [batches(step) for step in range(first, first + second)]
    after = _train(model, later, learning_rate)
    fresh = _train(build(deep), [batches(step) for step in range(first + second)], learning_rate)
    return Grown(before, after, fresh, jump)


def _train(model: PreTrainedModel, batches: Sequence[dict[str, Any]], learning_rate: float) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def _loss(model: PreTrainedModel, batch: dict[str, Any]) -> float:
    model.eval()
    return float(model(**batch).loss)
