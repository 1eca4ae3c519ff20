"""Blocks that change places: in a residual net the loss grows with how far the order is from the one trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor

from resformer.diagnostics.lesion import tau
from resformer.theory.claim import Curve, Law, Measured, register
from resformer.theory.claims.ensemble import DEPTH, SIZE, trained
from resformer.theory.teacher import Examples, cross_entropy

PAIRS, DRAWS = (1, 2, 4, 8), 5


@register(
    "reordering",
    "Veit 2016",
    "Veit et al. 2016, arXiv:1605.06431, section 4.3",
    (
        Law("residual, a pair swapped: share kept", 0.9, 0.0, spread=0.029, relation="≥"),
        Law("plain, a pair swapped: share kept", 0.0, 0.15, spread=0.11),
        Law("residual: rank correlation of loss and τ", -0.5, 0.0, spread=0.097, relation="≤"),
        Law("residual, all blocks moved: share kept", 0.2, 0.0, spread=0.068, relation="≥"),
    ),
    seconds=6,
    axes=("Kendall's τ of the order", "held-out loss"),
)
def measure(seeds: Sequence[int]) -> Measured:
    """The blocks of a residual net can change places: its loss grows smoothly with the distance of the order from that
    of training, while a plain net of which two blocks are swapped guesses.

    The trained nets of the claim ensemble; 1, 2, 4 or 8 random pairs of the 16 blocks swapped, 5 orders each, the same
    for all seeds. Share kept: of the held-out accuracy above ½. Kendall's τ of the new order with the old; the rank
    correlation over the orders is Kendall's τ-b.
    """
    examples, drawn = Examples(seeds, SIZE), sorted(orders(), key=tau)
    values: dict[str, list[float]] = {}
    curves = {}
    distances = [tau(order) for order in drawn]
    for name, scheme in {"residual": "identity", "plain": "plain"}.items():
        cases = list(zip(trained(scheme, examples, seeds), *examples.held_out(), strict=True))
        whole = [ends(*case, range(DEPTH))[1] - 0.5 for case in cases]
        found = [[ends(*case, order) for order in drawn] for case in cases]
        curves[name] = Curve(distances, [[loss for loss, _ in row] for row in found])
        for moved, words in {2: "a pair swapped", DEPTH: "all blocks moved"}.items():
            values[f"{name}, {words}: share kept"] = [
                mean([accuracy - 0.5 for (_, accuracy), order in zip(row, drawn, strict=True) if apart(order) == moved])
                / before
                for row, before in zip(found, whole, strict=True)
            ]
        values[f"{name}: rank correlation of loss and τ"] = [
            float(kendalltau([loss for loss, _ in row], distances).statistic) for row in found
        ]
    return Measured(values, curves)


def orders() -> list[list[int]]:
    """With so many pairs of blocks swapped."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for pairs in PAIRS:
        for _ in range(DRAWS):
            order, chosen = list(range(DEPTH)), torch.randperm(DEPTH, generator=generator)[: 2 * pairs].tolist()
            for a, b in zip(chosen[::2], chosen[1::2], strict=True):
                order[a], order[b] = order[b], order[a]
            found.append(order)
    return found


def apart(order: Sequence[int]) -> int:
    """How many blocks are not at their place."""
    return sum(place != block for place, block in enumerate(order))


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


@torch.no_grad()
def ends(net: Any, inputs: Tensor, labels: Tensor, order: Sequence[int]) -> tuple[float, float]:
    """Loss and accuracy with the blocks in another order."""
    with reordered(net.stack, order):
        scores = net(inputs)
    return float(cross_entropy(scores, labels)), float(((scores > 0) == labels).float().mean())


@contextmanager
def reordered(stack: Any, order: Sequence[int]) -> Iterator[None]:
    """Meanwhile block `order[i]` runs as the i-th, with its norms."""
    before = [list(stack.sublayers), list(stack.norms)]
    try:
        for modules, parts in zip((stack.sublayers, stack.norms), before, strict=True):
            for place, block in enumerate(order):
                modules[place] = parts[block]
        yield
    finally:
        for modules, parts in zip((stack.sublayers, stack.norms), before, strict=True):
            for place, part in enumerate(parts):
                modules[place] = part
