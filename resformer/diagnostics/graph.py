"""The graph of one forward pass: all that is carried to each connection, up to what leaves the stack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.observe import Batch, text, watching
from resformer.host import Host, HostStack
from resformer.schemes.base import Branch, Norm, Stream
from resformer.sites import Connection, Step, after_layers, carried, intercepted, like, readable


@dataclass
class Graph:
    """Of one stack. It begins with leaves, so that nothing below it takes part."""

    stack: HostStack
    before: dict[tuple[int, str], tuple[Tensor, ...]] = field(default_factory=dict)  # by layer and site
    end: Tensor | None = None  # (B T D)
    mask: Tensor | None = None  # (B T), the tokens of the end that are text; None: all


def graphs(host: Host, model: nn.Module, batch: Batch) -> list[Graph]:
    """Of each stack that runs, from a forward pass of a model within reach. Raises `NotFiniteError`."""
    found = {stack.spec.name: Graph(stack) for stack in host.stacks}

    def around(at: Connection, step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
        before = found[at.name].before
        # a node of its own for each tensor: one that is carried past several sites has a gradient at each
        tapped = tuple(t.view_as(t) if before else t.detach().requires_grad_() for t in carried(s))
        before[at.layer, at.site] = tapped
        return step(like(s, tapped), branch, norm)

    def end(stack: HostStack, layer: int, output: Any) -> None:
        if layer == len(stack.layers) - 1:
            one = found[stack.spec.name]
            one.end = readable(output)
            one.mask = text(host, stack, batch, one.end)

    with watching(host), intercepted(host, around), after_layers(host, end), torch.enable_grad():
        model(**batch)
    return [one for one in found.values() if one.before and one.end is not None]
