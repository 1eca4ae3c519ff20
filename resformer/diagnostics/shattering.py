"""Shattered gradients: how alike the gradients of two inputs are, and how fast a gradient changes along a line.

Letters: B inputs, D width, P points of a grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resformer.diagnostics.small_nets import BatchNorm


def input_gradients(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """(B ...) -> (B ...), for each input the gradient of its own output, summed with the same weights for all.

    `function` maps (B ...) to outputs of B rows. An output that depends on other rows (a batch norm with statistics
    that are differentiated) adds their share. No parameter keeps a gradient.
    """
    inputs = inputs.detach().clone().requires_grad_()
    (gradients,) = torch.autograd.grad(function(inputs).sum(), inputs)
    return gradients


def gradient_correlation(gradients: Tensor) -> float:
    """(B ...) -> the mean cosine between the gradients of two different inputs, in [-1, 1]. Inputs whose gradient is
    exactly zero have no direction and are left out; NaN where fewer than two are left.

    Gradients have mean zero over the weights, so that this is their correlation (Balduzzi et al. 2017).
    """
    flat = gradients.detach().flatten(1).double()
    flat = flat[flat.square().sum(1) > 0]
    if len(flat) < 2:
        return float("nan")
    unit = flat / flat.norm(dim=1, keepdim=True)
    # the sum over all pairs, an input with itself included, is the square of the sum of unit vectors
    return float((unit.sum(0).square().sum() - len(unit)) / (len(unit) * (len(unit) - 1)))


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
