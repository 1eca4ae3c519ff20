"""The identity term does not keep gradients from exploding: norms do."""

import math
from typing import Any

import torch

from resformer.diagnostics.lines import slope
from resformer.diagnostics.shattering import input_gradients
from resformer.diagnostics.small_nets import perceptrons
from resformer.theory.claim import Law, Lines, Values, each, register

DEPTHS = (1, 2, 4, 8, 16)
WIDTH, INPUTS = 256, 64
NORMS = "without norms each branch adds as much again, and E|g|² = 2^L; a norm, or branches of 1/√L, is what bounds it"


@register(
    "explosion",
    "Balduzzi 2017",
    "E|g|² = 2^L: Balduzzi et al. 2017, arXiv:1702.08591; the argument behind what is often claimed: He et al. 2016, "
    "arXiv:1603.05027, equation 5",
    (
        Law("no norm: log2 of E|g|² per sublayer", 1.0, 0.04, spread=0.024),
        Law("no norm: growth per sublayer, bounded", 0.0, 0.1, spread=0.024, popular=NORMS),
        Law("no norm, branches 1/√L: E|g|² at L=16", math.e, 0.25, spread=0.19, relation="≤"),
        Law("pre-LN: log2 of E|g|² per sublayer", 0.0, 0.03, spread=0.014),
    ),
    seconds=1,
    axes=("depth L (sublayers)", "squared norm of the gradient"),
    log="y",
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """A shortcut keeps gradients from vanishing; that it also keeps them from exploding is false without norms.

    x ← x + τ W ReLU(x) of width 256, W ~ N(0, 2 / D), gradient of a random direction of unit length in the input, mean
    square over 64 Gaussian inputs; growth is the slope over L = 1 ... 16. With τ = 1/√L it is bounded by e.
    """
    kinds = {
        "no norm": lambda depth: {"placement": "none"},
        "no norm, branches 1/√L": lambda depth: {"placement": "none", "branch": depth**-0.5},
        "pre-LN": lambda depth: {"placement": "pre"},
    }
    squares = {name: [square(depth, options(depth)) for depth in DEPTHS] for name, options in kinds.items()}
    rates = {name: slope(DEPTHS, [math.log2(one) for one in found]) for name, found in squares.items()}
    values = {
        "no norm: log2 of E|g|² per sublayer": rates["no norm"],
        "no norm: growth per sublayer, bounded": rates["no norm"],
        "no norm, branches 1/√L: E|g|² at L=16": squares["no norm, branches 1/√L"][-1],
        "pre-LN: log2 of E|g|² per sublayer": rates["pre-LN"],
    }
    return values, {name: (DEPTHS, found) for name, found in squares.items()}


def square(depth: int, options: dict[str, Any]) -> float:
    net = perceptrons(depth, WIDTH, "scaled", **options)
    readout = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    return float(input_gradients(lambda x: net(x) @ readout, torch.randn(INPUTS, WIDTH)).square().sum(1).mean())
