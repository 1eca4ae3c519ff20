"""Shattered gradients: how alike the gradients of two inputs are, and how fast a gradient changes along a line.

Letters: B inputs, D width, P points of a grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resformer.diagnostics.small_nets import BatchNorm
from resformer.host import find_host


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


def layer_correlations(
    model: PreTrainedModel, batch: dict[str, Any], *, samples: int = 4, seed: int = 0
) -> list[float]:
    """Gradient correlation between the sentences of a batch, for the states after 0, 1, ... all layers of a model.

    Each sentence's own gradient of a random direction of its mean last state, over `samples` directions; the gradients
    of all tokens of a sentence are one vector, of which padding takes no part. At the top it is 1 by construction (a
    norm after the last layer aside); how fast it falls towards the embeddings is what tells schemes apart. Labels are
    not used: opposite ones would turn the sign.

    Args:
        batch: of sentences of equal length, or with attention_mask; two sentences or more. seed: of the directions.

    Dropout is off; the model is left as it was. Raises a ValueError for models of several stacks, and for schemes under
    which layers hand on more than one tensor.
    """
    host = find_host(model)
    if len(host.stacks) > 1 or host.stacks[0].shared or host.stacks[0].spec.returns:
        raise ValueError(
            f"layer_correlations is for models of one stack whose layers return their states alone, and family "
            f"{host.family.name!r} is not one of them"
        )
    mode, required = model.training, [(p, p.requires_grad) for p in model.parameters()]
    states: list[Tensor] = []

    def enter(module: Any, args: Any) -> Any:
        states[:] = [args[0].detach().requires_grad_()]
        return (states[0], *args[1:])

    def after(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(
                "layer_correlations is for layers that hand on one tensor; the scheme of this model "
                "has a stream of more"
            )
        states.append(output)

    hooks = [host.layers[0].register_forward_pre_hook(enter)]
    hooks += [layer.register_forward_hook(after) for layer in host.layers]
    model.eval()
    try:
        for p, _ in required:
            p.requires_grad_(False)
        given = {name: value for name, value in batch.items() if name != "labels"}
        last = model.base_model(**given).last_hidden_state
        if len(last) < 2:
            raise ValueError(f"a correlation between sentences needs two of them or more, got {len(last)}")
        mask = batch.get("attention_mask", torch.ones_like(last[..., 0])).to(last.dtype)
        pooled = (last * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        directions = torch.randn(samples, last.shape[-1], generator=torch.Generator().manual_seed(seed)).to(last)
        found = [torch.autograd.grad((pooled @ v).sum(), states, retain_graph=True) for v in directions]
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in required:
            p.requires_grad_(flag)
        model.train(mode)
    return [
        sum(gradient_correlation(row[layer] * mask[..., None]) for row in found) / samples
        for layer in range(len(states))
    ]


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
