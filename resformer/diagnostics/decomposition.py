"""Decomposition: the last state as a sum of what entered the stack and what each branch gave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import Batch, check_depth, observed, text, watching, wide
from resformer.diagnostics.skip import Path, skip_paths
from resformer.host import Host

COLUMNS = (
    Column("share", "of the last state that comes from here"),
    Column("size", "RMS of what was given", log=True),
    Column("gain", "what the skip path to the end multiplies it by", log=True),
)


def decomposition(model: nn.Module, batch: Batch) -> Measured:
    """How much of the last state comes from the embeddings and from each branch.

    x_L = A_0 x_0 + Σ_i A_i y_i + Σ_j B_j b_j, with y_i what branch i gave, A_i the skip path from there to the end and
    b_j what norms on it add; the norms divide by what they divided by, as constants. In a pre-LN host A_i = 1 and
    there is no b_j. Averaged over the tokens that are text, with x_L the state after the last layer, before the model's
    own final norm:

    share_i = Σ_t <A_i y_i, x_L> / Σ_t <x_L, x_L>, all of which sum to 1 with the shares of the norms' biases;
    size = RMS(y_i); gain = ‖A_iᵀ x_L‖ / ‖x_L‖, the factor by which the path to the end multiplies along x_L.

    Rows: "input" (x_0) and each connection. facts, for each stack: `norm_biases`, their share; `rest` = 1 less all
    shares, which is rounding where the skip path is linear with its norms held fast, and else what gates over the
    stream and a scheme's own norms bend; `apart` = ‖x_L - x_0 - Σ y_i‖ / ‖x_L‖, rounding in a pre-LN host.

    One forward pass and one backward pass along the skip path. Raises a ValueError for fewer than two layers and a
    batch of other keys.

    Reference   frozen norms: Liu et al. 2020 (Admin), arXiv:2004.08249; Elhage et al. 2021, transformer-circuits.pub
    """
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    with observed(model, batch) as host:
        check_depth(host, "decomposition")
        with skip_paths(host, frozen=True) as paths, watching(host):
            model(**batch)
        for path in paths.values():
            _shares(host, path, batch, rows, facts)
    return Measured(
        "decomposition", "The last state by where it comes from", COLUMNS, rows, facts, draws=("share", "size", "gain")
    )


def _shares(host: Host, path: Path, batch: Batch, rows: list[Row], facts: dict[str, Any]) -> None:
    name, ended = path.stack.spec.name, path.ended
    if ended is None or path.first is None or path.entered is None:
        return  # a stack that did not run
    mask = text(host, path.stack, batch, ended)
    real = torch.ones(ended.shape[:2], device=ended.device) if mask is None else mask
    last = ended.detach() * real[..., None].to(ended.dtype)
    whole = float(wide(last).square().sum())
    leaves = [path.entered, *(y for one in path.passed for y in one.wrote), *path.shifts]
    found = torch.autograd.grad(ended, leaves, last, allow_unused=True)
    along = {id(leaf): g for leaf, g in zip(leaves, found, strict=True)}

    def row(layer: int, site: str, given: list[Tensor]) -> Row:
        pairs = [(leaf, along[id(leaf)]) for leaf in given]
        share = sum(float(wide(leaf.detach() * g).sum()) for leaf, g in pairs if g is not None)
        gain = sum(float(wide(g).square().sum()) for _, g in pairs if g is not None)
        size = sum(float(wide(leaf.detach() * _as(real, leaf)).square().sum()) for leaf in given)
        count = sum(float(_as(real, leaf).expand_as(leaf).sum()) for leaf in given)
        return {
            "stack": name,
            "layer": layer,
            "site": site,
            "share": share / whole,
            "size": (size / count) ** 0.5,
            "gain": (gain / whole) ** 0.5,
        }

    ours = [row(0, "input", [path.entered]), *(row(one.at.layer, one.at.site, one.wrote) for one in path.passed)]
    ahead = f"{name}_" if len(host.stacks) > 1 else ""
    biases = sum(float(wide(b.detach() * g).sum()) for b in path.shifts if (g := along[id(b)]) is not None)
    total = path.first + sum(y.detach() for one in path.passed for y in one.wrote)
    difference = (ended.detach() - total) * real[..., None].to(ended.dtype)
    facts[f"{ahead}norm_biases"] = biases / whole
    facts[f"{ahead}rest"] = 1 - biases / whole - sum(one["share"] for one in ours)
    facts[f"{ahead}apart"] = (float(wide(difference).square().sum()) / whole) ** 0.5
    rows += ours


def _as(real: Tensor, tensor: Tensor) -> Tensor:
    """(B T) as a mask of a tensor that begins with (B T); of others of all of it."""
    if tensor.shape[:2] != real.shape:
        return torch.ones((1,) * tensor.ndim, dtype=tensor.dtype, device=tensor.device)
    return real.reshape(*real.shape, *(1,) * (tensor.ndim - 2)).to(tensor.dtype)
