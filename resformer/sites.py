"""Every residual connection of a model within reach, whether it is patched or not, to be seen or stood in for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from resformer.host import Host, HostStack, find_host, sharded
from resformer.hosts.family import Site
from resformer.layer import Calls, Residual, find, show_states
from resformer.patching import check_still_described, prepare_branch
from resformer.plan import StackPlan, make_plan
from resformer.probing import hooked
from resformer.schemes.base import Branch, Norm, Scheme, Stream
from resformer.swap import swap, swap_back, swapped

Step = Callable[[Any, Branch, Norm], Stream]


@dataclass(frozen=True, eq=False)
class Connection:
    """One residual connection of a model: a site of a layer, or with scope "block" a whole layer, as site "block"."""

    stack: HostStack
    layer: int  # of a layer that is called more than once, the number of the call
    site: str
    index: int  # number of the connection in its stack, from 0
    own: Residual
    spec: Site | None  # None of a block

    @property
    def name(self) -> str:
        """Of the stack, "encoder" or "decoder"."""
        return self.stack.spec.name

    @property
    def key(self) -> tuple[str, int, str]:
        """Stack, layer and site, which no other connection of the model has."""
        return self.name, self.layer, self.site

    @property
    def module(self) -> nn.Module:
        return self.stack.layers[self.layer]

    @property
    def scheme(self) -> Scheme:
        return getattr(self.own, self.site)

    @property
    def norms(self) -> dict[str, Any]:
        """The norms that act here, by slot: "pre", "out", "post"; of a block none, its sites have them."""
        slots = self.own.acts[self.site] if self.spec is not None else {}
        return {slot: self.own.norm(self.module, path) for slot, path in slots.items()}

    def __str__(self) -> str:
        return f"site {self.site!r} of layer {self.layer} of the {self.name}"


Around = Callable[[Connection, Step, Any, Branch, Norm], Stream]


@contextmanager
def within_reach(model: nn.Module) -> Iterator[Host]:
    """Meanwhile each layer of a known class runs as patched, so that `intercepted` reaches its connections: those that
    are not patched through the identity scheme, which computes the same bits. Afterwards the model is as it was.

    Raises a `ValueError` for models of no known family, and where the family does not describe this transformers.
    """
    host = find_host(model)
    free = {stack.spec.name: _unpatched(stack) for stack in host.stacks}
    if not any(free.values()):
        yield host
        return
    if any(stack.residuals() for stack in host.stacks) and sharded(model):  # else `find_host` has looked
        raise ValueError(f"this {type(model).__name__} is sharded (FSDP); look at it before it is sharded")
    check_still_described(host)
    chosen = {name: numbers for name, numbers in free.items() if numbers}
    plan = make_plan(host, "identity", "preserve", None, chosen, {}, check=False)
    with ExitStack() as lent:
        for part in plan.stacks:
            lent.enter_context(_lent(host, part))
        yield host


def _unpatched(stack: HostStack) -> list[int]:
    patched = stack.residuals()
    return [number for number in stack.fitting if number not in patched]


@contextmanager
def _lent(host: Host, part: StackPlan) -> Iterator[None]:
    stack, spec = part.stack, part.stack.spec
    layers: dict[int, Any] = {id(stack.layers[number]): stack.layers[number] for number in part.residuals}
    shown = None
    if spec.returns and not stack.residuals():  # else patching has seen to it
        loop: Any = find(stack.root, spec.layers.rpartition(".")[0]) if "." in spec.layers else stack.root
        shown = loop.register_forward_hook(show_states)
    try:
        for layer in layers.values():
            owns = {number: own for number, own in part.residuals.items() if stack.layers[number] is layer}
            layer.resformer = Calls(owns) if stack.shared else next(iter(owns.values()))
            for site in stack.sites(layer):
                for own in owns.values():
                    prepare_branch(layer, site, getattr(own, site.name))
            swap(layer, "layer", host.family.name, spec.name)
        yield
    finally:
        if shown is not None:
            shown.remove()
        for layer in layers.values():
            for module in layer.modules():
                if swapped(module, "bare"):
                    swap_back(module)
            if swapped(layer, "layer"):
                swap_back(layer)
            if hasattr(layer, "resformer"):
                del layer.resformer


def connections(host: Host) -> list[Connection]:
    """Of a model within reach, stack by stack in the order in which they run."""
    found = []
    for stack in host.stacks:
        index = 0
        for number, own in stack.residuals().items():
            specs: dict[str, Site | None] = {site.name: site for site in stack.spec.sites if site.name in own.acts}
            for name, spec in ({"block": None} if own.steps_block else specs).items():
                found.append(Connection(stack, number, name, index, own, spec))
                index += 1
    return found


@contextmanager
def intercepted(host: Host, around: Around) -> Iterator[None]:
    """Meanwhile each connection of a model within reach runs as `around(connection, step, s, branch, norm)`, where
    `step(s, branch, norm)` is what it does by itself."""
    changed: list[tuple[Any, Any]] = []
    try:
        for one in connections(host):
            scheme: Any = one.scheme
            changed.append((scheme, vars(scheme).get("step")))  # of someone else who looks on
            scheme.step = partial(around, one, scheme.step)
        yield
    finally:
        for scheme, before in changed:
            if before is None:
                del scheme.step
            else:
                scheme.step = before


@contextmanager
def after_layers(host: Host, see: Callable[[HostStack, int, Any], Any]) -> Iterator[None]:
    """Meanwhile `see(stack, number, output)` is called with what each layer hands on, a tensor or a tuple that begins
    with the readable state; what it returns, unless None, goes on in its place."""
    with ExitStack() as watched:
        for stack in host.stacks:
            calls: list[int] = []
            numbers = {id(layer): number for number, layer in enumerate(stack.layers)}

            def entering(module: Any, args: Any, kwargs: Any) -> None:
                pass

            def leaving(
                module: Any, args: Any, output: Any, stack: Any = stack, calls: Any = calls, numbers: Any = numbers
            ) -> Any:
                number = len(calls) % len(stack.layers) if stack.shared else numbers[id(module)]
                calls.append(number)
                rest = output[1:] if stack.spec.returns else None
                other = see(stack, number, output if rest is None else output[0])
                return None if other is None else other if rest is None else (other, *rest)

            watched.enter_context(hooked(stack.layers, entering, leaving))
        yield


def readable(output: Any) -> Tensor:
    """The state (B T D) of what a layer hands on."""
    return output[0] if isinstance(output, tuple) else output


def carried(s: Any) -> tuple[Tensor, ...]:
    """A stream as the tuple of its tensors."""
    return s if isinstance(s, tuple) else (s,)


def like(s: Any, tensors: tuple[Tensor, ...]) -> Any:
    """These tensors in the form of the stream `s`."""
    return tensors if isinstance(s, tuple) else tensors[0]
