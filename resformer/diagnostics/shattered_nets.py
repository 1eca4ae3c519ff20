"""Shattered gradients of stacks of perceptrons: by depth between inputs, and along the line for f: R -> R.

Letters: R nets, P points of a grid, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.lines import fit_log
from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.shattering import gradient_correlation, input_gradients
from resformer.diagnostics.small_nets import BatchNorm, perceptrons
from resformer.errors import unknown
from resformer.spelling import parse_scheme

POINTS, LAG, INPUTS = 256, 5, 128
NORMS: dict[str, dict[str, Any]] = {
    "none": {"placement": "none"},
    "batch": {"norm": BatchNorm, "placement": "pre"},
    "layer": {"norm": nn.LayerNorm, "placement": "pre"},
}
NETS = {
    "plain": ("plain", "none"),
    "residual": ("scaled", "none"),
    "plain + BN": ("plain", "batch"),
    "plain + LN": ("plain", "layer"),
    "residual + BN": ("scaled", "batch"),
    "residual + BN, β=0.1": ("scaled:branch=0.1", "batch"),
    "residual + LN": ("scaled", "layer"),
}

COLUMNS = (
    Column("correlation", "of the gradients of two inputs, mean over nets", log=True),
    Column("spread", "its standard deviation over nets"),
    Column("line", f"autocorrelation of df/dx {LAG} points apart, f: R -> R"),
)


def shattered_nets(
    nets: Mapping[str, tuple[str, str]] = NETS,
    depths: Sequence[int] = (2, 4, 8, 24),
    *,
    width: int = 256,
    seeds: Sequence[int] = range(4),
) -> Measured:
    """How alike the gradients of two inputs are in perceptrons of growing depth, and along a line.

    x ← W ReLU(N(x)) or x ← x + β W ReLU(N(x)), W ~ N(0, 2 / D), at initialisation; batch statistics are constants for
    the gradient. correlation = mean over pairs of 128 Gaussian inputs of the cosine of their gradients, mean over nets,
    one a seed: 2^-L for "plain + BN", (1 + β² L)^-½ for "residual + BN" while β² L is small. Without norms the laws are
    2^-L for "plain" and (3/4)^L for "residual", for the first layers: deeper down inputs that nothing centres have
    drifted to a common direction, and gradients keep more in common. line: f: R -> R on 256 points of [-2, 2], the
    autocorrelation of df/dx at 5 points: 0 for white noise, near 1 for brown; not with LayerNorm, which makes a step of
    the points of a line.

    nets: by name, a scheme as on the command line and the norm: "none", "batch" or "layer".

    facts: by net `rate`, the factor of the correlation per sublayer over depths where it is above 0, ½ in Balduzzi's
    law for plain nets. Raises a ValueError for unknown schemes and norms, and without seeds or depths.

    Reference   Balduzzi et al. 2017, arXiv:1702.08591
    """
    if not seeds or not depths:
        raise ValueError("shattered_nets needs at least one seed and one depth, got none")
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for name, (spelled, kind) in nets.items():
        if kind not in NORMS:
            raise unknown("norm", kind, NORMS)
        scheme, options = parse_scheme(spelled)
        options = options | NORMS[kind]
        for depth in depths:
            found, lines = [], []
            for seed in seeds:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    found.append(net_correlation(depth, width, scheme, INPUTS, **options))
                    if kind != "layer":
                        line = line_gradient(Line(perceptrons(depth, width, scheme, **options), width), POINTS)
                        lines.append(line / line.std())  # else the largest net speaks for all
            row: Row = {"net": name, "depth": depth, "correlation": fmean(found)}
            row["spread"] = stdev(found) if len(found) > 1 else None
            row["line"] = float(autocorrelation(torch.stack(lines), LAG)[LAG]) if lines else None
            rows.append(row)
        here = [row["correlation"] for row in rows if row["net"] == name]
        line_through = fit_log(list(depths), here)
        facts[f"rate, {name}"] = None if line_through is None else math.exp(line_through.slope)
    return Measured(
        "shattered_nets",
        "Gradients of two inputs, small networks",
        COLUMNS,
        rows,
        facts,
        keys=("net", "depth"),
        along="depth",
        draws=("correlation", "line"),
    )


def net_correlation(depth: int, width: int, scheme: str, inputs: int, **options: Any) -> float:
    """Between the gradients of Gaussian inputs of new perceptrons, for a random readout; `options` as for
    `perceptrons`. From torch's global generator."""
    net = perceptrons(depth, width, scheme, **options)
    readout = torch.randn(width) / width**0.5
    return gradient_correlation(input_gradients(lambda x: net(x) @ readout, torch.randn(inputs, width)))


def autocorrelation(signals: Tensor, lags: int) -> Tensor:
    """(R P) rows of a signal over a grid -> (lags + 1), the covariance of points that lie so far apart, over all rows,
    as a share of the variance: 1 at lag 0, 0 for white noise. The mean is that of all numbers together."""
    if not 0 <= lags < signals.shape[-1]:
        raise ValueError(f"lags must lie in [0, {signals.shape[-1] - 1}] for {signals.shape[-1]} points, got {lags}")
    centred = signals.double() - signals.double().mean()
    points = signals.shape[-1]
    products = [(centred[:, : points - lag] * centred[:, lag:]).mean() for lag in range(lags + 1)]
    return torch.stack(products) / products[0]


def white_noise(rows: int, points: int, generator: torch.Generator) -> Tensor:
    """(R P) independent standard normal numbers."""
    return torch.randn(rows, points, generator=generator)


def brown_noise(rows: int, points: int, generator: torch.Generator) -> Tensor:
    """(R P) running sums of white noise."""
    return white_noise(rows, points, generator).cumsum(1)


class Line(torch.nn.Module):
    """f: R -> R, a network on the grid of P points of [-2, 2] that form one batch: x ↦ v · stack(W x + b).

    The first layer has biases that are not zero: without, a ReLU net of a number has a single kink.
    """

    def __init__(self, stack: torch.nn.Module, width: int):
        super().__init__()
        self.stack, self.norm = stack, BatchNorm(width)
        self.weight, self.shift = torch.randn(2, width).unbind(0)
        self.readout = torch.randn(width) / width**0.5

    def forward(self, x: Tensor) -> Tensor:
        """(P) -> (P)"""
        return self.stack(self.norm(x[:, None] * self.weight + self.shift)) @ self.readout


def line_gradient(net: Line, points: int = 256) -> Tensor:
    """(P) the derivative df/dx at the points of the grid."""
    return input_gradients(net, torch.linspace(-2, 2, points))
