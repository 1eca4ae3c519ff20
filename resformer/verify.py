"""Whether a family describes a model: what it computes natively, compared with the identity scheme."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resformer.ends import check_ends, recording
from resformer.host import Host, HostStack
from resformer.layer import given_to
from resformer.probing import difference, hooked, probe
from resformer.swap import host_class


@dataclass(frozen=True)
class LayerCall:
    """What one call of a layer returned."""

    number: int  # of the layer; of a shared one, of the call
    form: str  # "a tensor", "a tuple of 2", or the name of another type
    states: Tensor | None
    rest: tuple[Any, ...]  # what follows the states


@dataclass(frozen=True)
class Run:
    """One probe: what the model gave, and each of its layers; by stack."""

    output: Tensor
    calls: dict[str, list[LayerCall]]
    given: dict[str, set[str]]  # the arguments that were something in any call


@dataclass(frozen=True)
class Native:
    """What a model computes before it is patched."""

    evaluated: Run
    trained: Run | None  # None where it cannot be run in training mode, or gives something else each time


@dataclass
class _Record:
    calls: dict[str, list[LayerCall]] = field(default_factory=dict)
    given: dict[str, set[str]] = field(default_factory=dict)


def run_natively(host: Host) -> Native:
    """Probe a model that is not patched in both modes; a `ValueError` where its layers return what no family can
    describe. Warns of arguments that the family's own probe does not give."""
    with recording(host) as ends:
        evaluated = _run(host)
    for stack in host.stacks:
        _check_form(host, stack, evaluated)
    check_ends(host, ends)
    if host.family.probe is not None:
        _warn_of_untried(host, evaluated)
    try:
        trained = _run(host, training=True)
        repeats = host.family.probe is None or _same(trained.output, probe(host, training=True))
    except Exception:  # of any kind: a model need not train on what it is probed with
        return Native(evaluated, None)
    return Native(evaluated, trained if repeats else None)  # else it draws from elsewhere


def check_identity(host: Host, native: Native, visited: Callable[[], None]) -> None:
    """A `ValueError` if a model that is patched with the identity scheme does not do what it did natively; `visited`
    is called after the pass in evaluation mode."""
    _compare(host, native.evaluated, training=False)
    visited()
    if native.trained is not None:
        _compare(host, native.trained, training=True)


def misfit(host: Host) -> tuple[str, str]:
    """How errors about a family that does not describe a model begin and end."""
    who = f"family {host.family.name!r} does not describe this {type(host.base).__name__}"
    if any(host_class(layer).__module__.startswith("transformers.") for layer in host.layers):
        return who, (
            "Its layers may have changed with the version of transformers; please report it, or register a family "
            "that fits"
        )
    return who, "Compare its sites, `calls` and `norms` with the forward of the layer"


def _compare(host: Host, native: Run, *, training: bool) -> None:
    who, mend = misfit(host)
    try:
        found = _run(host, training=training)
    except Exception as error:
        when = ", in training mode" if training else ""
        when += "".join(_other_lengths(stack, native) for stack in host.stacks)
        raise ValueError(
            f"{who}: called as it says{when}, the sublayers fail ({type(error).__name__}: {error}). {mend}"
        ) from error
    where = ""
    for stack in host.stacks:
        where = where or _first_difference(stack, native, found, who)
    alike = found.output.shape == native.output.shape
    if where or not _same(found.output, native.output):
        size = difference(found.output, native.output) if alike else float("inf")
        how = f"(relative difference {size:.1e}{where})" if alike else where.removeprefix(", ")
        if training:
            raise ValueError(
                f"{who}: in training mode, and there only, with the identity scheme and equal seeds it computes "
                f"something else {how}: a rate of dropout left out of `calls`? {mend}"
            )
        if size < max(1e-5, 4 * torch.finfo(found.output.dtype).eps):
            raise ValueError(
                f"{who}: with the identity scheme it computes something else {how}, equal up to rounding: its sums "
                "are probably taken in another order, such as (x + a) + m of sublayers side by side, which are added "
                "x + (a + m) here; that cannot be described. Patched models have to be equal bit for bit"
            )
        raise ValueError(f"{who}: with the identity scheme it computes something else {how}. {mend}")


def _other_lengths(stack: HostStack, native: Run) -> str:
    first = next(iter(native.calls[stack.spec.name]), None)
    named = len(stack.spec.returns)
    if first is None or len(first.rest) == named:
        return ""
    return f" (with {named} elements after the states in `returns`, where the {stack.spec.name} returns {first.form})"


def _first_difference(stack: HostStack, native: Run, found: Run, who: str) -> str:
    """Where the layers of a stack begin to give other states, as the end of a sentence, or ""; a `ValueError` where
    they give the same states and something else beside them."""
    name = stack.spec.name
    if len(native.calls[name]) != len(found.calls[name]):
        return ""  # told by the number of visits
    for there, here in zip(native.calls[name], found.calls[name], strict=True):
        if not _same(there.states, here.states):
            return f", first in what layer {there.number} of the {name} returns"
        size = max(len(there.rest), len(here.rest))
        expected, got = (rest + (None,) * (size - len(rest)) for rest in (there.rest, here.rest))
        for i, (wanted, value) in enumerate(zip(expected, got, strict=True)):
            if not _same(wanted, value):
                returns = stack.spec.returns
                says = f"is element {returns[i][1]} of what site {returns[i][0]!r} returned" if i < len(returns) else ""
                raise ValueError(
                    f"{who}: element {i + 1} of what layer {there.number} of the {name} returns is "
                    f"{_text(wanted)}, and by `returns` it {says or 'is nothing'}: {_text(value)}"
                )
    return ""


def _check_form(host: Host, stack: HostStack, run: Run) -> None:
    """A `ValueError` for layers that return what `returns` cannot, or does not, describe."""
    who, _ = misfit(host)
    for call in run.calls[stack.spec.name]:
        what = f"{who}: layer {call.number} of the {stack.spec.name} returns {call.form}"
        if call.states is None:
            raise ValueError(
                f"{what}, which a family cannot describe; have the layers return their states, a tensor, or a tuple "
                "that begins with them (`Stack.returns`)"
            )
        if call.form == "a tuple of 1" and not stack.spec.returns:
            raise ValueError(
                f"{what}, its states alone, which a family cannot describe; have the layers return the tensor itself"
            )
        if call.rest and not stack.spec.returns:
            raise ValueError(
                f"{what}, and the family says nothing of what follows the states; name it in `Stack.returns`, for each "
                "element the site whose first call returned it, and as which element: (('attn', 1),)"
            )
        if call.form == "a tensor" and stack.spec.returns:
            raise ValueError(
                f"{what}, its states alone, and `returns` names {stack.spec.returns} after them; leave it out"
            )


def _warn_of_untried(host: Host, run: Run) -> None:
    for stack in host.stacks:
        parts = [part for site in stack.spec.sites for part in site.parts or (site,)]
        named = {name for part in parts for name in part.passes.values()} | {part.when for part in parts if part.when}
        layer = next(layer for layer in stack.layers if stack.fits(layer))
        _, _, defaults = given_to(host_class(layer))
        if not run.calls[stack.spec.name]:
            continue  # told by the number of visits
        if untried := sorted(named - run.given[stack.spec.name] - set(defaults)):
            warnings.warn(
                f"the probe of family {host.family.name!r} gives the layers of the {stack.spec.name} no "
                f"{', '.join(map(repr, untried))}, so what `passes` or `when` say of that is not checked; have the "
                "probe call the model in a way that gives it",
                stacklevel=5,  # who patches
            )


def _run(host: Host, *, training: bool = False) -> Run:
    record = _Record()
    with _recording(host, record):
        output = probe(host, training=training)
    return Run(output, record.calls, record.given)


@contextmanager
def _recording(host: Host, record: _Record) -> Iterator[None]:
    with ExitStack() as watched:
        for stack in host.stacks:
            calls = record.calls.setdefault(stack.spec.name, [])
            given = record.given.setdefault(stack.spec.name, set())
            numbers = {id(layer): number for number, layer in enumerate(stack.layers)}

            def entering(module: Any, args: Any, kwargs: Any, given: set[str] = given) -> None:
                states, named, _ = given_to(host_class(module))
                values = dict(zip((states, *named), args, strict=False)) | kwargs
                given.update(name for name, value in values.items() if value is not None)

            def leaving(
                module: Any, args: Any, output: Any, stack: Any = stack, calls: Any = calls, numbers: Any = numbers
            ) -> None:
                number = len(calls) if stack.shared else numbers[id(module)]
                calls.append(_call(stack, module, number, output))

            watched.enter_context(hooked(filter(stack.fits, stack.layers), entering, leaving))
        yield


def _call(stack: HostStack, layer: nn.Module, number: int, output: Any) -> LayerCall:
    if hasattr(layer, "resformer"):
        states, rest = (output[0], output[1:]) if stack.spec.returns else (output, ())
        states = states[0] if isinstance(states, tuple) else states  # beside the number of the call
        return LayerCall(number, "", states.clone(), tuple(map(_copy, rest)))
    if isinstance(output, Tensor):
        return LayerCall(number, "a tensor", output.clone(), ())
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return LayerCall(number, f"a tuple of {len(output)}", output[0].clone(), tuple(map(_copy, output[1:])))
    return LayerCall(number, f"a {type(output).__name__}", None, ())


def _copy(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_copy, value))
    return value.clone() if isinstance(value, Tensor) else value


def _same(a: Any, b: Any) -> bool:
    """The same bits, in tensors; None where None."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b)
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and torch.equal(a.nan_to_num(), b.nan_to_num())


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
