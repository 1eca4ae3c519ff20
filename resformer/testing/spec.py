"""What the spec of a family has to keep: that it says what its hosts compute, where, and through which projections."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resformer.edits import groups_of
from resformer.host import find_host
from resformer.layer import find
from resformer.patching import patch
from resformer.schemes import Scheme
from resformer.testing.hosts import gradients
from resformer.testing.mechanics import relative
from resformer.testing.subject import (
    HostCannot,
    Subject,
    first,
    loss_of,
    tensors,
)


def check_identity(subject: Subject, attention: str) -> None:
    """Outputs, hidden states, attentions; and with dropout at equal seeds every gradient: the host's, bit for bit."""
    make: dict[str, Any] = {"attention": attention, "dropout": 0.2, "dtype": torch.float32}
    host, patched = subject.host(**make), patch(subject.host(**make), "identity")
    assert patched.state_dict().keys() == host.state_dict().keys(), "the identity has parameters"
    given = subject.batch(host, output_hidden_states=True, output_attentions=attention == "eager")
    assert_equal(patched(**given), host(**given))
    given = subject.batch(host)
    losses = [loss_of(model.train(), given) for model in (host, patched)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses), "in training, with equal seeds, it computes something else"
    expected = gradients(host)
    for path, found in gradients(patched).items():
        wanted = expected[path]
        assert (found is None) == (wanted is None), f"a gradient reaches {path} in only one of the two"
        assert found is None or wanted is None or torch.equal(found, wanted), f"another gradient reaches {path}"


def assert_equal(found: Any, expected: Any) -> None:
    here, there = tensors(found), tensors(expected)
    assert list(here) == list(there), f"the outputs are {list(here)}, the host's are {list(there)}"
    for name, wanted in there.items():
        assert [x.shape for x in here[name]] == [x.shape for x in wanted], f"{name} has other shapes than the host's"
        for n, (x, y) in enumerate(zip(here[name], wanted, strict=True)):
            assert torch.equal(x, y), f"{name}[{n}] differs from the host's, {relative(x, y):.1e} relative"


def check_sites(subject: Subject) -> None:
    """A forward pass comes once by each site that the spec names, and what each adds reaches the output."""
    model = patch(subject.host(), "identity")
    given, stacks = subject.batch(model), find_host(model).stacks
    sites = {
        f"{stack.spec.name} layer {number}, {site.name}": getattr(own, site.name)
        for stack in stacks
        for number, own in stack.residuals().items()
        for site in stack.sites(stack.layers[number])
    }
    assert len(sites) == sum(len(stack.sites(layer)) for stack in stacks for layer in stack.layers)
    visits: Counter[str] = Counter()
    for where, scheme in sites.items():
        scheme.step = partial(visit, visits, where, scheme.step)
    expected = first(model(**given))
    for where, scheme in sites.items():
        assert visits[where] == 1, f"{visits[where]} visits of {where}; an argument may be missing in the batch"
        del scheme.step
    for where, scheme in sites.items():
        scheme.write = partial(_write_twice, scheme)
        assert not torch.equal(first(model(**given)), expected), (
            f"what {where} adds never reaches the output; name what does, or make a host with other weights"
        )
        del scheme.write


def visit(visits: Counter[str], where: str, step: Any, *given: Any) -> Any:
    visits[where] += 1
    return step(*given)


def _write_twice(scheme: Scheme, s: Any, y: Tensor, norm: Any) -> Any:
    return type(scheme).write(scheme, s, 2 * y, norm)


def check_points(subject: Subject) -> None:
    """Every projection is what the spec calls it: each site's branch is linear in the outputs of "o" and "down", what
    goes into "o" is so in "v" and curved in "q" and "k", and what "down" is given is so in "up" beside a "gate"."""
    model = patch(subject.host(), "identity")
    given = subject.batch(model)
    if not any(site.points for stack in subject.family.stacks for site in stack.sites):
        raise HostCannot("the family names no projections")
    for stack in find_host(model).stacks:
        for number, own in stack.residuals().items():
            layer = stack.layers[number]
            for site in stack.sites(layer):
                where = f"{stack.spec.name} layer {number}, {site.name}"
                look = partial(_look, model, given, stack, layer, site, getattr(own, site.name))
                plain, ends = look({}), {"o", "down"} & set(site.points)
                assert plain.keys() == ends | {"branch"}, f"{where}: what is called {sorted(ends)} does not run there"
                every = {"o", "down"} <= ends or site.name != "both"
                if ends and every and "out" not in site.norms:
                    found = look(dict.fromkeys(ends, 2.0))["branch"]
                    assert relative(found, 2 * plain["branch"]) < 1e-6, f"{where}: {sorted(ends)} do not end the branch"
                if {"v", "o"} <= set(site.points):  # it may have a bias of its own
                    steps = [look({"v": gain})["o"] for gain in (2.0, 3.0)]
                    straight = relative(steps[1] - steps[0], steps[0] - plain["o"]) < 1e-4
                    assert straight, f"{where}: 'v' is not what attention mixes for 'o'"
                for point in sorted({"q", "k"} & set(site.points)) if "o" in ends else ():
                    none, minus = (look({point: gain})["o"] for gain in (0.0, -1.0))
                    curved = not torch.equal(plain["o"], none) and relative(none - minus, plain["o"] - none) > 1e-4
                    assert curved, f"{where}: {point!r} is not what attention compares"
                if {"gate", "up", "down"} <= set(site.points):
                    found = look({"up": 2.0})["down"]
                    assert relative(found, 2 * plain["down"]) < 1e-6, f"{where}: 'up' is not what the gate multiplies"


def _look(
    model: Any, given: dict[str, Any], stack: Any, layer: Any, site: Any, scheme: Any, gains: dict[str, float]
) -> dict[str, Tensor]:
    """What goes into "o" and "down" of a site, and what its branch gives, with other outputs of its projections."""
    seen: dict[str, Tensor] = {}
    inside = [False]

    def note(point: str, module: nn.Module, args: Any) -> None:
        if inside[0]:
            seen[point] = args[0].detach()

    def multiply(projection: Any, gain: float, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        if not inside[0]:
            return y
        slices = list(y.unflatten(-1, (groups_of(stack, layer, projection), projection.parts, -1)).unbind(-2))
        slices[projection.part] = gain * slices[projection.part]
        return torch.stack(slices, dim=-2).flatten(-3)

    def step(s: Any, branch: Any, norm: Any) -> Any:
        inside[0] = True
        y = branch(s)
        inside[0] = False
        seen["branch"] = y.detach()
        return norm(s + y)

    hooks: list[Any] = []
    for point, projection in site.points.items():
        module = find(layer, projection.path)
        if point in gains:
            hooks.append(module.register_forward_hook(partial(multiply, projection, gains[point])))
        if point in ("o", "down"):
            hooks.append(module.register_forward_pre_hook(partial(note, point)))
    scheme.step = step
    try:
        with torch.no_grad():
            model(**given)
    finally:
        del scheme.step
        for hook in hooks:
            hook.remove()
    return seen
