"""Weighted sums of earlier states, with one weight for each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resformer.schemes.fast import fast, through


def weighted(weights: Tensor | Sequence[float], states: Sequence[Tensor]) -> Any:
    """Σ_j w_j X_j"""
    if isinstance(weights, Tensor) and fast():
        return _Weighted.apply(weights, *states)
    return sum(w * state for w, state in zip(weights, states, strict=True))


class _Weighted(torch.autograd.Function):
    """Each product is added in place; of the gradients only the states' own are new tensors."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *states: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *states)
        wide = functools.reduce(torch.promote_types, (state.dtype for state in states))
        total = (weights[0] * states[0]).to(wide)
        for w, state in zip(weights[1:], states[1:], strict=True):
            total.addcmul_(state, w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, *states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return through(lambda w, *x: sum(a * b for a, b in zip(w, x, strict=True)), ctx.saved_tensors, grad)
        wanted = ctx.needs_input_grad
        dots = None
        if wanted[0]:
            dots = torch.stack([inner(grad, state) for state in states]).to(weights.dtype)
        scaled = (
            (w * grad).to(state.dtype) if need else None
            for w, state, need in zip(weights, states, wanted[1:], strict=True)
        )
        return dots, *scaled


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Σ a ⊙ b over all entries, in single precision at least."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.dot(a.reshape(-1).to(wide), b.reshape(-1).to(wide))
