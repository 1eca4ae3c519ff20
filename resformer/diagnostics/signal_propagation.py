"""Signal propagation: how the stream grows, turns and collapses on its way up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.lines import fit_log
from resformer.diagnostics.measured import Column, Matrix, Measured, Row
from resformer.diagnostics.observe import Batch, Seen, check_depth, norm_of, observed, rows_of, sampled, text, watching
from resformer.diagnostics.token_cosine import mean_product
from resformer.host import Host, HostStack

SAMPLE = 256  # tokens, evenly spaced over the text, on which rank and similarity are measured

COLUMNS = (
    Column("state", "RMS of what the branch reads, before its norm", log=True),
    Column("carried", "RMS of all that is carried to the site", shown=False, log=True),
    Column("branch", "RMS of what the branch gives", log=True),
    Column("ratio", "branch over state", log=True),
    Column("variance", "of the state over channels, mean over tokens", shown=False, log=True),
    Column("pre_norm", "what the norm before the branch multiplies the RMS by", shown=False, log=True),
    Column("out_norm", "the same of the norm on what the branch gives", shown=False, log=True),
    Column("post_norm", "the same of the norm after the add", shown=False, log=True),
    Column("input_cosine", "of the state with what entered the stack"),
    Column("token_cosine", "between the states of two tokens of a text"),
    Column("angle", "to the state at the next site, over π"),
    Column("rank", "effective rank of the centred states", log=True),
)


@dataclass
class _Stack:
    """What has been seen of one stack."""

    rows: list[Row] = field(default_factory=list)
    first: Tensor | None = None  # (N D), directions of what entered
    before: Tensor | None = None  # (N D), directions of the state at the site before
    grams: list[Tensor] = field(default_factory=list)  # (n n), of the sampled tokens


@torch.no_grad()
def signal_propagation(model: nn.Module, batch: Batch) -> Measured:
    """How states and branches change with depth, in one forward pass.

    A state x: (N D) is what the branch of a site reads, before the norm on it, over the N tokens that are text; a last
    row "end" has what leaves the stack. With RMS(x) = sqrt(mean x²):

    state = RMS(x); branch = RMS(y) of what the branch gives; ratio = branch / state; carried = RMS of all tensors of
    the stream together; variance = mean_t var_d(x_td); pre_norm, out_norm, post_norm: RMS after over RMS before each
    norm that acts there; input_cosine = mean_t cos(x_t, x_t of the first site); token_cosine: mean cosine over pairs
    of tokens of one text (1: they have become one); angle = mean_t arccos(cos(x_t, x_t of the next site)) / π;
    rank = exp(-Σ p_i log p_i), p_i = σ_i / Σ σ, σ the singular values of x less its mean over tokens.
    matrix "cka" (for two stacks one each): tr-normalised HSIC of the linear kernels of the states of each two sites,
    with the unbiased estimate, which is 0 for unrelated states whatever N and D and may be slightly below.

    rank and cka are of at most 256 tokens, evenly spaced. facts, for each stack, over its sites without the end, where
    schemes sum streams or norm: `growth` = exp of the slope of log variance against layers, the factor a layer;
    `growth_power` = the slope of log variance against log(1 + l), 1 where the variance grows linearly with depth; each
    with the share r2 of the variance that its line explains.

    Raises a ValueError for fewer than two layers, a batch of other keys, and `NotFiniteError` for NaN.

    Reference   rank: Roy & Vetterli 2007; CKA: Kornblith et al. 2019, arXiv:1905.00414, unbiased: Nguyen et al. 2021,
                arXiv:2010.15327; angles: Gromov et al. 2024, arXiv:2403.17887; collapse: Dong et al. 2021,
                arXiv:2103.03404; growth: Sun et al. 2025, arXiv:2502.05795
    """
    seen: dict[str, _Stack] = {}

    def see(one: Seen) -> None:
        here = seen.setdefault(one.at.name, _Stack())
        mask = text(host, one.at.stack, batch, one.read)
        row: Row = {"stack": one.at.name, "layer": one.at.layer, "site": one.at.site}
        row["branch"] = wrote = rms(rows_of(one.wrote, mask))
        for slot, (given, normed) in one.norms.items():
            if slot in ("pre", "out", "post") and given.shape == normed.shape:
                row[f"{slot}_norm"] = _over(rms(rows_of(normed, mask)), rms(rows_of(given, mask)))
        _add(here, row, one.read, mask)
        row["ratio"] = _over(wrote, row["state"])
        plain = len(one.before) == 1 and one.before[0] is one.read
        row["carried"] = row["state"] if plain else _rms_of(one.before, mask)

    def left(stack: HostStack, layer: int, state: Tensor) -> None:
        if layer == len(stack.layers) - 1 and (here := seen.get(stack.spec.name)):
            row: Row = {"stack": stack.spec.name, "layer": len(stack.layers), "site": "end"}
            _add(here, row, state, text(host, stack, batch, state))
            row["carried"] = row["state"]

    with observed(model, batch) as host:
        check_depth(host, "signal_propagation")
        with watching(host, see, left, norms=True):
            model(**batch)
        facts: dict[str, Any] = {}
        for name, here in seen.items():
            facts |= _growth(host, name, here.rows)
    matrices = {f"cka {name}" if len(seen) > 1 else "cka": cka(here.grams) for name, here in seen.items()}
    rows = [row for here in seen.values() for row in here.rows]
    draws = ("state", "ratio", "input_cosine", "token_cosine", "rank")
    return Measured("signal_propagation", "Signals by depth", COLUMNS, rows, facts, matrices, draws=draws)


def _add(here: _Stack, row: Row, state: Tensor, mask: Tensor | None) -> None:
    x = rows_of(state, mask)
    x = x if x.dtype == torch.float64 else x.float()
    unit = nn.functional.normalize(x, dim=-1)
    here.first = unit if here.first is None else here.first
    row["state"] = rms(x)
    row["variance"] = float(x.var(-1, unbiased=False).mean())
    row["input_cosine"] = float((unit * here.first).sum(-1).mean())
    row["token_cosine"] = _token_cosine(state, unit, mask)
    if here.before is not None:
        here.rows[-1]["angle"] = angle(here.before, unit)
    sample = x if len(x) <= SAMPLE else sampled(x, None, SAMPLE)
    centred = (sample - sample.mean(0)).cpu().double()
    row["rank"] = effective_rank(centred)
    here.grams.append(centred @ centred.T)
    here.before = unit
    here.rows.append(row)


def _token_cosine(state: Tensor, unit: Tensor, mask: Tensor | None) -> float | None:
    if state.ndim != 3:
        return None
    if mask is None:
        return mean_product(unit.view(state.shape), unit.new_ones(state.shape[:2])) if state.shape[1] > 1 else None
    whole = unit.new_zeros(state.shape)
    whole[mask] = unit
    return mean_product(whole, mask.to(unit.dtype)) if (mask.sum(1) > 1).any() else None


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(norm_of(x)) / math.sqrt(max(1, x.numel()))


def _rms_of(tensors: tuple[Tensor, ...], mask: Tensor | None) -> float:
    squares, count = 0.0, 0
    for tensor in tensors:
        x = tensor[mask] if mask is not None and tensor.shape[:2] == mask.shape else tensor
        squares, count = squares + rms(x) ** 2 * x.numel(), count + x.numel()
    return math.sqrt(squares / max(1, count))


def _over(a: float, b: float) -> float | None:
    return a / b if b else None


def angle(x: Tensor, z: Tensor) -> float:
    """Unit vectors (N D), (N D) -> the mean angle between rows, over π. By the chord, which small angles need."""
    return float(((x - z).norm(dim=-1) / 2).clamp_max(1).asin().mean()) * 2 / math.pi


def effective_rank(matrix: Tensor) -> float:
    """(N D) -> exp of the entropy of its singular values over their sum; 0 of a zero matrix."""
    m = matrix.detach().cpu().double()
    small = m @ m.T if len(m) <= m.shape[1] else m.T @ m
    values = torch.linalg.eigvalsh(small)
    # what rounding leaves of a zero eigenvalue is no rank: its square root would be large
    values = values.where(values > len(values) * torch.finfo(values.dtype).eps * values[-1], 0).clamp_min(0).sqrt()
    total = float(values.sum())
    if total == 0:
        return 0.0
    p = values[values > 0] / total
    return float(torch.exp(-(p * p.log()).sum()))


def cka(grams: list[Tensor]) -> Matrix:
    """(n n) Gram matrices of the same n tokens -> linear CKA of each two, with the unbiased estimate of HSIC; NaN below
    4 tokens and for states without variance."""
    n = len(grams[0])
    if n < 4:
        return [[math.nan] * len(grams) for _ in grams]
    k = torch.stack([gram - gram.diag().diag() for gram in grams])
    sums, rows = k.sum((1, 2)), k.sum(2)
    products = k.flatten(1) @ k.flatten(1).T
    hsic = products + torch.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ rows.T)
    scale = hsic.diag().clamp_min(0).sqrt()
    return (hsic / torch.outer(scale, scale)).tolist()


def _growth(host: Host, name: str, rows: list[Row]) -> dict[str, Any]:
    layers = next(len(stack.layers) for stack in host.stacks if stack.spec.name == name)
    ahead = f"{name}_" if len(host.stacks) > 1 else ""
    sites = (len(rows) - 1) / layers
    depths, variances = [i / sites for i in range(len(rows) - 1)], [row["variance"] for row in rows[:-1]]
    by_layer, by_log = fit_log(depths, variances), fit_log([math.log1p(one) for one in depths], variances)
    if by_layer is None or by_log is None:
        return {}
    return {
        f"{ahead}growth": math.exp(by_layer.slope),
        f"{ahead}growth_r2": by_layer.r2,
        f"{ahead}growth_power": by_log.slope,
        f"{ahead}growth_power_r2": by_log.r2,
    }
