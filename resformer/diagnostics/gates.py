"""Gates: the coefficients of every scheme, layer by layer, and how several streams are used."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import Batch, Seen, check_depth, observed, rows_of, text, watching, wide
from resformer.host import Host
from resformer.schemes import Scheme
from resformer.sites import Connection, connections

COLUMNS = (
    Column("mean", "over its entries and, where it depends on data, tokens"),
    Column("spread", "standard deviation of the same"),
    Column("low", "smallest entry"),
    Column("high", "largest entry"),
    Column("error", "of a mixture of streams: how far row or column sums are from 1"),
    Column("used", "streams in use, of those carried", shown=False),
    Column("alike", "mean cosine of two streams", shown=False),
)


@torch.no_grad()
def gates(model: nn.Module, batch: Batch) -> Measured:
    """The values of each scheme's coefficients at each site.

    A row for each parameter of a scheme, by its name; for each coefficient that depends on data or is made of
    parameters (gates, weights over sources, mixtures), by its letter in the scheme's equation, over the tokens of the
    batch that are text; and, where several tensors (B T D) are carried, or one (B T S D), "streams" as they leave:

    mean, spread, low, high: of all entries; error = max |Σ_j M_ij - 1| over the rows and columns of a "mixture" M, 0
    of a doubly stochastic one; used = exp(-Σ_i p_i log p_i) with p_i = ‖H_i‖² / Σ_j ‖H_j‖², S where all streams are
    equally large and 1 where one is all; alike = the mean over tokens and pairs of cos(H_i, H_j).

    facts: `coefficients`, how many there are; for schemes that mix streams, by stack, `mix_gain`: the largest absolute
    row or column sum of the product of all mixtures, mean over tokens, 1 where they are doubly stochastic and free to
    grow elsewhere.

    A model that is not patched has no rows. One forward pass. Raises a ValueError for fewer than two layers and a batch
    of other keys.

    Reference   mixtures: Zhu et al. 2024, arXiv:2409.19606; their gain and error: Xie et al. 2025, arXiv:2512.24880
    """
    rows: list[Row] = []
    products: dict[str, Tensor] = {}
    with observed(model, batch) as host:
        check_depth(host, "gates")
        ours = connections(host)
        schemes = {id(scheme): scheme for at in ours for scheme in at.own.schemes}
        rows += [row for at in ours for row in _parameters(at)]
        place = {id(at.scheme): at for at in ours}
        for at in ours:  # of a layer that is stepped as a whole the sites' own schemes do nothing
            for scheme in at.own.schemes:
                place.setdefault(id(scheme), at)

        def show(scheme: Scheme, **coefficients: Tensor | Callable[[], Tensor]) -> None:
            at = place[id(scheme)]
            for name, given in coefficients.items():
                value = given if isinstance(given, Tensor) else given()
                known = "mixture" if name == "mix" else name  # a parameter that it is made of may be called mix
                mask = _tokens(host, at, batch, value)
                real = value if mask is None else value[mask]
                rows.append(_key(at, known) | _values(real))
                if name == "mix" and real.numel():
                    rows[-1]["error"] = sum_error(real)
                    products[at.name] = real @ products[at.name] if at.name in products else real

        def see(one: Seen) -> None:
            if row := _streams(one, text(host, one.at.stack, batch, one.read)):
                rows.append(_key(one.at, "streams") | row)

        try:
            for scheme in schemes.values():
                scheme.show = partial(show, scheme)  # type: ignore[method-assign]
            with watching(host, see):
                model(**batch)
        finally:
            for scheme in schemes.values():
                vars(scheme).pop("show", None)
    facts: dict[str, Any] = {"coefficients": len({row["coefficient"] for row in rows})}
    for name, product in products.items():
        sums = torch.stack([product.abs().sum(-1).amax(-1), product.abs().sum(-2).amax(-1)])
        facts["mix_gain" if len(host.stacks) == 1 else f"{name}_mix_gain"] = float(sums.amax(0).mean())
    order = {name: i for i, name in enumerate(dict.fromkeys(row["coefficient"] for row in rows))}
    rows.sort(key=lambda row: (order[row["coefficient"]], row["stack"] == "decoder", row["layer"]))
    keys = ("coefficient", "stack", "layer", "site")
    return Measured("gates", "Coefficients", COLUMNS, rows, facts, keys=keys, draws=("mean", "used", "alike"))


def _key(at: Connection, name: str) -> Row:
    return {"coefficient": name, "stack": at.name, "layer": at.layer, "site": at.site}


def _parameters(at: Connection) -> list[Row]:
    return [_key(at, name) | _values(p.detach()) for name, p in at.scheme.named_parameters()]


def _tokens(host: Host, at: Connection, batch: Batch, value: Tensor) -> Tensor | None:
    """(B T), True where a coefficient is of text, for those that there is one of for each token."""
    states = value.flatten(2) if value.ndim > 3 else value
    given = [batch.get(name) for name in ("attention_mask", "decoder_attention_mask", "labels")]
    by_token = any(isinstance(one, Tensor) and value.shape[:2] == one.shape for one in given)
    return text(host, at.stack, batch, states) if by_token and states.ndim == 3 else None


def _values(value: Tensor) -> Row:
    flat = wide(value).flatten()
    if not len(flat):
        return {}
    spread = float(flat.std(unbiased=False))
    return {"mean": float(flat.mean()), "spread": spread, "low": float(flat.min()), "high": float(flat.max())}


def sum_error(mix: Tensor) -> float:
    """(... S S) -> the largest distance of a row's or column's sum from 1."""
    return float(max((mix.sum(-1) - 1).abs().max(), (mix.sum(-2) - 1).abs().max()))


def _streams(one: Seen, mask: Tensor | None) -> Row:
    after = one.after
    if len(after) == 1 and after[0].ndim == one.read.ndim + 1:
        streams = after[0].unbind(-2)
    elif len(after) > 1 and all(tensor.shape == one.read.shape for tensor in after):
        streams = after
    else:
        return {}
    h = torch.stack([rows_of(wide(tensor), mask) for tensor in streams])  # (S N D)
    power = h.square().sum((1, 2))
    p = power[power > 0] / power.sum()
    unit = nn.functional.normalize(h, dim=-1)
    n = len(h)
    pairs = (unit.sum(0).square().sum(-1) - unit.square().sum((0, 2))) / max(1, n * (n - 1))
    return {"used": math.exp(-float((p * p.log()).sum())), "alike": float(pairs.mean())}
