"""Residual nets as ensembles of shallow ones: what is left without a block, and which paths the gradient takes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from resformer.diagnostics.paths import PathGradients, draw_paths, routed
from resformer.theory.claim import Curve, Law, Measured, register
from resformer.theory.teacher import Classifier, Examples, cross_entropy, train

DEPTH, SIZE, STEPS, RATE, SUBSETS = 16, 4096, 250, 1e-3, 4


@register(
    "ensemble",
    "Veit 2016",
    "Veit et al. 2016, arXiv:1605.06431, sections 4 and 5",
    (
        Law("residual, a block deleted: share kept", 0.9, 0.03, spread=0.019, relation="≥"),
        Law("plain, a block deleted: share kept", 0.0, 0.15, spread=0.12),
        Law("residual, half deleted: share kept", 0.4, 0.0, spread=0.096, relation="≥"),
        Law("residual: largest loss by one more, of all", 0.3, 0.1, spread=0.092, relation="≤"),
        Law("residual: gradient kept per branch on a path", 0.7, 0.0, spread=0.034, relation="≤"),
        Law("residual: effective length over n/2", 0.8, 0.0, spread=0.022, relation="≤"),
    ),
    seconds=8,
    axes=("blocks deleted", "accuracy"),
)
def measure(seeds: Sequence[int]) -> Measured:
    """A residual net hardly misses a block, and its accuracy falls smoothly as more are deleted, while a plain net
    without one guesses; its gradient comes by paths that are shorter than most.

    Perceptrons of 16 blocks and width 32 in pre-LN and without shortcuts, trained alike (250 steps of Adam on the
    labels of a random teacher; both learn), held-out accuracy less ½ as a share of what it was; mean over single
    blocks, and over 4 random sets of each size. Gradients along random paths of each length, at the input. (Which share
    of the paths counts is no law: 0.45 % in the paper's ResNet of 54 blocks, most in a net of 16.)
    """
    examples = Examples(seeds, SIZE)
    values: dict[str, list[float]] = {}
    curves = {}
    for name, scheme in {"residual": "identity", "plain": "plain"}.items():
        cases = list(zip(trained(scheme, examples, seeds), *examples.held_out(), seeds, strict=True))
        found = [lesions(*case) for case in cases]
        curves[name] = Curve(range(DEPTH + 1), found)
        kept = [[(one - 0.5) / (row[0] - 0.5) for one in row] for row in found]
        values[f"{name}, a block deleted: share kept"] = [row[1] for row in kept]
        if name == "residual":
            values["residual, half deleted: share kept"] = [row[DEPTH // 2] for row in kept]
            values["residual: largest loss by one more, of all"] = [
                max(a - b for a, b in pairwise(row)) / (row[0] - row[-1]) for row in kept
            ]
            paths = [along_paths(*case[:3]) for case in cases]
            values["residual: gradient kept per branch on a path"] = [one.decay() for one in paths]
            values["residual: effective length over n/2"] = [2 * one.effective_length() / DEPTH for one in paths]
    return Measured(values, curves)


def trained(scheme: str, examples: Examples, seeds: Sequence[int]) -> list[Any]:
    """The nets of this claim, one a seed."""
    return train(lambda: Classifier(DEPTH, scheme, placement="pre"), examples, seeds, STEPS, RATE)[0].trained()


@torch.no_grad()
def lesions(net: Any, inputs: Tensor, labels: Tensor, seed: int) -> list[float]:
    """Accuracy without 0, 1, ... all blocks: the mean over every single one, then over random sets."""
    generator = torch.Generator().manual_seed(seed)
    sets: list[list[tuple[int, ...]]] = [[()], [(block,) for block in range(DEPTH)]]
    sets += [
        [tuple(torch.randperm(DEPTH, generator=generator)[:size].tolist()) for _ in range(SUBSETS)]
        for size in range(2, DEPTH + 1)
    ]
    return [sum(accuracy(net, inputs, labels, one) for one in some) / len(some) for some in sets]


def accuracy(net: Any, inputs: Tensor, labels: Tensor, blocks: Sequence[int]) -> float:
    with deleted([net.stack.schemes[block] for block in blocks]):
        return float(((net(inputs) > 0) == labels).float().mean())


@contextmanager
def deleted(sites: Sequence[Any]) -> Iterator[None]:
    """While it lasts these sites hand the stream on as it came."""
    for site in sites:
        site.step = lambda s, branch, norm: s
    try:
        yield
    finally:
        for site in sites:
            del site.step


def along_paths(net: Any, inputs: Tensor, labels: Tensor) -> PathGradients:
    x = inputs[:128].clone().requires_grad_()

    def norm_along(through: Sequence[bool]) -> float:
        with routed(net.stack.schemes, through):
            return float(torch.autograd.grad(cross_entropy(net(x), labels[:128]), x)[0].double().norm())

    return draw_paths(DEPTH, norm_along, samples=4)
