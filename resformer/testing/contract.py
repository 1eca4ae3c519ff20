"""What every scheme has to keep, each point a check with a name.

A check is a function without arguments that raises an `AssertionError` saying what is wrong. The hosts are three tiny
random models: BERT (post-LN), GPT-2 (pre-LN, causal, fused and transposed projections) and ModernBERT (pre-LN, no
norm before the first attention), with weights and biases that make every branch matter.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from resformer.hosts import families
from resformer.patching import patch, unpatch
from resformer.schemes import Scheme, find_scheme, schemes
from resformer.stack import ResidualStack
from resformer.testing.hosts import batch, batch_for, can_preserve, exact, example, randomize, stands, tiny_host
from resformer.testing.mechanics import (
    CLASSIFY,
    MECHANICS,
    check_compile,
    check_export,
    check_generate,
    check_padding,
    check_round_trip,
    relative,
    residuals,
)
from resformer.testing.nets import Loop, Reference, net_of_host, net_of_stack

HOSTS = ("bert", "gpt2", "modernbert")


@dataclass(frozen=True)
class Check:
    """One point of the contract for one scheme; call it to run it."""

    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        said = logging.get_verbosity()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="scheme .* also scales")
            logging.set_verbosity_error()
            try:
                self.run()
            finally:
                logging.set_verbosity(said)

    def __str__(self) -> str:
        return self.name


def check_scheme(name: str, reference: Loop | Reference | None = None, **options: Any) -> None:
    """Run the whole contract on a registered scheme; the first point that fails raises an `AssertionError`.

    Args:
        name: of a scheme made known by `resformer.schemes.register`.
        reference: the scheme's update as a slow loop, (net, x) -> output, see `resformer.testing.Net` and
            `resformer.testing.Reference`; without one the equation itself is not tested.
        options: those of the scheme, beside which its defaults should be checked as well.
    """
    for check in checks(name, reference, **options):
        try:
            check()
        except Exception as error:
            raise AssertionError(f"scheme {name!r} fails {check.name!r}: {error}") from error


def checks(name: str, reference: Loop | Reference | None = None, **options: Any) -> list[Check]:
    """The points of the contract that apply to a scheme, one test each:

    `@pytest.mark.parametrize("check", resformer.testing.checks("mine"), ids=str)`
    """
    cls = find_scheme(name, options)
    if callable(reference):
        reference = Reference(reference)
    given, declared = (name, options), example(name, options)
    found = [
        Check("card", partial(check_card, cls)),
        Check("interface", partial(check_interface, cls)),
        Check("options", partial(check_options, name)),
    ]
    for family in HOSTS:
        if not stands(name, family):
            found.append(Check(f"refuses-{family}", partial(check_refuses, family, *given, "paper")))
            continue
        kind = families()[family].kind
        preserves = can_preserve(name, options, kind)
        for init in ("paper", "preserve") if preserves else ("paper",):
            if reference:
                found.append(Check(f"update-{family}-{init}", partial(check_update, family, *given, init, reference)))
            found.append(Check(f"unpatch-{family}-{init}", partial(check_unpatch, family, *given, init)))
        if preserves:
            found.append(Check(f"preserves-{family}", partial(check_preserves, family, *given)))
            found.append(Check(f"round_trip_preserve-{family}", partial(check_round_trip, family, *given, "preserve")))
        else:
            found.append(Check(f"refuses-{family}", partial(check_refuses, family, *given)))
        init = "preserve" if preserves else "paper"
        found.append(Check(f"learns-{family}-{init}", partial(check_learns, family, *given, init)))
        for title, check in MECHANICS.items():
            found.append(Check(f"{title}-{family}", partial(check, family, *given)))
        if declared.compiles:
            found.append(Check(f"compile-{family}", partial(check_compile, family, *given)))
            found.append(Check(f"export-{family}", partial(check_export, family, *given)))
    found.append(Check("parameters", partial(check_parameters, *given)))
    found.append(Check("padding", partial(check_padding, *given)))
    if not declared.repeats and "decoder" in cls.stacks:
        found.append(Check("generate", partial(check_generate, *given)))
    if set(cls.points) <= {"in"}:
        if reference:
            found.append(Check("update-stack", partial(check_update_in_stack, *given, reference)))
        found.append(Check("gradients-stack", partial(check_gradients_in_stack, *given)))
    return found


# ------------------------------------------------------------------------------------------------ the class


def check_card(cls: type[Scheme]) -> None:
    """The docstring has the parts that `resformer schemes` shows."""
    card = cls.card()
    missing = {"summary", "equation", "parameters", "init", "options", "reference"} - set(card)
    assert not missing, f"the docstring of {cls.__name__} lacks {sorted(missing)}"
    assert "←" in card["equation"], "the second block of the docstring is the update, x ← ..."


def check_interface(cls: type[Scheme]) -> None:
    """The verbs have the signature of `Scheme`'s."""
    for verb in ("start", "read", "write", "finish", "step", "inside"):
        here, there = (list(inspect.signature(getattr(owner, verb)).parameters) for owner in (cls, Scheme))
        assert here == there, f"{verb} takes {here}, {there} is what it is called with"


def check_options(name: str) -> None:
    """What is no value for an option is refused by name, and with what would be one."""
    for option in schemes()[name].options():
        for wrong in (math.nan, [], {"a": 1}, object()):
            try:
                example(name, {option: wrong})
                said = ""
            except ValueError as error:
                said = str(error)
            assert option in said, f"{option}={wrong!r} gives {said!r}, and no ValueError that names the option"


def check_parameters(name: str, options: dict[str, Any]) -> None:
    """As many parameters as `extra_parameters` says, none of them a parameter twice; options shown and stored."""
    model = patch(tiny_host("bert", layers=4), name, init="paper", verify=False, **options)
    own = [scheme for residual in residuals(model) for scheme in residual.schemes if scheme.name == name]
    found = sum(p.numel() for scheme in own for p in scheme.parameters())
    said = schemes()[name].extra_parameters([scheme.place for scheme in own], **options)
    assert found == said, f"{found} parameters, extra_parameters says {said}"
    for scheme in own:
        for path, p in scheme.named_parameters():
            assert p.ndim, f"{path} is a scalar, which FSDP2 cannot shard; make it with resformer.schemes.base.scalar"
        unsaved = {path for path, _ in scheme.named_buffers()} - scheme.state_dict().keys()
        assert not unsaved, f"{sorted(unsaved)} is not saved: loading, which starts empty, would leave it so"
    names = [path for path, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(model.parameters())), "a parameter is registered twice"
    for scheme in own:
        for option, value in (schemes()[name].options() | options).items():
            assert getattr(scheme, option) == value, f"option {option!r} is not stored under its name"
            assert f"{option}=" in scheme.extra_repr()


# ------------------------------------------------------------------------------------------------ the update


def check_update(
    family: str,
    name: str,
    options: dict[str, Any],
    init: str,
    reference: Reference,
) -> None:
    """On a host, with trained-like parameters, the reference to 1e-10 in float64."""
    given = batch(padded=True)
    model = patch(tiny_host(family, layers=5), name, init=init, verify=False, **options)
    randomize(model)
    slots = reference.slots(init, families()[family].kind) if reference.slots else None
    net, x = net_of_host(family, tiny_host(family, layers=5), model, given, slots, reference.inside)
    net.options, net.init = options, init
    with torch.no_grad():
        found, expected = model(**given).last_hidden_state, reference.loop(net, x)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)


def stack_of(name: str, options: dict[str, Any], init: str = "paper") -> ResidualStack:
    """Five layers of two sublayers, width 8, with trained-like parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sublayers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(10)]
        stack = ResidualStack(sublayers, 8, name, layer_size=2, init=init, **options).double()
        with torch.no_grad():
            for path, parameter in stack.named_parameters():
                if not path.startswith("sublayers"):
                    parameter.add_(0.5 * torch.randn_like(parameter))
            for buffer in stack.schemes.buffers():  # schedules on their way
                buffer.copy_(torch.rand_like(buffer))
    return stack


def check_update_in_stack(name: str, options: dict[str, Any], reference: Reference) -> None:
    """Around plain sublayers, in evaluation and in training with equal seeds, the reference to 1e-10."""
    for init in ("paper", "preserve"):
        try:
            stack = stack_of(name, options, init)
        except ValueError:
            if init == "paper":
                raise
            continue  # cannot start as the plain residual
        x = torch.randn(3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for training in (False, True):
            outputs = []
            stack.train(training)
            for compute in (stack, partial(reference.loop, net_of_stack(stack, init, options))):
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    torch.manual_seed(1)
                    outputs.append(compute(x))
            error = relative(*outputs)
            assert error <= 1e-10, f"init={init!r}, {'training' if training else 'evaluation'}: off by {error:.1e}"


def check_gradients_in_stack(name: str, options: dict[str, Any]) -> None:
    """A finite gradient reaches every parameter; where they are few, it is the one of finite differences."""
    stack = stack_of(name, options).eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stack(x).square().sum().backward()
    for path, parameter in stack.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {path}"
        assert parameter.grad.isfinite().all(), f"the gradient of {path} is not finite"
        assert parameter.grad.any(), f"the gradient of {path} is zero"
    if not schemes()[name].exact_gradient:
        return
    names = [path for path, _ in stack.named_parameters() if path.startswith("schemes")]
    values = [p.detach().clone().requires_grad_() for p in stack.schemes.parameters()]
    if values and sum(p.numel() for p in values) < 200:

        def output(*values: Tensor) -> Tensor:
            return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (x[:1, :1],))

        assert torch.autograd.gradcheck(output, values)


# ------------------------------------------------------------------------------------------------ what is kept


def check_preserves(family: str, name: str, options: dict[str, Any]) -> None:
    """The host's function at two scales of its embeddings: 1e-10 in float64, ten times its own rounding in float32."""
    given = batch_for(family, padded=True)
    for std in (0.02, 0.2):
        with exact():
            expected = tiny_host(family, std=std)(**given).last_hidden_state
            found = patch(tiny_host(family, std=std), name, verify=std == 0.2, **options)(**given).last_hidden_state
        error = relative(found, expected)
        assert error <= 1e-10, f"embeddings of std {std}: relative error {error:.1e} in float64"
        host = tiny_host(family, std=std, dtype=torch.float32)(**given).last_hidden_state
        single = patch(tiny_host(family, std=std, dtype=torch.float32), name, verify=False, **options)
        error, rounding = relative(single(**given).last_hidden_state, host), relative(host, expected)
        assert error <= 10 * rounding, f"embeddings of std {std}: {error / rounding:.1f} times the host's own rounding"


def check_refuses(family: str, name: str, options: dict[str, Any], init: str = "preserve") -> None:
    """What is not declared for a host is refused, and the model left as it was."""
    host = tiny_host(family)
    before = copy.deepcopy(host.state_dict())
    try:
        patch(host, name, init=init, **options)
        said = ""
    except ValueError as error:
        said = str(error)
    assert said, f"init={init!r} is not declared for {family}, and was not refused"
    assert init == "paper" or "init='paper'" in said, f"the error names no way out: {said}"
    assert host.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())
    assert not residuals(host)


def check_unpatch(family: str, name: str, options: dict[str, Any], init: str) -> None:
    """The host comes back bit for bit, keys and flags included, after a forward and a backward pass."""
    host = tiny_host(family)
    keys, trained = list(host.state_dict()), [p.requires_grad for p in host.parameters()]
    expected = host(**batch()).last_hidden_state
    patch(host, name, init=init, **options)
    host.train()(**batch(), use_cache=False).last_hidden_state.sum().backward()
    unpatch(host).eval()
    assert list(host.state_dict()) == keys
    assert [p.requires_grad for p in host.parameters()] == trained
    assert torch.equal(host(**batch()).last_hidden_state, expected)


def check_learns(family: str, name: str, options: dict[str, Any], init: str) -> None:
    """Every parameter of the scheme has a gradient other than zero within three steps from its start, without decay."""
    model = patch(tiny_host(family, CLASSIFY), name, init=init, verify=False, **options).train()
    ours = {path for path, p in model.named_parameters() if ".resformer." in path}
    seen = set()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(3):
            model(**batch(labels=True, seed=step), use_cache=False).loss.backward()
            for path, p in model.named_parameters():
                if p.requires_grad and "pooler" not in path and "embed" not in path:
                    assert p.grad is not None, f"{path} is unused"
            seen |= {path for path, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    unmoved = ours - seen - {path for path in ours if not model.get_parameter(path).requires_grad}
    assert not unmoved, f"no gradient in three steps: {sorted(unmoved)[:3]}"
