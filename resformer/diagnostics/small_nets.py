"""Small networks under the conditions of the lemmas: stacks of perceptrons, and Transformers without scores.

All are a `ResidualStack`, so that the scheme in them is the project's own. Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from resformer.stack import ResidualStack


class BatchNorm(nn.Module):
    """(B D) -> (B D): each channel with mean 0 and variance 1 over the batch, without gain and shift.

    Mean and variance count as constants for the gradient, as in Balduzzi's analysis: the gradient of one input then
    does not depend on the other inputs of its batch.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        constant = x.detach()
        return (x - constant.mean(0)) * (constant.var(0, correction=0) + self.eps).rsqrt()


class Rectified(nn.Module):
    """(..., D) -> (..., D), W ReLU(x) with W ~ N(0, gain 2 / D), which keeps the variance of a centred x for gain 1."""

    def __init__(self, width: int, gain: float = 1.0):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=math.sqrt(2 * gain / width))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.relu(x))


class MeanAttention(nn.Module):
    """(B T D) -> (B T D), attention with W_Q = W_K = 0, which is the mean over the tokens: x ← W_O W_V mean(x)."""

    def __init__(self, width: int):
        super().__init__()
        self.v, self.o = _xavier(width), _xavier(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.v(x).mean(-2, keepdim=True)).expand(x.shape)


class FeedForward(nn.Module):
    """(..., D) -> (..., D), W_2 ReLU(W_1 x) with an inner width of D, or another one."""

    def __init__(self, width: int, inner: int | None = None):
        super().__init__()
        self.up, self.down = _xavier(width, inner or width), _xavier(inner or width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.relu(self.up(x)))


def perceptrons(
    depth: int,
    width: int,
    scheme: str,
    *,
    norm: Callable[[int], nn.Module] = nn.LayerNorm,
    placement: str | None = None,
    gain: float = 1.0,
    **options: Any,
) -> ResidualStack:
    """`depth` sublayers W ReLU(N(x)) joined by a scheme: with "plain" x ← W ReLU(N(x)), with "scaled" x ← λ x + τ W
    ReLU(N(x)). `norm`, `placement` and `options` are as for `ResidualStack`; weights from torch's global generator."""
    sublayers = [Rectified(width, gain) for _ in range(depth)]
    return ResidualStack(sublayers, width, scheme, norm=norm, placement=placement, **options)


def transformer(layers: int, width: int, scheme: str, *, placement: str | None = None, **options: Any) -> ResidualStack:
    """A Transformer of Xiong's lemma: W_Q = W_K = 0, ReLU, an inner width of D, Xavier-normal weights, no biases.

    Gains that the scheme puts on initial weights (DeepNorm's β) are applied. Weights from torch's global generator.
    """
    sublayers: list[nn.Module] = [
        MeanAttention(width) if site % 2 == 0 else FeedForward(width) for site in range(2 * layers)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*also scales initial weights")  # which is done below
        stack = ResidualStack(sublayers, width, scheme, layer_size=2, placement=placement, **options)
    with torch.no_grad():
        for site, sublayer in zip(stack.schemes, sublayers, strict=True):
            edits = site.edits()  # type: ignore[operator]
            for role, matrix in sublayer.named_children():
                matrix.weight.mul_(edits.get(role, 1.0))  # type: ignore[operator]
    return stack


def _xavier(into: int, out: int | None = None) -> nn.Linear:
    linear = nn.Linear(into, out or into, bias=False)
    nn.init.xavier_normal_(linear.weight)
    return linear
