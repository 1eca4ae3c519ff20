"""Paths: a residual net as the sum over 2^n ways through it, and how much gradient comes by ways of each length.

Letters: n residual sites, k the length of a path, which is the number of branches that it goes through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.lines import fit_log
from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import (
    Batch,
    check_batch,
    check_depth,
    check_loss,
    loss_of,
    observed,
    watching,
    wide,
)
from resformer.host import Host, HostStack
from resformer.schemes.base import Branch, Norm, Stream
from resformer.sites import Connection, Step, carried, intercepted, like

Key = tuple[str, int, str]

COLUMNS = (
    Column("paths", "how many there are", "log10"),
    Column("gradient", "norm of what comes by one of them, mean", "loss / state", log=True),
    Column("least", "of those drawn", "loss / state", shown=False, log=True),
    Column("most", "of those drawn", "loss / state", shown=False, log=True),
    Column("share", "of the sum over all paths"),
)


def log_path_counts(n: int) -> list[float]:
    """ln C(n, k) for k = 0 ... n, how many paths of each length there are. Logarithms: C(1000, 500) is 3e299, and
    C(2000, 1000) no float."""
    if type(n) is not int or n < 1:
        raise ValueError(f"the number of residual sites is a whole number of at least 1, got {n!r}")
    whole = math.lgamma(n + 1)
    return [whole - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]


@dataclass(frozen=True)
class PathGradients:
    """Gradient norms by the length of the path, in the unit of the loss per unit of state.

    Attributes:
        sites: n. lengths: the lengths k that were sampled, ascending. norms: for each, the norms at the entry of the
            stack along paths of that length drawn at random.
    """

    sites: int
    lengths: tuple[int, ...]
    norms: tuple[tuple[float, ...], ...]

    @property
    def means(self) -> list[float]:
        return [sum(one) / len(one) for one in self.norms]

    def decay(self) -> float:
        """The factor per branch on the way by which the gradient of a single path changes: exp of the slope of
        ln(mean norm) over k >= 1; 0 where every such gradient is zero."""
        points = [(k, mean) for k, mean in zip(self.lengths, self.means, strict=True) if k and mean > 0]
        if not points:
            return 0.0
        line = fit_log(*zip(*points, strict=True))
        if line is None:
            raise ValueError(f"a decay needs two lengths of at least 1 with a gradient, sampled were {self.lengths}")
        return math.exp(line.slope)

    def contributions(self) -> list[float]:
        """For k = 0 ... n the share of paths of length k in the sum of all norms, C(n, k) |g_k|; lengths between two
        sampled ones are filled in on the logarithmic line between them, those outside have none."""
        logs = [math.log(mean) if mean > 0 else -math.inf for mean in self.means]
        terms = [-math.inf] * (self.sites + 1)
        counts = log_path_counts(self.sites)
        for k in range(self.lengths[0], self.lengths[-1] + 1):
            right = next(i for i, length in enumerate(self.lengths) if length >= k)
            left = right if self.lengths[right] == k else right - 1
            share = (k - self.lengths[left]) / max(1, self.lengths[right] - self.lengths[left])
            between = logs[left] if share == 0 else (1 - share) * logs[left] + share * logs[right]
            terms[k] = counts[k] + between
        top = max(terms)
        if top == -math.inf:
            raise ValueError("no path that was sampled has a gradient: the loss does not depend on the stack's input")
        parts = [math.exp(term - top) for term in terms]
        return [part / sum(parts) for part in parts]

    def effective_length(self) -> float:
        """The mean length of a path, weighted by its gradient; n/2 if all paths had the same."""
        return sum(k * share for k, share in enumerate(self.contributions()))

    def effective_paths(self, mass: float = 0.95) -> float:
        """The share of all 2^n paths that lie in the shortest range of lengths which holds so much of the gradient."""
        shares = self.contributions()
        totals = [0.0, *accumulate(shares)]
        spans = ((low, low + span) for span in range(1, len(totals)) for low in range(len(totals) - span))
        low, high = next(((a, b) for a, b in spans if totals[b] - totals[a] >= mass), (0, len(shares)))
        counts = log_path_counts(self.sites)
        return sum(math.exp(counts[k] - self.sites * math.log(2)) for k in range(low, high))


def paths(
    model: nn.Module, batch: Batch, *, lengths: Sequence[int] | None = None, samples: int = 4, seed: int = 0
) -> Measured:
    """How much of the gradient comes by paths of each length: forward as it is, backward along random paths.

    At each residual connection the gradient comes down through the branch, or past it; a path is one choice for every
    connection of a stack, of which there are 2^n, and its length k the number of branches on it. The gradients of the
    loss in what enters the stack (gates of a scheme belong to the part past the branch, norms after the add to both)
    sum over all paths to the whole gradient.

    gradient = mean of ‖g‖ over `samples` paths of length k drawn at random, least and most of them beside it; paths =
    log10 C(n, k), how many there are; share = C(n, k) gradient / Σ_j C(n, j) gradient_j, lengths between two of those
    that are measured filled in on the logarithmic line.

    lengths: by default all up to 16, and every second, fourth ... of deeper stacks. Norms are over the batch, padding
    included.

    facts, for each stack: `decay`, the factor per branch on the way by which the gradient of one path changes (exp of
    the slope of log gradient against k >= 1); `effective_length` = Σ_k k share_k, of which `of_half` is the ratio to
    n/2, the mean length of all paths; `effective_paths`, the share of all 2^n paths in the shortest range of lengths
    that holds 95 % of the gradient.

    One forward and half a backward pass for each path. Raises a ValueError for a model without a loss, fewer than two
    layers, a batch of other keys, lengths outside [0, n], samples below 1.

    Reference   Veit et al. 2016, arXiv:1605.06431, section 5
    """
    check_samples(samples)
    check_batch(model, batch)
    check_loss(model, batch)
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    with observed(model, batch) as host:
        check_depth(host, "paths")
        ran: list[Connection] = []
        with watching(host, lambda one: ran.append(one.at)):
            loss_of(model, batch)
        for stack in host.stacks:
            sites = [at.key for at in ran if at.stack is stack]
            if not sites:
                continue
            found = draw_paths(len(sites), _norm_along(host, model, batch, stack, sites), lengths, samples, seed)
            rows += _rows(stack.spec.name, found)
            ahead = f"{stack.spec.name}_" if len(host.stacks) > 1 else ""
            facts |= {f"{ahead}{name}": value for name, value in _facts(found).items()}
    return Measured(
        "paths",
        "Gradient by the length of its paths",
        COLUMNS,
        rows,
        facts,
        keys=("stack", "length"),
        along="length",
        draws=("gradient", "paths", "share"),
    )


def _norm_along(
    host: Host, model: nn.Module, batch: Batch, stack: HostStack, sites: Sequence[Key]
) -> Callable[[Sequence[bool]], float]:
    def norm_along(through: Sequence[bool]) -> float:
        chosen, entry = dict(zip(sites, through, strict=True)), list[Tensor]()

        def around(at: Connection, step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
            if at.key not in chosen:
                return step(s, branch, norm)
            if not entry:
                entry[:] = [tensor.detach().requires_grad_() for tensor in carried(s)]
                s = like(s, tuple(entry))
            return (through_branch if chosen[at.key] else past_branch)(step, s, branch, norm)

        with intercepted(host, around), torch.enable_grad():
            loss = loss_of(model, batch)
        if not loss.requires_grad:  # a net without shortcuts has no path past a branch
            return 0.0
        found = torch.autograd.grad(loss, entry, allow_unused=True)
        return math.sqrt(sum(float(wide(g).square().sum()) for g in found if g is not None))

    return norm_along


def _rows(stack: str, found: PathGradients) -> list[Row]:
    counts, shares = log_path_counts(found.sites), found.contributions() if any(found.means) else None
    rows: list[Row] = []
    for k, mean, norms in zip(found.lengths, found.means, found.norms, strict=True):
        row: Row = {"stack": stack, "length": k, "gradient": mean, "least": min(norms), "most": max(norms)}
        rows.append(row | {"paths": counts[k] / math.log(10), "share": shares and shares[k]})
    return rows


def _facts(found: PathGradients) -> dict[str, Any]:
    if not any(found.means):
        return {"sites": found.sites, "verdict": "zero"}
    length = found.effective_length()
    facts = {"effective_length": length, "of_half": 2 * length / found.sites}
    if sum(1 for k in found.lengths if k) > 1:
        facts = {"decay": found.decay()} | facts
    if found.lengths[0] == 0 and found.lengths[-1] == found.sites:
        facts["effective_paths"] = found.effective_paths()
    return {"sites": found.sites} | facts


def check_samples(samples: Any) -> None:
    if type(samples) is not int or samples < 1:
        raise ValueError(f"samples must be a whole number of at least 1, got {samples!r}")


def draw_paths(
    n: int,
    norm_along: Callable[[Sequence[bool]], float],
    lengths: Sequence[int] | None = None,
    samples: int = 8,
    seed: int = 0,
) -> PathGradients:
    """Random paths of any network of n sites: `norm_along(through)` is the norm of the gradient that comes through the
    branches of some of them, and past the others."""
    check_samples(samples)
    stride = 2 ** max(0, math.ceil(math.log2(max(n, 1) / 16)))
    chosen = sorted({*range(0, n + 1, stride), n}) if lengths is None else sorted(set(lengths))
    if n < 1 or not chosen or chosen[0] < 0 or chosen[-1] > n:
        raise ValueError(f"lengths of paths lie in [0, {n}] with {n} residual sites, got {list(chosen)}")
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for k in chosen:
        found = []
        for _ in range(1 if k in (0, n) else samples):
            through = set(torch.randperm(n, generator=generator)[:k].tolist())
            found.append(norm_along([number in through for number in range(n)]))
        norms.append(tuple(found))
    return PathGradients(n, tuple(chosen), tuple(norms))


@contextmanager
def routed(schemes: Sequence[Any], through: Sequence[bool]) -> Iterator[None]:
    """While it lasts, gradients go through the branch alone at the sites chosen, and past it at the others; what the
    network computes is the same."""
    try:
        for scheme, by_branch in zip(schemes, through, strict=True):
            scheme.step = partial(through_branch if by_branch else past_branch, scheme.step)
        yield
    finally:
        for scheme in schemes:
            vars(scheme).pop("step", None)


def past_branch(step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
    """One site, whose branch passes no gradient."""

    def held(x: Tensor, *rest: Any) -> Tensor:
        with torch.no_grad():
            return branch(x, *rest)

    return step(s, replace(branch, function=held), norm)


def through_branch(step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
    """One site, which passes gradients through its branch alone: taken once to have what the branch gives, and once
    more with that from a stream that passes none."""
    calls: list[tuple[Tensor, list[Tensor]]] = []

    def recorded(x: Tensor, values: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        seen: list[Tensor] = []
        if values is None:
            y = branch(x)
        else:
            y = branch(x, lambda v: seen.append(v) or values(v))  # type: ignore[func-returns-value]
        calls.append((y, seen))
        return y

    step(s, replace(branch, function=recorded), norm)
    again = iter(calls)

    def repeated(x: Tensor, values: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        y, seen = next(again)
        if values is not None:
            for v in seen:
                values(v)  # what schemes take from inside a branch
        return y

    fast = like(s, tuple(tensor.detach() for tensor in carried(s)))
    return step(fast, replace(branch, function=repeated), norm)
