"""Shattered gradients: how alike the gradients of two inputs are. Letters: B inputs, T tokens, D width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.graph import Graph, graphs
from resformer.diagnostics.lines import fit_log
from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import Batch, check_depth, masked, observed

COLUMNS = (
    Column("correlation", "of the gradients of two texts, mean over directions"),
    Column("least", "of the directions", shown=False),
    Column("most", "of the directions", shown=False),
)


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


def shattering(model: nn.Module, batch: Batch, *, samples: int = 4, seed: int = 0) -> Measured:
    """How alike the gradients of two texts still are, by layer and site.

    Each text's own gradient of <v, m>, with m the mean over its tokens of what leaves the stack and v a random
    direction: g_b, in all that is carried to a site, over all tokens that are text as one vector.

    correlation = mean over pairs of texts of cos(g_a, g_b), mean over `samples` directions; least and most of them
    beside it. At the top it is 1 for texts of equal length by construction (a norm after the last layer aside); how
    fast it falls on the way down is what tells schemes apart. Labels are not used: opposite ones would turn the sign.

    facts, for each stack: `lowest`, the correlation in what enters; `rate`, the fitted factor per layer on the way
    down, over correlations above 0.

    One forward pass and `samples` backward passes. Raises a ValueError for fewer than two texts or layers, a batch of
    other keys, samples below 1, and `NotFiniteError` for NaN.

    Reference   Balduzzi et al. 2017, arXiv:1702.08591
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number of at least 1, got {samples!r}")
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    with observed(model, batch) as host:
        check_depth(host, "shattering")
        for graph in graphs(host, model, batch):
            here = _correlations(graph, samples, seed)
            depths = [i * len(graph.stack.layers) / (len(here) - 1) for i in range(len(here))]
            line = fit_log(depths, [row["correlation"] for row in here])
            ahead = f"{graph.stack.spec.name}_" if len(host.stacks) > 1 else ""
            facts[f"{ahead}lowest"] = here[0]["correlation"]
            facts[f"{ahead}rate"] = None if line is None else math.exp(-line.slope)
            rows += here
    return Measured("shattering", "Gradients of two texts", COLUMNS, rows, facts, draws=("correlation",))


@torch.enable_grad()
def _correlations(graph: Graph, samples: int, seed: int) -> list[Row]:
    end: Any = graph.end
    if len(end) < 2:
        raise ValueError(f"a correlation between texts needs two of them or more, got {len(end)}")
    text = torch.ones(end.shape[:2], device=end.device) if graph.mask is None else graph.mask
    text = text.to(end.dtype)
    pooled = (end * text[..., None]).sum(1) / text.sum(1, keepdim=True).clamp_min(1)
    directions = torch.randn(samples, end.shape[-1], generator=torch.Generator().manual_seed(seed)).to(end)
    flat = [tensor for stream in graph.before.values() for tensor in stream]
    found: list[list[float]] = []
    for v in directions:
        given = iter(torch.autograd.grad((pooled @ v).sum(), [*flat, end], retain_graph=True, allow_unused=True))
        streams = [[next(given) for _ in stream] for stream in graph.before.values()] + [[next(given)]]
        found.append([gradient_correlation(_by_text(one, text)) for one in streams])
    places = [*graph.before, (len(graph.stack.layers), "end")]
    rows = []
    for (layer, site), values in zip(places, zip(*found, strict=True), strict=True):
        row: Row = {"stack": graph.stack.spec.name, "layer": layer, "site": site}
        rows.append(row | {"correlation": fmean(values), "least": min(values), "most": max(values)})
    return rows


def _by_text(gradients: Sequence[Tensor | None], text: Tensor) -> Tensor:
    """(B N), the gradient of each text in all tensors of a stream, padding left out."""
    # a scheme may carry a number that is of no text beside its states
    parts = [masked(g, text).flatten(1) for g in gradients if g is not None and g.shape[:1] == text.shape[:1]]
    return torch.cat(parts, 1) if parts else text.new_zeros(len(text), 1)
