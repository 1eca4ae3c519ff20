"""Whether the norms before and behind the layers of a model are those that its family names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resformer.host import Host, HostStack
from resformer.layer import find


@dataclass
class Ends:
    """What the layers of each stack began with and ended in, and what the norms around them read and gave, in one
    forward pass; of the first text alone, the others may be padded."""

    first: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # path from the base -> input, output


@contextmanager
def recording(host: Host) -> Iterator[Ends]:
    """Meanwhile a forward pass of the model, not patched, is seen."""
    ends, hooks = Ends(), []
    for stack in host.stacks:
        hooks += _watch_layers(stack, ends)
    inside = {id(part) for layer in host.layers for part in layer.modules()}
    named = {id(find(stack.root, path)) for stack in host.stacks for path in _named(stack)}
    for path, module in host.base.named_modules():
        if id(module) not in inside and (id(module) in named or "Norm" in type(module).__name__):
            hooks.append(module.register_forward_hook(_norm_hook(ends, path)))
    try:
        yield ends
    finally:
        for hook in hooks:
            hook.remove()


def check_ends(host: Host, ends: Ends) -> None:
    """A `ValueError` for a norm that stands elsewhere than the family says, or that it does not name."""
    for stack in host.stacks:
        name, spec = stack.spec.name, stack.spec
        if name not in ends.first or name not in ends.last:
            continue  # layers of other classes stand at an end
        paths = {id(module): path for path, module in host.base.named_modules()}
        closing = paths[id(find(stack.root, spec.final_norm))] if spec.final_norm else ""
        opening = paths[id(find(stack.root, spec.embed_norm))] if spec.embed_norm else ""
        readers = [path for path, calls in ends.norms.items() if any(_same(ends.last[name], x) for x, _ in calls)]
        givers = [path for path, calls in ends.norms.items() if any(_same(ends.first[name], y) for _, y in calls)]
        who = f"family {host.family.name!r} does not describe this {type(host.base).__name__}: "
        if closing and closing not in readers and (readers or closing not in ends.norms):
            raise ValueError(
                f"{who}the final norm of the {name}, {spec.final_norm!r}, does not read what the last layer gives"
                + (f"; {readers[0]!r} does" if readers else ", nor anything else")
            )
        if not closing and readers:
            raise ValueError(
                f"{who}{readers[0]!r} is a norm of what the last layer of the {name} gives; name it in `final_norm`"
            )
        if opening and opening not in givers:
            raise ValueError(
                f"{who}the first layer of the {name} does not read what the norm {spec.embed_norm!r} gives"
                + (f", but {givers[0]!r}" if givers else "; leave it out of `embed_norm`")
            )
        if not opening and givers:
            raise ValueError(
                f"{who}the first layer of the {name} reads what the norm {givers[0]!r} gives; name it in `embed_norm`"
            )


def _named(stack: HostStack) -> list[str]:
    return [path for path in (stack.spec.final_norm, stack.spec.embed_norm) if path]


def _watch_layers(stack: HostStack, ends: Ends) -> list[Any]:
    name, first, last = stack.spec.name, stack.layers[0], stack.layers[-1]
    hooks: list[Any] = []

    def entering(module: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else next(iter(kwargs.values()))
        if isinstance(states, Tensor) and name not in ends.first:
            ends.first[name] = states[:1].clone()

    def leaving(module: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(states, Tensor):
            ends.last[name] = states[:1].clone()

    if stack.fits(first):
        hooks.append(first.register_forward_pre_hook(entering, with_kwargs=True))
    if stack.fits(last):
        hooks.append(last.register_forward_hook(leaving))
    return hooks


def _norm_hook(ends: Ends, path: str) -> Any:
    def called(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            ends.norms.setdefault(path, []).append((args[0][:1].clone(), output[:1].clone()))

    return called


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
