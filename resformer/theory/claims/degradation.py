"""The degradation that residual connections were made for: deep plain nets do not even fit what shallow ones fit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resformer.theory.claim import Curve, Law, Measured, register
from resformer.theory.teacher import CHANCE, Classifier, Examples, train

DEPTHS = (2, 8, 24, 48)
SIZE, RATES, STEPS, LAST = 1024, (1e-3, 3e-3), 150, 20
PLAIN = "plain nets get better with depth up to some 8 sublayers here; what fails is depth beyond that, at both rates"


@register(
    "degradation",
    "He 2015",
    "He et al. 2015, arXiv:1512.03385, figure 1",
    (
        Law("plain, L=48: training loss", CHANCE, 0.05, spread=0.0067),
        Law("plain, L=48 less L=8: training loss", 0.3, 0.0, spread=0.035, relation="≥"),
        Law("residual, L=48: training loss", 0.25, 0.0, spread=0.05, relation="≤"),
        Law("residual, L=48 less L=2: training loss", 0.0, 0.05, spread=0.04, relation="≤"),
        Law("plain, L=8 less L=2: depth harms", 0.05, 0.05, spread=0.037, relation="≥", popular=PLAIN),
    ),
    seconds=35,
    axes=("depth L (sublayers)", "training loss at the end"),
    log="x",
)
def measure(seeds: Sequence[int]) -> Measured:
    """The training loss of plain nets rises with depth; that of residual nets does not.

    x ← W ReLU(LN(x)) against x ← x + W ReLU(LN(x)) of width 32, 1024 examples of a random teacher, 150 steps of Adam
    at a constant rate, the better of 1e-3 and 3e-3 for each; cross-entropy over the last 20 steps, chance is ln 2.
    """
    examples = Examples(seeds, SIZE)
    curves = {
        name: [best(depth, scheme, examples, seeds) for depth in DEPTHS]
        for name, scheme in {"plain": "plain", "residual": "identity"}.items()
    }
    at = {name: dict(zip(DEPTHS, found, strict=True)) for name, found in curves.items()}
    values = {f"{name}, L=48: training loss": found[48] for name, found in at.items()}
    values["plain, L=48 less L=8: training loss"] = at["plain"][48] - at["plain"][8]
    values["residual, L=48 less L=2: training loss"] = at["residual"][48] - at["residual"][2]
    values["plain, L=8 less L=2: depth harms"] = at["plain"][8] - at["plain"][2]
    return Measured(
        {name: found.tolist() for name, found in values.items()},
        {name: Curve(DEPTHS, torch.stack(found).T.tolist()) for name, found in curves.items()},
    )


def best(depth: int, scheme: str, examples: Examples, seeds: Sequence[int]) -> Tensor:
    """(S) the final training losses at the rate whose mean over the seeds is lowest."""
    ends = [
        train(lambda: Classifier(depth, scheme, placement="pre"), examples, seeds, STEPS, rate)[1][-LAST:].mean(0)
        for rate in RATES
    ]
    return min(ends, key=lambda losses: float(losses.mean()))
