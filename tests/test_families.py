"""Every registered family keeps its contract; the contract finds what is wrong; a host that changed is told apart."""

import functools
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel

import resformer
from resformer import families, schemes, swap
from resformer.host import find_host
from resformer.hosts import Family, Projection, Site, Stack
from resformer.hosts import family as registry
from resformer.layer import find
from resformer.patching import is_patched
from resformer.schemes import Scheme
from resformer.swap import host_class
from resformer.testing import HostCannot, check_family, family_checks
from resformer.testing.__main__ import main
from resformer.testing.families import AROUND, SAMPLE
from resformer.testing.hosts import batch_for, perturb, tiny_config, tiny_host
from resformer.testing.subject import Subject, assert_untouched, refusal, state_of

pytestmark = [  # what PEFT itself does
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


PAIRS = [name for name, family in families().items() if len(family.stacks) > 1]
ALWAYS = ("identity-", "sites", "points", "serves-", "head-AutoModelForSequenceClassification")
HEADS = ("SequenceClassification", "MaskedLM", "CausalLM", "Seq2SeqLM")
OFTEN = "hyper_connections"  # of the sample: several streams from layer to layer


def cases():
    """All points of one family of each build; of those that differ in their names alone what shows that they do."""
    seen = []
    for name, family in families().items():
        build = [replace(stack, layer="", embeddings=(), embed_norm="") for stack in family.stacks]
        for check in family_checks(name):
            # seconds each, and the schemes' contract has them on one host
            late = check.name.startswith(("compile-", "export-"))
            late = late or (build in seen and not check.name.startswith(ALWAYS))
            kind, _, about = check.name.partition("-")
            late = late or (kind in AROUND and about in SAMPLE and about != OFTEN)
            late = late or (kind == "head" and about.removeprefix("AutoModelFor") not in HEADS)
            yield pytest.param(check, id=f"{name}-{check}", marks=[pytest.mark.slow] if late else [])
        seen.append(build)


@pytest.mark.parametrize("check", list(cases()))
def test_contract(check):
    try:
        check()
    except HostCannot as reason:
        if "nor does the host" in str(reason) and check.name.startswith(("cache-", "copies-", "lora-")):
            raise  # rather the tiny host is not what it should be
        pytest.skip(str(reason))


@pytest.mark.parametrize("family", list(families()))
def test_every_family_is_served(family):
    """So that the points above are not all left out: a gate everywhere, most of the sample on every family."""
    host = Subject(families()[family]).host()
    served = [name for name in SAMPLE if not refusal(host, name, "paper")]
    assert "highway" in served
    assert len(served) >= len(SAMPLE) // 2, served


# ------------------------------------------------------------------------------------------------ one's own model


class Mixer(nn.Module):
    """Each token takes from those before it, by scores."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, seen=None):
        scores = self.q(x) @ self.k(x).mT
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -1e4)
        return self.o(scores.softmax(-1) @ self.v(x))


class OwnBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), Mixer(width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)
        self.rate = 0.2

    def forward(self, x, seen=None):
        x = x + functional.dropout(self.mix(self.norm(x), seen), self.rate, self.training)
        return x + functional.dropout(self.down(torch.tanh(self.up(self.norm2(x)))), self.rate, self.training)


class Tanh(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


class OwnModel(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, width), nn.ModuleList(OwnBlock(width) for _ in range(2))
        self.final = nn.LayerNorm(width)
        for block in self.blocks:
            block.act = Tanh()
        self.width = width

    def forward(self, ids, seen=None):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, seen)
        return self.final(x)


POINTS = {name: Projection(f"mix.{name}") for name in "qkvo"}
MIX = Site("attn", calls=("mix", "rate"), norms={"pre": "norm"}, passes={"seen": "seen"}, points=POINTS)
FEED = Site(
    "ffn",
    calls=("up", "act", "down", "rate"),
    norms={"pre": "norm2"},
    points={"up": Projection("up"), "down": Projection("down")},
)
OWN = Stack(layer=f"{__name__}.OwnBlock", layers="blocks", final_norm="final", embeddings=("embed",), sites=(MIX, FEED))


def own_host(weights=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OwnModel()
    perturb(model, 1.0, 0)
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(weights)
        model.blocks[1].down.bias.mul_(weights)
    return model


def own_batch():
    seen = torch.ones(2, 5, dtype=torch.bool)
    seen[1, 3:] = False
    return {"ids": torch.arange(10).reshape(2, 5), "seen": seen}


@pytest.fixture
def registered(monkeypatch):
    """Register a family as "own" for one test."""

    def add(stack=OWN, **changes):
        monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
        monkeypatch.setattr(swap, "_CLASSES", {})  # made once for a name
        probe = lambda model: model(**own_batch())
        resformer.register_family(Family("own", (stack,), probe=probe, **changes))

    return add


def test_a_model_of_ones_own_passes(registered, monkeypatch):
    registered()
    for graph in ("compile", "export"):  # seconds
        monkeypatch.delitem(AROUND, graph)
    left_out = [line.partition(":")[0] for line in check_family("own", own_host, own_batch)]
    theirs = {line for line in left_out if line.startswith(("hidden_states-", "checkpointing-", "cache-"))}
    assert set(left_out) - theirs == {"serves-value_residual", "round_trip-value_residual"}, "it names no `extra`"
    names = [check.name for check in family_checks("own", own_host, own_batch)]
    assert len(names) == len(set(names))
    assert {"identity-own", "sites", "points", "serves-highway", "lora-sub_ln"} <= set(names)


def test_the_command_counts(monkeypatch, capsys):
    monkeypatch.setattr("resformer.testing.families.AROUND", {})
    assert main(["gpt2"]) == 0
    out = capsys.readouterr().out
    assert f"points of {len(SAMPLE)} schemes, 0 do not apply" in out
    assert f"{len(SAMPLE)} pairs of family and scheme, 0 families fail" in out


@pytest.mark.slow
def test_a_model_of_ones_own_passes_as_a_graph(registered):
    registered()
    graphs = [check for check in family_checks("own", own_host, own_batch) if check.name.startswith(("comp", "exp"))]
    assert len(graphs) == 2
    for check in graphs:
        check()


def test_what_is_needed_is_said(registered):
    registered()
    with pytest.raises(ValueError, match=r"check_family\(name, host, batch\)"):
        check_family("own")
    with pytest.raises(ValueError, match="unknown family 'bort'"):
        check_family("bort")


def changed(**changes):
    """The family, its first site changed."""
    return replace(OWN, sites=(replace(MIX, **changes), FEED))


FAULTS = {
    "dropout left out": (changed(calls=("mix",)), own_host, "identity-own"),
    "an argument left out": (changed(passes={}), own_host, "identity-own"),
    "a norm taken for another": (changed(norms={"pre": "norm2"}), own_host, "identity-own"),
    "sites in another order": (replace(OWN, sites=(FEED, MIX)), own_host, "identity-own"),
    "a sublayer left out": (replace(OWN, sites=(MIX,)), own_host, "identity-own"),
    "a sublayer without weight": (OWN, partial(own_host, 0.0), "sites"),
    "q taken for v": (changed(points=POINTS | {"v": POINTS["q"], "q": POINTS["v"]}), own_host, "points"),
    "q taken for o": (changed(points=POINTS | {"o": POINTS["q"], "q": POINTS["o"]}), own_host, "points"),
    "k taken for v": (changed(points=POINTS | {"k": POINTS["v"]}), own_host, "identity-own"),
    "up taken for down": (
        replace(OWN, sites=(MIX, replace(FEED, points={"down": Projection("up")}))),
        own_host,
        "identity-own",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(registered, fault):
    stack, host, point = FAULTS[fault]
    registered(stack)
    with pytest.raises(AssertionError, match=f"family 'own' fails '{point}'"):
        check_family("own", host, own_batch)


# ------------------------------------------------------------------------------------------------ a host that changed


CHANGING = [name for name in ("bert", "gpt2", "llama", *PAIRS[:1]) if name in families()]


def classes(family):
    """Of the layers of the family's last stack, and of what runs them."""
    with torch.device("meta"):
        stack = find_host(AutoModel.from_config(tiny_config(family))).stacks[-1]
    return host_class(stack.layers[0]), type(stack.root), stack.spec


def made(family):
    model = AutoModel.from_config(tiny_config(family), attn_implementation="eager")
    perturb(model, 0.2, 0)
    return model.eval()


def first_of(output, change):
    """With the states changed, which may stand in a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def an_extra_sublayer(cls, root, stack, monkeypatch):
    """That has no module of its own."""
    forward = cls.forward
    later = lambda self, h, *args, **kwargs: first_of(forward(self, h, *args, **kwargs), lambda y: y + torch.tanh(y))
    monkeypatch.setattr(cls, "forward", later)


def an_extra_module(cls, root, stack, monkeypatch):
    make = cls.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.adapter = nn.Linear(4, 4)

    monkeypatch.setattr(cls, "__init__", init)


def a_norm_that_moved(cls, root, stack, monkeypatch):
    """From around the first sublayer to the end of the layer."""
    forward, path = cls.forward, next(iter(stack.sites[0].norms.values()))

    def later(self, h, *args, **kwargs):
        norm = find(self, path)
        norm.forward = lambda x: x
        try:
            output = forward(self, h, *args, **kwargs)
        finally:
            del norm.forward
        return first_of(output, norm)

    monkeypatch.setattr(cls, "forward", later)


def layers_called_twice(cls, root, stack, monkeypatch):
    """By a loop that is run again."""
    forward = root.forward

    @functools.wraps(forward)
    def twice(self, *args, **kwargs):
        forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(root, "forward", twice)


def an_attribute_renamed(cls, root, stack, monkeypatch):
    """The first step on the way to the first norm."""
    make, name = cls.__init__, next(iter(stack.sites[0].norms.values())).partition(".")[0]

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        module = getattr(self, name)
        delattr(self, name)
        setattr(self, f"new_{name}", module)

    monkeypatch.setattr(cls, "__init__", init)


CHANGES = {
    an_extra_sublayer: r"with the identity scheme it computes something else \(relative difference [0-9.]+e",
    a_norm_that_moved: r"with the identity scheme it computes something else \(relative difference [0-9.]+e",
    an_extra_module: "it says nothing of 'adapter' in its layers; add a site",
    layers_called_twice: r"a forward pass comes 2 times by (en|de)coder layer 0, \w+, and once is expected",
    an_attribute_renamed: r"'[\w.]+' was not found in \w+: no '\w+'",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", CHANGING)
def test_a_host_that_changed_is_not_patched(family, change, monkeypatch):
    """As another version of transformers could: the error says what differs, and the model is left alone."""
    monkeypatch.setattr(swap, "_CLASSES", {})
    change(*classes(family), monkeypatch)
    model = made(family)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"family '{family}'.*{CHANGES[change]}"):
        resformer.patch(model, "highway")
    assert_untouched(model, before)
    assert not is_patched(model)


def test_the_sample_has_one_of_each_kind():
    kinds = [schemes()[name] for name in SAMPLE]
    assert {"o", "values"} <= {point for cls in kinds for point in cls.points}
    assert any(cls.scope == "block" for cls in kinds)
    assert sum(cls.start is not Scheme.start for cls in kinds) >= 2, "history and streams"
    assert sum(cls.norms is not None for cls in kinds) >= 3, "moved norms"


@pytest.mark.parametrize("family", families())
def test_the_embeddings_are_those_that_open_the_stacks(family):
    """All trained tables of the stream's width that are looked into before the layers, and no other."""
    host = find_host(tiny_host(family))
    tables = [m for m in host.model.modules() if isinstance(m, nn.Embedding) and m.weight.requires_grad]
    inside = {id(part) for layer in host.layers for part in layer.modules()}
    for stack in host.stacks:
        named = [m for path in stack.spec.embeddings if (m := find(stack.root, path)) is not None]
        width = {module.weight.shape[-1] for module in named}
        opened = looked_into(host, stack, [m for m in tables if m.weight.shape[-1] in width and id(m) not in inside])
        assert opened <= {id(module) for module in named}, f"{stack.spec.name}: a table is not named"
        unused = [path for path in stack.spec.embeddings if id(find(stack.root, path)) not in opened]
        assert set(unused) <= {"embeddings.token_type_embeddings"}, "DeBERTa may have one that it does not use"


def looked_into(host, stack, tables) -> set[int]:
    """The ids of the tables that a forward pass looks into before this stack, and after any other."""
    used, opened = [], []
    hooks = [table.register_forward_hook(lambda module, args, y: used.append(id(module))) for table in tables]
    hooks.append(
        stack.layers[0].register_forward_pre_hook(lambda module, args: None if opened else opened.extend(used))
    )
    others = [one.layers[-1] for one in host.stacks if one is not stack]
    hooks += [layer.register_forward_hook(lambda module, args, y: used.clear()) for layer in others]
    with torch.no_grad():
        host.model(**batch_for(host.family.name))
    for hook in hooks:
        hook.remove()
    return set(opened)
