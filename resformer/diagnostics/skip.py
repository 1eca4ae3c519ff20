"""The skip path: what the stack computes with what its branches give held fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resformer.host import Host, HostStack
from resformer.layer import Residual, identity
from resformer.schemes.base import Branch, Norm, Stream
from resformer.sites import Connection, Step, after_layers, carried, connections, intercepted, like, readable


@dataclass
class Passed:
    """One connection on the skip path; all tensors belong to one graph, from what entered the stack to its end."""

    at: Connection
    before: tuple[Tensor, ...]  # all that was carried to it
    wrote: list[Tensor]  # what the branch gave, a leaf for each of its calls
    after: tuple[Tensor, ...]


@dataclass
class Path:
    """The skip path of one stack."""

    stack: HostStack
    entered: Tensor | None = None  # (B T D), a leaf
    first: Tensor | None = None  # (B T D), what the first branch read
    passed: list[Passed] = field(default_factory=list)
    shifts: list[Tensor] = field(default_factory=list)  # leaves: what frozen norms add
    ended: Tensor | None = None  # (B T D), what the last layer hands on


@contextmanager
def skip_paths(host: Host, *, frozen: bool) -> Iterator[dict[str, Path]]:
    """Meanwhile a forward pass, with gradients enabled, leaves the graph of each stack's skip path, by its name.

    frozen: the norms after the add, and a final norm that the scheme applies, divide by what they divided by in this
    pass, as constants: they are linear then, but for what they add.
    """
    paths = {stack.spec.name: Path(stack) for stack in host.stacks}

    def held(path: Path, norm: Norm) -> Norm:
        return partial(freeze, norm, shifts=path.shifts) if frozen and norm is not identity else norm

    def around(at: Connection, step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
        path, wrote = paths[at.name], list[Tensor]()
        # a node of its own for each tensor: one that is carried past several sites has a gradient at each
        s = like(s, tuple(tensor.view_as(tensor) for tensor in carried(s)))

        def alone(x: Tensor, *rest: Any) -> Tensor:
            if path.first is None:
                path.first = x.detach()
            with torch.no_grad():
                y = branch(x.detach(), *rest)
            wrote.append(y.detach().requires_grad_())
            return wrote[-1]

        out = step(s, Branch(alone, branch.mask, branch.depends), held(path, norm))
        path.passed.append(Passed(at, carried(s), wrote, carried(out)))
        return out

    def end(stack: HostStack, layer: int, output: Any) -> None:
        if layer == len(stack.layers) - 1:
            paths[stack.spec.name].ended = readable(output)

    ends = [(one.name, one.own) for one in connections(host) if one.own.opens or one.own.closes]
    try:
        for name, own in ends:
            _open_and_close(own, paths[name], held)
        with intercepted(host, around), after_layers(host, end), torch.enable_grad():
            yield paths
    finally:
        for _, own in ends:
            for scheme in own.schemes:
                vars(scheme).pop("start", None)
                vars(scheme).pop("finish", None)


def _open_and_close(own: Residual, path: Path, held: Callable[[Path, Norm], Norm]) -> None:
    """Have the stream start from a leaf, and its readout hold its norm."""
    first: Any = own.schemes[-1 if own.steps_block else 0]
    last: Any = own.schemes[-1]
    start, finish = type(first).start, type(last).finish

    def begin(h: Tensor) -> Stream:
        if path.entered is None:  # else of layers further up that are patched apart
            path.entered = h = h.detach().requires_grad_()
        return start(first, h)

    def close(s: Any, norm: Norm) -> Tensor:
        return finish(last, s, held(path, norm))

    if own.opens:
        first.start = begin
    if own.closes:
        last.finish = close


def freeze(norm: Norm, z: Tensor, *, shifts: list[Tensor]) -> Tensor:
    """(B T D) -> norm(z), as a map that is linear in z but for what it adds, which is put among the `shifts` as a leaf.

    For any norm of the form g ⊙ (z - m) / σ + b, with m the mean of z or 0 and σ a number for each token: g and b are
    read off what it makes of a vector and its negative, whether it centres off a vector that is moved, 1 / σ off z.
    Raises a ValueError for a norm of another form.
    """
    with torch.no_grad():
        width, flat = z.shape[-1], z.detach()
        k = torch.arange(width, device=z.device, dtype=z.dtype)
        e = ((1 - 2 * (k % 2)) * (1 + k / width))[None, None]
        plus, minus = norm(e), norm(-e)
        near = max(1e-3, 4 * torch.finfo(z.dtype).eps)  # a norm rounds what it reads, multiplies and gives
        centres = bool((norm(e + 4) - plus).abs().max() <= 10 * near * plus.abs().max())

        def centre(x: Tensor) -> Tensor:
            return x - x.mean(-1, keepdim=True) if centres else x

        gain, shift, out = (plus - minus) / 2 / centre(e), (plus + minus) / 2, norm(flat)
        w = gain * centre(flat)
        inverse = ((out - shift) * w).sum(-1, keepdim=True) / w.square().sum(-1, keepdim=True).clamp_min(1e-30)
        if not torch.allclose(w * inverse + shift, out, rtol=near, atol=near * float(out.abs().max())):
            raise ValueError(
                f"{getattr(norm, '__class__', norm).__name__} is no norm of the form g (z - m) / s + b, which can be "
                "frozen"
            )
    shifts.append(shift.expand_as(z).clone().requires_grad_())
    return gain * centre(z) * inverse + shifts[-1]
