"""What every family has to keep, each point a check with a name: that its spec says what its hosts compute.

A check is a function without arguments that raises an `AssertionError` saying what is wrong, or a `HostCannot` where
there is nothing to check. Families that name a configuration of transformers are checked on tiny random hosts of it;
of others the user says how a host and a batch are made.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from resformer.checkpoint import from_pretrained
from resformer.errors import unknown
from resformer.hosts import families
from resformer.patching import patch, unpatch
from resformer.schemes import schemes
from resformer.testing.contract import Check
from resformer.testing.graphs import check_cache, check_compile, check_export
from resformer.testing.hosts import checkpoint, example, gradients, randomize
from resformer.testing.mechanics import relative, residuals
from resformer.testing.spec import assert_equal, check_identity, check_points, check_sites, visit
from resformer.testing.subject import (
    Batch,
    HostCannot,
    Subject,
    assert_untouched,
    first,
    loss_of,
    measured_first,
    refusal,
    state_of,
    tensors,
)

# One of each kind: a gate, history, streams, values, inside, a solver over blocks, moved norms.
SAMPLE = ("highway", "denseformer", "hyper_connections", "value_residual", "sub_ln", "ode", "post_ln", "pre_ln")


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
        raise unknown("family", name, families(), listed="resformer hosts")
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
        patch(host, name, init=init, verify=init == "preserve")
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
            last.step = partial(visit, visits, str(number), last.step)
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
        loaded = patch(subject.host(), name, init="paper", verify=False)
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
    assert_equal(patch(model, "identity", verify=False)(**given), expected)
    unpatch(model)
    if (labels := _labels(head, given)) is not None:
        losses = [
            loss_in_training(subject.host(auto, dropout=0.1), scheme, given | labels) for scheme in ("", "identity")
        ]
        assert torch.equal(*losses), f"the training loss is {losses[1]:.17g}, the host's {losses[0]:.17g}"
    for name in ("sub_ln", "highway"):
        if not refusal(model, name, "paper"):
            patch(model, name, init="paper", verify=False)
            break
    randomize(model)
    assert tied(model) == tied(host), "patching ties weights, or parts them"
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        assert_loaded(from_pretrained(directory, auto, attn_implementation="eager"), model, host, given)
    unpatch(model)
    assert_untouched(model, before)
    assert_equal(model(**given), expected)


def _labels(head: str, given: dict[str, Any]) -> dict[str, Tensor] | None:
    """What a head is trained on, for those that are trained in the common ways."""
    ids = given["input_ids"]
    if head == "AutoModelForSequenceClassification":
        return {"labels": torch.arange(len(ids)) % 2}
    if head == "AutoModelForTokenClassification":
        return {"labels": ids % 2}
    speaks = head in ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    return {"labels": given.get("decoder_input_ids", ids)} if speaks else None


def loss_in_training(model: Any, scheme: str, given: dict[str, Any]) -> Tensor:
    """With dropout, at a seed."""
    if scheme:
        patch(model, scheme, verify=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model.train()(**given).loss.detach()


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
