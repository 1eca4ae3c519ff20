"""Sums of states: one with a factor, with one weight for each, one for each token of each, or a gate between two."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from resformer.schemes.fast import fast, through, unrounded

EPS = 1e-6  # of RMS
PIECE = 2**18  # how many entries a library of products may sum in one go: it loses digits, and CUDA's takes no 2³¹


def plus(x: Tensor, y: Tensor, a: Tensor | float) -> Any:
    """x + a ⊙ y, with a of (1) or (D), or a number, which takes one pass."""
    return x + a * y if isinstance(a, Tensor) else torch.add(x, y, alpha=a)


def weighted(weights: Tensor | Sequence[float], states: Sequence[Tensor]) -> Any:
    """Σ_j w_j X_j"""
    if isinstance(weights, Tensor) and fast():
        return _Weighted.apply(weights, *states)
    return _weighted(weights, *states)


def _weighted(weights: Tensor | Sequence[float], *states: Tensor) -> Any:
    return sum(w * state for w, state in zip(weights, states, strict=True))


class _Weighted(torch.autograd.Function):
    """Each product is added in place; of the gradients only the states' own are new tensors."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *states: Tensor) -> Tensor:
        ctx.dtypes = [state.dtype for state in states]
        ctx.save_for_backward(weights, *(states if ctx.needs_input_grad[0] else ()))
        total = (weights[0] * states[0]).to(_widest(states))
        for w, state in zip(weights[1:], states[1:], strict=True):
            total.addcmul_(state, w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, *states = ctx.saved_tensors  # no states where the weights learn nothing
        dots = None
        if states:
            if torch.is_grad_enabled():
                return through(_weighted, (weights, *states), grad)
            dots = torch.stack([inner(grad, state) for state in states]).to(weights.dtype)
        scaled = (
            (w * grad).to(dtype) if need else None
            for w, dtype, need in zip(weights, ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        )
        return dots, *scaled


@unrounded
def attended(query: Tensor, states: Sequence[Tensor], gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """gain · Σ_i a_i v_i (... D) and a (n ...), with a = softmax_i(query · RMS(v_i)) for each token.

    RMS(v) = v / sqrt(mean v² + 1e-6)
    """
    if fast():
        return _Attended.apply(query, gain, *states)
    return _attended(query, gain, *states)


def _attended(query: Tensor, gain: float, *states: Tensor) -> tuple[Tensor, Tensor]:
    v = torch.stack([state.to(_widest(states)) for state in states])
    wide = torch.promote_types(v.dtype, torch.float32)
    weights = (functional.rms_norm(v.to(wide), v.shape[-1:], eps=EPS) @ query.to(wide)).softmax(0)
    return (gain * weights.to(v.dtype)[..., None] * v).sum(0), weights


def _widest(states: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (state.dtype for state in states))


class _Attended(torch.autograd.Function):
    """The states are never stacked nor normed: of RMS(v) only the few products with the query are divided."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, gain: float, *states: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.gain = gain
        dtype = _widest(states)
        wide = torch.promote_types(dtype, torch.float32)
        found = []
        for state in states:  # both while it is in the cache
            length = torch.linalg.vector_norm(state, dim=-1, dtype=wide)
            found.append((length, torch.linalg.vecdot(state.to(wide), query.to(wide))))
        lengths, dots = (torch.stack(one) for one in zip(*found, strict=True))
        scales = torch.rsqrt(lengths.square() / len(query) + EPS)
        scores = dots * scales
        weights = scores.softmax(0)
        by_state = (gain * weights).to(dtype)[..., None]
        total = by_state[0] * states[0]
        for weight, state in zip(by_state[1:], states[1:], strict=True):
            total.addcmul_(state.to(dtype), weight)
        ctx.save_for_backward(query, scales, scores, *states)
        return total, weights

    @staticmethod
    @unrounded
    def backward(ctx: Any, to_total: Tensor | None, to_weights: Tensor | None) -> Any:
        query, scales, scores, *states = ctx.saved_tensors
        if torch.is_grad_enabled():
            gain = ctx.gain
            found = through(lambda q, *v: _attended(q, gain, *v), (query, *states), to_total, to_weights)
            return found[0], None, *found[1:]
        dtype, weights = _widest(states), scores.softmax(0)
        to_weights = torch.zeros_like(weights) if to_weights is None else to_weights
        if to_total is not None:
            dots = [torch.linalg.vecdot(to_total, state.to(dtype)) for state in states]
            to_weights = to_weights + ctx.gain * torch.stack(dots)
        to_scores = weights * (to_weights - (weights * to_weights).sum(0))
        by_query = to_scores * scales
        by_state = (-to_scores * scores * scales.square() / len(query)).to(dtype)[..., None]
        by_total = (ctx.gain * weights).to(dtype)[..., None]
        to_query: Any = 0
        gradients = []
        for i, given in enumerate(states):
            state = given.to(dtype)
            to_query = to_query + (by_query[i][..., None] * state).reshape(-1, len(query)).sum(0)  # in single precision
            gradient = (by_query[i][..., None] * query.to(by_query.dtype)).to(dtype)
            gradient.addcmul_(state, by_state[i])
            if to_total is not None:
                gradient.addcmul_(to_total, by_total[i])
            gradients.append(gradient.to(given.dtype))
        return to_query.to(query.dtype), None, *gradients


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Σ a ⊙ b over all entries, in single precision at least."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    pieces = zip(a.reshape(-1).split(PIECE), b.reshape(-1).split(PIECE), strict=True)
    return torch.stack([torch.dot(x.to(wide), y.to(wide)) for x, y in pieces]).sum()


def blend(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """g ⊙ y + (1 - g) ⊙ x"""
    return _Blend.apply(x, y, g) if fast() else _blend(x, y, g)


def _blend(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    return g * y + (1 - g) * x


class _Blend(torch.autograd.Function):
    """Keeps the three alone, without 1 - g. (`torch.lerp` does too, but is not exact where g = ½.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, g)
        return _blend(x, y, g)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, g = ctx.saved_tensors
        if torch.is_grad_enabled():
            return through(_blend, (x, y, g), grad)
        to_x = torch.addcmul(grad, grad, g, value=-1)  # rounded once, also where g is near 1
        return to_x.to(x.dtype), (grad * g).to(y.dtype), ((y - x) * grad).to(g.dtype)
