"""Layer Jacobians: how far each layer is from passing its input on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import Batch, check_depth, normal, observed, text, watching, wide
from resformer.schemes.base import Branch, Norm, Stream
from resformer.sites import Connection, Step, carried, connections, intercepted, like

SEED = 0

COLUMNS = (
    Column("distance", "of the layer's Jacobian from the identity", log=True),
    Column("gain", "root mean square of what it multiplies by", log=True),
    Column("diagonal", "mean of its diagonal, 1 of the identity"),
)


def layer_jacobian(model: nn.Module, batch: Batch, *, probes: int = 2) -> Measured:
    """‖∂x_{l+1} / ∂x_l - I‖ of each layer, by random probes, and how many layers do something.

    x_l is all that is carried to layer l, of all tokens of a text together; rows of the Jacobian J are of the tokens
    that are text, n in number. With u of independent normal numbers, means over `probes` of them (Hutchinson):

    distance = sqrt(E ‖Jᵀ u - u‖² / ‖u‖²) = ‖J - I‖_F / sqrt(n); gain = sqrt(E ‖Jᵀ u‖² / ‖u‖²) = ‖J‖_F / sqrt(n);
    diagonal = E <u, Jᵀ u> / ‖u‖² = tr(J) / n.

    facts, for each stack: `effective_depth` = (Σ_l distance_l)² / Σ_l distance_l², L where all layers are equally far
    from the identity, 1 where a single one is. A layer near the identity may be needed all the same: what the loss
    says when it is deleted (`lesion`) goes first.

    No value (None) where the scheme hands on another form of stream than it was given (a history). One forward pass,
    and `probes` backward passes of one layer at a time. Raises a ValueError for fewer than two layers, a batch of other
    keys and probes below 1.

    Reference   Sun et al. 2025 (curse of depth), arXiv:2502.05795; probes: Hutchinson 1989
    """
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be a whole number of at least 1, got {probes!r}")
    rows: list[Row] = []
    generator = torch.Generator().manual_seed(SEED)
    entered: dict[str, tuple[Tensor, ...]] = {}
    with observed(model, batch) as host:
        check_depth(host, "layer_jacobian")
        ends = {(at.name, at.layer): at.key for at in connections(host)}  # the last one of each layer stays
        begins = {(at.name, at.layer): at.key for at in reversed(connections(host))}

        def around(at: Connection, step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
            if begins[at.name, at.layer] == at.key:
                s = like(s, tuple(tensor.detach().requires_grad_() for tensor in carried(s)))
                entered[at.name] = carried(s)
            out = step(s, branch, norm)
            if ends[at.name, at.layer] != at.key:
                return out
            row: Row = {"stack": at.name, "layer": at.layer}
            begun, left = entered[at.name], carried(out)
            if [tensor.shape for tensor in begun] == [tensor.shape for tensor in left]:
                mask = text(host, at.stack, batch, left[0] if left[0].ndim == 3 else left[0].flatten(2))
                row |= _probed(begun, left, mask, generator, probes)
            rows.append(row)
            return like(out, tuple(tensor.detach() for tensor in left))

        with intercepted(host, around), watching(host), torch.enable_grad():
            model(**batch)
        facts: dict[str, Any] = {}
        for stack in host.stacks:
            found = [row["distance"] for row in rows if row["stack"] == stack.spec.name and "distance" in row]
            if found and any(found):
                ahead = f"{stack.spec.name}_" if len(host.stacks) > 1 else ""
                facts[f"{ahead}effective_depth"] = sum(found) ** 2 / sum(one * one for one in found)
    rows.sort(key=lambda row: [stack.spec.name for stack in host.stacks].index(row["stack"]))
    drawn = ("distance", "gain", "diagonal")
    return Measured(
        "layer_jacobian", "Layers against the identity", COLUMNS, rows, facts, keys=("stack", "layer"), draws=drawn
    )


def _probed(
    begun: tuple[Tensor, ...],
    left: tuple[Tensor, ...],
    mask: Tensor | None,
    generator: torch.Generator,
    probes: int,
) -> dict[str, float]:
    size = distance = gain = diagonal = 0.0
    for _ in range(probes):
        u = [normal(tensor, generator, mask) for tensor in left]
        live = [(tensor, one) for tensor, one in zip(left, u, strict=True) if tensor.requires_grad]
        outs, given = zip(*live, strict=True)
        found = torch.autograd.grad(outs, begun, given, retain_graph=True, allow_unused=True)
        for one, g in zip(u, found, strict=True):
            one, g = wide(one), wide(torch.zeros_like(one) if g is None else g)
            size += float(one.square().sum())
            distance += float((g - one).square().sum())
            gain += float(g.square().sum())
            diagonal += float((g * one).sum())
    return {"distance": math.sqrt(distance / size), "gain": math.sqrt(gain / size), "diagonal": diagonal / size}
