"""When a formula may be computed by a fast path, and what such a path does where only the formula will do.

A fast path is an `autograd.Function` that computes what its formula says, to rounding, and keeps less or takes fewer
passes over memory. Nothing needs one to be right: with `written_out` all schemes compute as their formulas are written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_written_out = 0  # how many ask for the formulas; of the process, since backward passes have threads of their own


@contextmanager
def written_out() -> Iterator[None]:
    """Meanwhile all schemes compute as their formulas are written, without a fast path: to compare, and to debug.

    Around the backward pass too where checkpointing computes again there, which raises an error if it finds other
    tensors than before.
    """
    global _written_out
    _written_out += 1
    try:
        yield
    finally:
        _written_out -= 1


def fast() -> bool:
    """Whether fast paths serve here: compilers fuse the formula themselves, and tracing, `torch.func` and forward-mode
    differentiation go through its operators."""
    return not (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or _written_out
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def through(formula: Callable[..., Any], inputs: Sequence[Any], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of a formula's inputs as tensors that can be differentiated again."""
    # by views of their own, since inputs may be made from each other
    own = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    wanted = [x for x, given in zip(own, inputs, strict=True) if x is not given]
    outputs = formula(*own)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
    )
    return tuple(None if x is given else next(found) for x, given in zip(own, inputs, strict=True))


def unrounded(function: Any) -> Any:
    """The same outside of autocast: what is carried keeps the precision that it has, as the sum of a host does.

    Backward passes with products need it too: some call them inside of autocast.
    """

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        device = next((x.device.type for x in args if isinstance(x, Tensor)), "meta")
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):  # no "meta" has it
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wrapped
