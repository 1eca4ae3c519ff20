"""The product of the shortcuts: what the skip path multiplies a gradient by, against the factors of its sites."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.graph import Graph, graphs
from resformer.diagnostics.lines import fit_log
from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import Batch, check_depth, normal, observed, text, watching, wide
from resformer.diagnostics.skip import Path, skip_paths
from resformer.host import Host

SEED = 0

COLUMNS = (
    Column("factor", "gain of this site's shortcut alone", log=True),
    Column("product", "of the factors from here to the end", log=True),
    Column("skip", "gain of the skip path from here to the end", log=True),
    Column("total", "the same with the branches", log=True),
)


def shortcut_product(model: nn.Module, batch: Batch, *, probes: int = 2) -> Measured:
    """∂x_L / ∂x_l along the skip path, against the product of the shortcuts on the way, and with the branches.

    The gain of a map with Jacobian J is ‖Jᵀ u‖ / ‖u‖ for random u of independent normal numbers, the root mean square
    over `probes` of them: sqrt(‖J‖_F² / rows). x_l is all that is carried to a site, x_L the state after the last
    layer; u is of the tokens that are text.

    factor = gain of ∂x_{l+1} / ∂x_l with the branch held fast (for x ← λ x + F(x): λ; after a norm, about 1 / σ);
    product = Π factors from l on, times that of a readout of several streams; skip = gain of ∂x_L / ∂x_l with all
    branches held fast; total = gain of ∂x_L / ∂x_l.

    For a constant shortcut λ, product and skip are λ^(sites from l on), exactly. The total need not be: in a pre-LN
    net the norm before a branch divides by a stream that λ < 1 has shrunk, and the branches make up for it. Where
    factors differ by channel or mix streams, product and skip differ by as much as their directions matter.

    facts, for each stack: `skip_rate` and `total_rate`, the fitted factor per layer of the two.

    One forward pass for each of skip and total, and `probes` backward passes. Raises a ValueError for fewer than two
    layers, a batch of other keys and probes below 1.

    Reference   He et al. 2016, arXiv:1603.05027, equations 5 and 8
    """
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be a whole number of at least 1, got {probes!r}")
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    with observed(model, batch) as host:
        check_depth(host, "shortcut_product")
        with skip_paths(host, frozen=False) as paths, watching(host):
            model(**batch)
        found = {name: _skip(host, path, batch, probes) for name, path in paths.items() if path.passed}
        del paths
        totals = {graph.stack.spec.name: _totals(graph, probes) for graph in graphs(host, model, batch)}
        for name, one in found.items():
            for row in one:
                row["total"] = totals[name][row["layer"], row["site"]]
            rows += one
            ahead = f"{name}_" if len(host.stacks) > 1 else ""
            layers = next(len(stack.layers) for stack in host.stacks if stack.spec.name == name)
            for what in ("skip", "total"):
                facts[f"{ahead}{what}_rate"] = _rate([row[what] for row in one], layers)
    return Measured(
        "shortcut_product",
        "Gains along the shortcuts",
        COLUMNS,
        rows,
        facts,
        draws=("factor", "product", "skip", "total"),
    )


def _skip(host: Host, path: Path, batch: Batch, probes: int) -> list[Row]:
    assert path.ended is not None
    generator = torch.Generator().manual_seed(SEED)
    mask = text(host, path.stack, batch, path.ended)
    rows = [{"stack": path.stack.spec.name, "layer": one.at.layer, "site": one.at.site} for one in path.passed]
    factors, skips, readout = [0.0] * len(rows), [0.0] * len(rows), 0.0
    befores = [tensor for one in path.passed for tensor in one.before]
    for _ in range(probes):
        given = iter(_pull((path.ended,), befores, generator, mask))
        for i, one in enumerate(path.passed):
            skips[i] += sum(next(given) for _ in one.before) / probes
            factors[i] += sum(_pull(one.after, one.before, generator, mask)) / probes
        readout += sum(_pull((path.ended,), path.passed[-1].after, generator, mask)) / probes
    product = readout
    for i in reversed(range(len(rows))):
        product *= factors[i]
        rows[i] |= {"factor": math.sqrt(factors[i]), "product": math.sqrt(product), "skip": math.sqrt(skips[i])}
    return rows


def _pull(ends: Any, begins: Any, generator: torch.Generator, mask: Tensor | None) -> list[float]:
    """‖(∂ends/∂begin)ᵀ u‖² / ‖u‖² for each of `begins`, with one random u."""
    u = [normal(end, generator, mask) for end in ends]
    size = sum(float(wide(one).square().sum()) for one in u)
    live = [(end, one) for end, one in zip(ends, u, strict=True) if end.requires_grad]
    inner = [begin for begin in begins if begin.requires_grad]  # what a branch gave for the stream is held fast
    if not live or not inner:
        return [0.0] * len(begins)
    outs, probes = zip(*live, strict=True)
    found = iter(torch.autograd.grad(outs, inner, probes, retain_graph=True, allow_unused=True))
    given = [next(found) if begin.requires_grad else None for begin in begins]
    return [0.0 if g is None else float(wide(g).square().sum()) / size for g in given]


def _totals(graph: Graph, probes: int) -> dict[tuple[int, str], float]:
    """The gain of ∂x_L / ∂x_l with everything, by layer and site."""
    generator = torch.Generator().manual_seed(SEED)
    flat = [tensor for stream in graph.before.values() for tensor in stream]
    gains = dict.fromkeys(graph.before, 0.0)
    for _ in range(probes):
        given = iter(_pull((graph.end,), flat, generator, graph.mask))
        for key, stream in graph.before.items():
            gains[key] += sum(next(given) for _ in stream) / probes
    return {key: math.sqrt(value) for key, value in gains.items()}


def _rate(gains: list[float], layers: int) -> float | None:
    """The factor per layer on the way down, by least squares on logarithms."""
    line = fit_log([i * layers / len(gains) for i in range(len(gains))], gains)
    return None if line is None else math.exp(-line.slope)
