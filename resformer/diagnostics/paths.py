"""Paths: a residual net as the sum over 2^n ways through it, and how much gradient comes by ways of each length.

Letters: n residual sites, k the length of a path, which is the number of branches that it goes through.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resformer.host import find_host
from resformer.patching import is_patched, patch
from resformer.schemes import Scheme
from resformer.schemes.base import Norm


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
        points = [(k, math.log(mean)) for k, mean in zip(self.lengths, self.means, strict=True) if k and mean > 0]
        if not points:
            return 0.0
        if len(points) < 2:
            raise ValueError(f"a decay needs two lengths of at least 1 with a gradient, sampled were {self.lengths}")
        middle = sum(k for k, _ in points) / len(points)
        height = sum(value for _, value in points) / len(points)
        over = sum((k - middle) * (value - height) for k, value in points)
        return math.exp(over / sum((k - middle) ** 2 for k, _ in points))

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
        ranges = [
            (high - low, low, high)
            for low in range(self.sites + 1)
            for high in range(low, self.sites + 1)
            if sum(shares[low : high + 1]) >= mass
        ]
        _, low, high = min(ranges)
        counts = log_path_counts(self.sites)
        return sum(math.exp(counts[k] - self.sites * math.log(2)) for k in range(low, high + 1))


def path_gradients(
    model: PreTrainedModel,
    batch: dict[str, Any],
    *,
    lengths: Sequence[int] | None = None,
    samples: int = 8,
    seed: int = 0,
) -> PathGradients:
    """Gradients at the input of the first layer along random paths of a model: forward as it is, backward through
    chosen branches and past all others.

    Args:
        model: of one stack, patched with a scheme of one stream and one call of each branch, or not patched; then its
            own residual connection is measured, on a copy. batch: has labels.
        lengths: by default all up to 16, and every second, fourth ... of deeper models.
        samples: paths of each length. seed: of the choice of branches.

    Where a norm follows the add (post-LN), shortcut and branch both pass through it. Dropout is off; the model is left
    as it was. Raises a ValueError for several stacks, for schemes with streams or solvers, and for a model without a
    loss. Reference: Veit et al. 2016, arXiv:1605.06431, section 5.
    """
    if not is_patched(model):
        model = patch(copy.deepcopy(model), "identity")
    host = find_host(model)
    if len(host.stacks) > 1:
        raise ValueError(f"path_gradients is for models of one stack, and family {host.family.name!r} has several")
    layers = host.layers
    sites = [one for layer in layers for one in layer.modules() if isinstance(one, Scheme)]
    mode, required = model.training, [(p, p.requires_grad) for p in model.parameters()]
    entry: list[Tensor] = []

    def enter(module: Any, args: Any) -> Any:
        entry[:] = [args[0].detach().requires_grad_()]
        return (entry[0], *args[1:])

    def gradient() -> Tensor:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError(
                f"{type(model).__name__} gives no loss for this batch; take a model with a head, and give labels"
            )
        return torch.autograd.grad(loss, entry[0], allow_unused=True)[0]

    hook = layers[0].register_forward_pre_hook(enter)
    model.eval()
    try:
        for p, _ in required:
            p.requires_grad_(False)
        return sampled(sites, gradient, lengths, samples, seed)
    finally:
        hook.remove()
        for p, flag in required:
            p.requires_grad_(flag)
        model.train(mode)


def sampled(
    sites: Sequence[Scheme],
    gradient: Callable[[], Tensor | None],
    lengths: Sequence[int] | None = None,
    samples: int = 8,
    seed: int = 0,
) -> PathGradients:
    """What `path_gradients` does, for any network: `sites` are its schemes in their order, and `gradient` runs forward
    and backward and returns the gradient at the entry, None where nothing arrives."""
    n = len(sites)
    stride = 2 ** max(0, math.ceil(math.log2(max(n, 1) / 16)))
    chosen = sorted({*range(0, n + 1, stride), n}) if lengths is None else sorted(set(lengths))
    if n < 1 or not chosen or chosen[0] < 0 or chosen[-1] > n:
        raise ValueError(f"lengths of paths lie in [0, {n}] with {n} residual sites, got {list(chosen)}")
    if type(samples) is not int or samples < 1:
        raise ValueError(f"samples must be a whole number of at least 1, got {samples!r}")
    for site in sites:
        if type(site).step is not Scheme.step or type(site).streams():
            raise ValueError(
                f"paths are counted where a branch is added to one stream; scheme {site.name!r} joins them otherwise"
            )
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for k in chosen:
        found = []
        for _ in range(1 if k in (0, n) else samples):
            through = set(torch.randperm(n, generator=generator)[:k].tolist())
            with routed(sites, [number in through for number in range(n)]):
                g = gradient()
            found.append(0.0 if g is None else float(g.double().norm()))
        norms.append(tuple(found))
    return PathGradients(n, tuple(chosen), tuple(norms))


@contextmanager
def routed(sites: Sequence[Scheme], through: Sequence[bool]) -> Iterator[None]:
    """While it lasts, gradients go through the branch alone at the sites chosen, and past it at the others; what the
    network computes is the same."""
    try:
        for site, by_branch in zip(sites, through, strict=True):
            site.write = partial(_by_branch if by_branch else _past, site.write)  # type: ignore[method-assign]
        yield
    finally:
        for site in sites:
            vars(site).pop("write", None)


def _by_branch(write: Callable[..., Any], s: Tensor, y: Tensor, norm: Norm) -> Any:
    return write(s.detach(), y, norm)


def _past(write: Callable[..., Any], s: Tensor, y: Tensor, norm: Norm) -> Any:
    return write(s, y.detach(), norm)
