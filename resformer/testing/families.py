"""What every family has to keep, each point a check with a name: that its spec says what its hosts compute.

A check is a function without arguments that raises an `AssertionError` saying what is wrong, or a `HostCannot` where
there is nothing to check. Families that name a configuration of transformers are checked on tiny random hosts of it;
of others the user says how a host and a batch are made.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto import modeling_auto

from resformer.checkpoint import from_pretrained
from resformer.edits import groups_of
from resformer.errors import unknown
from resformer.host import find_host
from resformer.hosts import Family, families
from resformer.layer import find
from resformer.patching import patch, unpatch
from resformer.plan import choose_layers, make_plan
from resformer.schemes import Scheme, schemes
from resformer.testing.contract import Check
from resformer.testing.hosts import batch, batch_for, checkpoint, example, gradients, randomize, tiny_config, tiny_host
from resformer.testing.mechanics import relative, residuals

# One of each kind: a gate, history, streams, values, inside, a solver over blocks, moved norms.
SAMPLE = ("highway", "denseformer", "hyper_connections", "value_residual", "sub_ln", "ode", "post_ln", "pre_ln")


class HostCannot(Exception):
    """There is nothing to keep: the host does not do this unpatched, or is refused the scheme."""


def check_family(name: str, host: Callable[[], nn.Module] | None = None, batch: Batch | None = None) -> list[str]:
    """Run all checks on a registered family; the first point that fails raises an `AssertionError`.

    Args:
        name: of a family made known by `resformer.register_family`.
        host: makes a model, for a family that names no configuration of transformers. Small, of at least two layers
            in each stack, and with weights by which every sublayer matters.
        batch: makes what that model is called with, by name: texts of different lengths where it knows padding, and
            `output_hidden_states=True` where it knows that. Its first output is what gradients are taken of.

    Returns the points that do not apply, each with why.
    """
    left_out = []
    for check in family_checks(name, host, batch):
        try:
            check()
        except HostCannot as reason:
            left_out.append(f"{check.name}: {reason}")
        except Exception as error:
            raise AssertionError(f"family {name!r} fails {check.name!r}: {error}") from error
    return left_out


def family_checks(name: str, host: Callable[[], nn.Module] | None = None, batch: Batch | None = None) -> list[Check]:
    """The points of the contract of a family, one test each; those that do not apply to it raise `HostCannot`:

    `@pytest.mark.parametrize("check", resformer.testing.family_checks("mine", make_model, make_batch), ids=str)`
    """
    if name not in families():
        raise unknown("family", name, families())
    if not families()[name].config and (host is None or batch is None):
        raise ValueError(
            f"family {name!r} names no `config`, from which a tiny host could be made; give a function that makes "
            "one, and one that makes what it is called with: check_family(name, host, batch)"
        )
    subject = Subject(families()[name], host, batch)
    found = [Check(f"identity-{one}", partial(check_identity, subject, one)) for one in subject.attentions()]
    found += [Check("sites", partial(check_sites, subject)), Check("points", partial(check_points, subject))]
    for scheme in SAMPLE:
        found.append(Check(f"serves-{scheme}", partial(check_serves, subject, scheme)))
        found += [
            Check(f"{title}-{scheme}", partial(check, subject, scheme))
            for title, (check, chosen) in AROUND.items()
            if scheme in chosen
        ]
    return found + [Check(f"head-{head}", partial(check_head, subject, head)) for head in subject.heads()]


# ------------------------------------------------------------------------------------------------ hosts


Batch = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A family, with what makes its hosts and what they are called with."""

    family: Family
    make: Callable[[], nn.Module] | None = None
    given: Batch | None = None

    @cached_property
    def _made(self) -> nn.Module:
        assert self.make is not None
        return self.make()

    def host(self, auto: Any = AutoModel, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
        """A fresh host in evaluation mode, always of the same weights; of a user's own nothing else can be chosen."""
        if self.make is None:
            return tiny_host(self.family.name, auto, dtype=dtype, **changes)
        return copy.deepcopy(self._made).to(dtype).eval()

    def batch(self, model: Any, *, padded: bool = True, **wanted: Any) -> dict[str, Any]:
        """What a host is called with, beside it what of `wanted` it knows."""
        if self.given is not None:
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            given = self.given()
            return {
                name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in given.items()
            }
        known = inspect.signature(model.forward).parameters
        given = {name: x for name, x in batch_for(self.family.name, padded=padded).items() if name in known}
        if "decoder_input_ids" in known:
            given["input_ids"][:, 2] = model.config.eos_token_id  # of which BART's classifier wants equally many
        if getattr(model.config, "use_cache", False):
            wanted = {"use_cache": False} | wanted
        return given | {name: value for name, value in wanted.items() if name in known or "kwargs" in known}

    def attentions(self) -> list[str]:
        """The implementations of attention that run on any machine and that the hosts have."""
        if self.make is not None:
            return ["own"]
        model: Any = AutoModel._model_mapping[type(self.config)]
        return ["eager", "sdpa"] if model._supports_sdpa else ["eager"]

    @property
    def config(self) -> Any:
        return tiny_config(self.family.name)

    def heads(self) -> list[str]:
        """The auto classes of transformers that give a host of this family a head."""
        if self.make is not None:
            return []
        named = {name: getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("AutoModelFor")}
        return [name for name, auto in named.items() if type(self.config) in getattr(auto, "_model_mapping", {})]

    def speaker(self, **changes: Any) -> Any:
        """A host that generates texts."""
        if self.make is None and self.family.stacks[-1].name == "decoder":
            auto = AutoModelForSeq2SeqLM if len(self.family.stacks) > 1 else AutoModelForCausalLM
            # T5 makes its cache for as many layers as the encoder has
            changes |= {name: 2 for name in ("num_decoder_layers", "decoder_layers") if hasattr(self.config, name)}
            if type(self.config) in auto._model_mapping:
                return self.host(auto, **changes)
        raise HostCannot("it is no language model of transformers")

    def patched(self, scheme: str, init: str = "paper", **changes: Any) -> Any:
        """A patched host, the scheme's parameters then moved as if trained."""
        host = self.host(**changes)
        if reason := refusal(host, scheme, init):
            raise HostCannot(reason)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what the paper draws
            patch(host, scheme, init=init)
        randomize(host)
        return host


def refusal(host: nn.Module, scheme: str, init: str) -> str:
    """Why a scheme cannot be planned for a host, or nothing."""
    seen = find_host(host)
    try:
        make_plan(seen, scheme, init, None, choose_layers(seen, None), {})
    except ValueError as error:
        return str(error)
    return ""


def tensors(output: Any) -> dict[str, list[Tensor]]:
    """The tensors of an output, by what it calls them."""
    named = output if isinstance(output, Mapping) else {"output": output}
    return {name: [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for name, value in named.items()}


def first(output: Any) -> Tensor:
    """What a model computes: the first tensor of its output."""
    return next(leaf for leaves in tensors(output).values() for leaf in leaves if leaf.is_floating_point())


def loss_of(model: nn.Module, given: dict[str, Any], seed: int = 0) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return first(model(**given)).square().mean()


def state_of(model: Any) -> dict[str, Any]:
    """All that patching could change."""
    modules = list(model.modules())
    return {
        "the classes of modules": [type(module) for module in modules],
        "the keys of weights": list(model.state_dict()),
        "weights": [value.clone() for value in model.state_dict().values()],
        "what is trained": [p.requires_grad for p in model.parameters()],
        "the mode of modules": [module.training for module in modules],
        "the configuration": [module.config.to_dict() for module in modules if isinstance(module, PreTrainedModel)],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "the eps of norms": [module.eps for module in modules if hasattr(module, "eps")],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    for what, value in before.items():
        if what == "weights":
            same = len(now[what]) == len(value) and all(map(torch.equal, now[what], value))
        else:
            same = now[what] == value
        assert same, f"{what} are not as they were"


@contextmanager
def measured_first() -> Iterator[None]:
    """Around what the unpatched host is asked to do: an error is its own."""
    try:
        yield
    except Exception as error:
        raise HostCannot(f"nor does the host: {type(error).__name__} {str(error).strip().splitlines()[:1]}") from error


# ------------------------------------------------------------------------------------------------ the spec


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
        scheme.step = partial(_visit, visits, where, scheme.step)
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


def _visit(visits: Counter[str], where: str, step: Any, *given: Any) -> Any:
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


# ------------------------------------------------------------------------------------------------ one scheme


def check_serves(subject: Subject, name: str) -> None:
    """The scheme keeps the host's function, or says why not; taken off, it leaves the host as it was, bit for bit."""
    host = subject.host()
    given = subject.batch(host)
    before, expected = state_of(host), first(host(**given)).detach()
    refused = {init: refusal(host, name, init) for init in ("preserve", "paper")}
    for init, reason in refused.items():
        if reason:
            check_refused(host, name, init, leads_on=init == "preserve" and not refused["paper"])
            assert_untouched(host, before)
            continue
        patch(host, name, init=init)
        if init == "preserve":
            error = relative(first(host(**given)), expected)
            assert error <= 1e-10, f"relative error {error:.1e} in float64"
        loss_of(host.train(), given).backward()
        unpatch(host).eval()
        assert_untouched(host, before)
        assert torch.equal(first(host(**given)), expected), f"unpatched from init={init!r}, it computes something else"
    if all(refused.values()):
        raise HostCannot(refused["paper"])


def check_refused(host: nn.Module, name: str, init: str, leads_on: bool) -> None:
    """The error says which scheme it is about, and where the other init is served it says so."""
    try:
        patch(host, name, init=init)
        said = ""
    except ValueError as error:
        said = str(error)
    assert said, f"init={init!r} is refused when planned and not when patched"
    assert repr(name) in said, f"the error does not name the scheme: {said}"
    assert not leads_on or "init='paper'" in said, f"the error names no way out: {said}"


def check_hidden_states(subject: Subject, name: str) -> None:
    """As many hidden states and attentions as the host shows, each of the same shape."""
    wanted = {"output_hidden_states": True, "output_attentions": not example(name, {}).repeats}
    host, model = subject.host(), subject.patched(name)
    given = subject.batch(host, **wanted)
    if not any("hidden_states" in output for output in tensors(host(**given))):
        raise HostCannot("it shows no hidden states")
    found, expected = tensors(model(**given)), tensors(host(**given))
    assert list(found) == list(expected), f"the outputs are {list(found)}, the host's are {list(expected)}"
    for output in expected:
        shapes, those = ([tuple(x.shape) for x in outputs[output]] for outputs in (found, expected))
        assert shapes == those, f"{output} has shapes {shapes}, the host's are {those}"
    for output, states in expected.items():
        if "hidden_states" in output and torch.equal(states[-1], first(expected)):
            assert torch.equal(found[output][-1], first(found)), f"the last of {output} is not what comes out"


def check_checkpointing(subject: Subject, name: str) -> None:
    """Both modes of gradient checkpointing give the gradients of none, and compute each layer exactly twice."""
    plain: dict[str, Tensor | None] = {}
    for reentrant in (None, False, True):
        model = subject.patched(name)
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise HostCannot("it has no gradient checkpointing")
        if reentrant is not None:
            checkpoint(model, {"use_reentrant": reentrant})
        visits: Counter[str] = Counter()
        for number, own in enumerate(residuals(model)):
            last: Any = own.schemes[-1]
            last.step = partial(_visit, visits, str(number), last.step)
        # Longformer's gradients of padding are not numbers
        loss_of(model.train(), subject.batch(model, padded=False)).backward()
        times = 1 if reentrant is None else 2
        found_times = [visits[str(number)] for number in range(len(residuals(model)))]
        assert set(found_times) == {times}, f"use_reentrant={reentrant}: layers are computed {found_times} times each"
        found = gradients(model)
        plain = plain or found
        for path, gradient in plain.items():
            other, where = found[path], f"use_reentrant={reentrant}, {path}"
            assert (gradient is None) == (other is None), f"{where}: a gradient in one of the two"
            if gradient is not None and other is not None:  # sums may be taken in another order
                assert torch.allclose(other, gradient, rtol=1e-10, atol=1e-12), f"{where}: another gradient"


def check_copies(subject: Subject, name: str) -> None:
    """`deepcopy` and `pickle` give models of their own, that compute the same and can be unpatched."""
    with measured_first():
        pickle.dumps(subject.host())
    model = subject.patched(name)
    given = subject.batch(model)
    expected = first(model(**given))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(first(other(**given)), expected), "a copy computes something else"
        unpatch(other)
    assert torch.equal(first(model(**given)), expected), "unpatching a copy changed the model"


def check_half_precision(subject: Subject, name: str) -> None:
    """bfloat16 and float16 weights, and float32 weights under autocast."""
    for dtype in (torch.bfloat16, torch.float16):
        host = subject.host(dtype=dtype)
        with measured_first():
            expected = first(host(**subject.batch(host)))
        model = subject.patched(name, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {p.dtype for p in host.parameters()}
        found = first(model(**subject.batch(model)))
        assert found.dtype == expected.dtype, f"of {dtype} it makes {found.dtype}, and the host {expected.dtype}"
        assert found.isfinite().all() or not expected.isfinite().all(), f"not finite in {dtype}"
    host = subject.host(dtype=torch.float32)
    model = subject.patched(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with measured_first():
            loss_of(host, subject.batch(host))
        loss = loss_of(model, subject.batch(model))
    loss.backward()
    assert loss.isfinite(), "not finite under autocast"


def check_round_trip(subject: Subject, name: str) -> None:
    """Saved and loaded: the same weights, flags and outputs, to the bit."""
    model = subject.patched(name)
    given = subject.batch(model)
    loaded: Any
    if isinstance(model, PreTrainedModel):
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            loaded = from_pretrained(directory, type(model), attn_implementation=model.config._attn_implementation)
    else:
        loaded = patch(subject.host(), name, init="paper")
        loaded.load_state_dict(model.state_dict())
    assert_loaded(loaded, model, subject.host(), given)


def assert_loaded(loaded: Any, model: Any, host: Any, given: dict[str, Any]) -> None:
    found, expected = loaded.state_dict(), model.state_dict()
    assert found.keys() == expected.keys(), f"other weights: {sorted(found.keys() ^ expected.keys())[:4]}"
    wrong = [key for key, value in found.items() if not torch.equal(value, expected[key])]
    assert not wrong, f"these weights are not those that were saved: {wrong[:4]}"
    fixed = {path for path, p in host.named_parameters() if not p.requires_grad}  # which loading forgets of the host
    flags = [{path for path, p in one.named_parameters() if p.requires_grad} - fixed for one in (loaded, model)]
    assert flags[0] == flags[1], f"trained in only one of the two: {sorted(flags[0] ^ flags[1])[:4]}"
    assert tied(loaded) == tied(model), "weights that were one are no longer, or the reverse"
    # copies: sums of products may round otherwise where weights lie in memory as a file had them
    outputs = [first(copy.deepcopy(one).eval()(**given)) for one in (loaded, model)]
    assert torch.equal(*outputs), f"it computes something else, {relative(*outputs):.1e} relative"


def tied(model: nn.Module) -> list[list[str]]:
    """The names of weights that are one."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p.data_ptr(), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


def check_head(subject: Subject, head: str) -> None:
    """With a head: the identity is the host, what is tied stays so, and a patched model is loaded as it was saved."""
    auto = getattr(modeling_auto, head)
    with measured_first():
        host = subject.host(auto)
        given = subject.batch(host)
        if head == "AutoModelForSequenceClassification":  # reads the end of the text that it is given as target
            given = {name: x for name, x in given.items() if not name.startswith("decoder_")}
        if head == "AutoModelForMultipleChoice":
            given |= {name: x[:, None].repeat(1, 2, 1) for name, x in given.items() if isinstance(x, Tensor)}
        expected = host(**given)
    before = state_of(host)
    del before["the configuration"]  # saving writes the name of the class into it
    model = subject.host(auto)
    assert_equal(patch(model, "identity")(**given), expected)
    unpatch(model)
    for name in ("sub_ln", "highway"):
        if not refusal(model, name, "paper"):
            patch(model, name, init="paper")
            break
    randomize(model)
    assert tied(model) == tied(host), "patching ties weights, or parts them"
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        assert_loaded(from_pretrained(directory, auto, attn_implementation="eager"), model, host, given)
    unpatch(model)
    assert_untouched(model, before)
    assert_equal(model(**given), expected)


def check_lora(subject: Subject, name: str) -> None:
    """Adapters on the family's own projections: trained, saved and loaded with the scheme, and merged."""
    try:
        import peft
    except ImportError:
        raise HostCannot("peft is not installed") from None
    family = subject.family
    points = [point for stack in family.stacks for site in stack.sites for point in site.points.items()]
    hooked = schemes()[name].points
    taken = {at.path for point, at in points if point in hooked}
    paths = sorted({at.path for point, at in points if point in ("q", "v", "up")} - taken)
    if not paths:
        raise HostCannot("the family names no projections that an adapter could be put on")

    def adapted(model: Any, **changes: Any) -> Any:
        ends = "|".join(path.replace(".", r"\.") for path in paths)
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=rf".*\.({ends})", **changes)).eval()

    with measured_first():
        adapted(subject.host())
    bare = subject.patched(name)
    given = subject.batch(bare)
    before = first(bare(**given)).detach()
    model = adapted(copy.deepcopy(bare), modules_to_save=["resformer"])
    assert relative(first(model(**given)), before) < 1e-12, "an adapter that is new changes the model"
    loss_of(model.train(), given).backward()
    unused = [path for path, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, f"no gradient reaches {unused[:4]}"
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    after = first(model.eval()(**given)).detach()
    assert relative(after, before) > 1e-6, "a trained adapter changes nothing"
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(bare), directory).eval()
    assert relative(first(again(**given)), after) < 1e-12, "a loaded adapter computes something else"
    merged = again.merge_and_unload()
    assert relative(first(merged(**given)), after) < 1e-9, "merged, it computes something else"
    keys = unpatch(merged).state_dict().keys()
    assert keys == subject.host().state_dict().keys(), "merged and unpatched, it has other keys than the host"


# ------------------------------------------------------------------------------------------------ caches and graphs


def check_cache(subject: Subject, name: str) -> None:
    """Token by token with a KV cache a decoder gives the scores of the whole text, and generates the same text."""
    host = subject.speaker()
    with measured_first():
        _check_cache(host)
    if reason := refusal(host, name, "paper"):
        raise HostCannot(reason)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        randomize(patch(host, name, init="paper"))
    try:
        _check_cache(host)
    except ValueError as error:
        if repr(name) in str(error) and "use_cache=False" in str(error):  # it cannot have one here, and says so
            raise HostCannot(str(error)) from error
        raise


def _check_cache(model: Any) -> None:
    ids = batch()["input_ids"]
    fixed = {"input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    key = "decoder_input_ids" if fixed else "input_ids"
    whole = model(**fixed, **{key: ids}, use_cache=False).logits
    past, steps = None, []
    for part in (ids[:, :3], *ids[:, 3:].split(1, dim=1)):
        output = model(**fixed, **{key: part}, past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    error = relative(torch.cat(steps, dim=1), whole)
    assert error < 1e-6, f"with a cache the scores differ, {error:.1e} relative"
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    if fixed:
        settings["decoder_start_token_id"] = 1  # not that of padding, which M2M-100 does not count
    texts = [model.generate(input_ids=ids, **settings, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts), "with a cache it generates another text"


def check_compile(subject: Subject, name: str) -> None:
    """One graph, forward and backward, with the outputs and gradients of the model itself."""
    with measured_first():
        _check_compile(subject.host(dtype=torch.float32), subject)
    _check_compile(subject.patched(name, dtype=torch.float32), subject)


def _check_compile(model: Any, subject: Subject) -> None:
    torch._dynamo.reset()
    other, given = copy.deepcopy(model), subject.batch(model)
    run = torch.compile(lambda **kwargs: first(other(**kwargs)), fullgraph=True, backend="aot_eager")
    expected, found = first(model(**given)), run(**given)
    assert relative(found, expected) < 1e-4, "compiled, it computes something else"
    expected.square().mean().backward()
    found.square().mean().backward()
    for (path, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), f"compiled, a gradient reaches {path} in one of the two"
        if p.grad is not None and q.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4), f"compiled, another gradient reaches {path}"


def check_export(subject: Subject, name: str) -> None:
    """`torch.export` gives a program with the model's output."""
    with measured_first():
        _check_export(subject.host(dtype=torch.float32), subject)
    _check_export(subject.patched(name, dtype=torch.float32), subject)


def _check_export(model: Any, subject: Subject) -> None:
    given = subject.batch(model)
    fed = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in given.items() if name not in fed}

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **kwargs: Any) -> Tensor:
            return first(self.model(**kwargs, **fixed))

    with torch.no_grad():
        program = torch.export.export(First(), (), fed)
        error = relative(program.module()(**fed), first(model(**given)))
    assert error < 1e-4, f"exported, it computes something else, {error:.1e} relative"


AROUND: dict[str, tuple[Callable[[Subject, str], None], tuple[str, ...]]] = {
    "hidden_states": (check_hidden_states, ("denseformer", "hyper_connections", "ode")),
    "checkpointing": (check_checkpointing, ("highway", "denseformer", "hyper_connections", "ode")),
    "copies": (check_copies, ("hyper_connections", "sub_ln", "post_ln")),
    "half_precision": (check_half_precision, ("highway", "hyper_connections")),
    "round_trip": (check_round_trip, SAMPLE),
    "lora": (check_lora, ("highway", "hyper_connections", "sub_ln")),
    "cache": (check_cache, tuple(name for name in SAMPLE if not schemes()[name].repeats)),
    "compile": (check_compile, ("hyper_connections",)),
    "export": (check_export, ("hyper_connections",)),
}
