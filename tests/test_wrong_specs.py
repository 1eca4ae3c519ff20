"""Specs that are wrong, by themselves and for a model: each is one clear error, and the model stays as it was."""

from dataclasses import replace

import pytest
import torch
from test_own_models import IDS, POINTS, Block, Net, PostBlock, net, own_family, registered, sites  # noqa: F401
from torch import nn
from wrong_specs import ATTN, FFN, refused, with_site, with_stack

import resformer
from resformer import families
from resformer.hosts import Family, Projection, Site, Stack, register_family
from resformer.hosts import family as registry
from resformer.layer import Residual
from resformer.testing import check_family
from resformer.testing.hosts import tiny_host

WRONG = {
    "no stack": (replace(own_family(), stacks=()), "at least one stack"),
    "no site": (with_stack(sites=()), "at least one stack, and each stack a site"),
    "stack name": (with_stack(name="encodr"), "unknown stack 'encodr'.*Did you mean 'encoder'"),
    "two stacks of one name": (replace(own_family(), stacks=own_family().stacks * 2), "'encoder' is there twice"),
    "layer": (with_stack(layer="Block"), "class of modules, or its full name.*got 'Block'"),
    "an instance as layer": (with_stack(layer=Block(4, 1)), "class of modules, or its full name"),
    "layers": (with_stack(layers=""), "path of the list of layers"),
    "site twice": (with_stack(sites=(ATTN, ATTN)), "'attn' is there twice"),
    "call twice": (with_stack(sites=(ATTN, replace(FFN, calls=("attn",)))), "first calls.*'attn' is there twice"),
    "site name": (with_site(name="block"), "a name that is not taken"),
    "slot": (with_site(norms={"before": "norm1"}), "unknown slot 'before' of `norms` of site 'attn' of family 'mine'"),
    "norm twice": (with_site(norms={"pre": "norm1", "out": "norm1"}), "'norm1' is there twice"),
    "a stack alone": (
        replace(own_family(), stacks=own_family().stacks[0]),
        "`stacks` of .* must be a tuple",
    ),
    "a site alone": (
        with_stack(sites=ATTN),
        r"`sites` of .* must be a tuple, \(Site\(...\), ...\), got Site",
    ),
    "calls": (with_site(calls="attn"), r"`calls` of site 'attn' .* must be a tuple, \(path, ...\), got 'attn'"),
    "no calls": (with_site(calls=()), "needs `calls`, a tuple of paths"),
    "norms as a path": (
        with_site(norms="norm1"),
        r"`norms` of site 'attn' .* must be \{name: path, ...\}",
    ),
    "a point as a path": (with_site(points={"q": "attn.q"}), r"must be \{name: Projection\(...\), ...\}"),
    "point": (with_site(points={"query": POINTS["q"]}), "unknown point 'query' of site 'attn'"),
    "part": (with_site(points={"q": Projection("attn.qkv", 3, 3)}), "part 3 of 3"),
    "ends elsewhere": (with_site(ends="mlp.0", norms={"post": "attn.n"}), "must be children of its first call 'attn'"),
    "ends without a norm": (with_site(ends="attn.out", norms={}), "must be children of its first call"),
    "returns": (with_stack(returns=(("atn", 1),)), "unknown site 'atn' of `returns`.*Did you mean 'attn'"),
    "returns the states": (with_stack(returns=(("attn", 0),)), "after the states, from 1 on; got 0"),
    "a name that is no text": (replace(own_family(), name=3), "needs a name, a string, got 3"),
    "no name": (replace(own_family(), name=""), "needs a name"),
    "a list of values": (replace(own_family(), only=["x"]), r"`only` of family 'mine' must be \{name: value"),
    "a probe that is called": (replace(own_family(), probe=IDS), "`probe` of family 'mine' must be a function or None"),
    "a path that is a number": (with_stack(layers=3), "`layers` of stack 'encoder' of family 'mine' must be a string"),
    "no path": (with_stack(final_norm=None), "`final_norm` of .* must be a string, got None"),
    "an order that is a list": (with_stack(order=[0, 1]), "`order` of .* must be a function or None"),
    "returns alone": (with_stack(returns=("attn", 1)), r"`returns` of .* a tuple, \(\(path, number\), ...\), got"),
    "between": (with_stack(between={"conv": "0"}), r"`between` of .* must be \{name: number, ...\}"),
    "a flag that is a word": (with_site(extra="yes"), "`extra` of site 'attn' .* must be True or False, got 'yes'"),
    "after": (with_site(after="clamp"), "`after` of site 'attn' .* must be a function or None"),
    "parts that are text": (
        with_site(points={"q": Projection("attn.qkv", 0, "3")}),
        "`parts` of a projection in `points` of site 'attn' .* must be a whole number, got '3'",
    ),
    "both kinds": (
        Family("mine", (own_family().stacks[0], Stack(layer=Net, layers="x", name="decoder", sites=sites("post")))),
        "norms after the add in one stack only",
    ),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_a_spec_that_no_model_can_fit_is_not_registered(what):
    family, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        register_family(family)
    assert "mine" not in families()


@pytest.mark.parametrize("name", sorted({*vars(Residual({}, {}, {})), "norm", "embed_norm", "training", "_x", ""}))
def test_a_site_is_not_called_what_its_layer_has_already(name):
    with pytest.raises(ValueError, match="a name that is not taken"):
        register_family(with_site(name=name))


def test_a_taken_name_leads_to_another_before_it_leads_to_a_replacement():
    register_family(own_family())
    with pytest.raises(ValueError, match=r"registered already.*give yours another name, or, to correct that one"):
        register_family(own_family(PostBlock))


def test_names_are_found_in_any_case():
    with pytest.raises(ValueError, match=r"unknown family 'BERT'\. Did you mean 'bert'"):
        check_family("BERT")


def test_only_families_are_registered():
    with pytest.raises(ValueError, match=r"takes a resformer\.hosts\.Family, got Stack"):
        register_family(own_family().stacks[0])
    with pytest.raises(ValueError, match=r"registered already, as 'bert'"):
        register_family(replace(families()["bert"], name="mine"))


# ------------------------------------------------------------------------------------------------ specs, on a model


def failing(model):
    raise RuntimeError("no such input")


MISFITS = {
    "path of a norm": (with_site(norms={"pre": "norm0"}), "'norm0' was not found in Block: no 'norm0'"),
    "path of a call": (with_site(calls=("attn", "drop")), "'drop' was not found in Block: no 'drop'"),
    "path of a point": (with_site(points={"q": Projection("attn.q")}), "'attn.q' was not found in Block"),
    "final norm": (with_stack(final_norm="ln"), "'ln' was not found in Net: no 'ln'"),
    "no final norm": (
        with_stack(final_norm=""),
        "'norm' is a norm of what the last layer .* gives; name it in `final_norm`",
    ),
    "a site is missing": (with_stack(sites=(ATTN,)), "says nothing of 'norm2' in its layers; add a site"),
    "the sites are in another order": (with_stack(sites=(FFN, ATTN)), "it computes something else"),
    "a norm is in another slot": (with_site(norms={"out": "norm1"}), "it computes something else .relative difference"),
    "an argument is not passed": (with_site(passes={}), "no site hands it on"),
    "a parameter that is not there": (with_site(passes={"msk": "mask"}), "the sublayers fail.*'msk'"),
    "no probe": (replace(own_family(), probe=None), "needs a `probe`"),
    "a probe that fails": (replace(own_family(), probe=failing), "probe of family 'mine' failed .* no such input"),
    "a probe of nothing": (replace(own_family(), probe=lambda model: None), "must return a tensor .* got a NoneType"),
    "a random probe": (replace(own_family(), probe=lambda m: m(IDS) + torch.rand(1)), "something else each time"),
    "a probe of NaN": (replace(own_family(), probe=lambda m: m(IDS) / 0 * 0), "no finite number"),
    "a probe beside the layers": (replace(own_family(), probe=lambda m: m.embed(IDS)), "comes 0 times by"),
}


@pytest.mark.parametrize("what", list(MISFITS))
def test_a_spec_that_does_not_fit_says_where(what):
    family, message = MISFITS[what]
    register_family(family)
    model = net()
    with refused(model, message):
        resformer.patch(model, "rezero")


def test_norms_that_are_taken_for_each_other_are_noticed_though_all_are_equal():
    first, second = sites()
    register_family(with_stack(sites=(replace(first, norms=second.norms), replace(second, norms=first.norms))))
    model = Net().eval()
    with refused(model, "it computes something else"):
        resformer.patch(model, "rezero")


def test_a_point_that_is_not_called_cannot_be_acted_inside_of():
    """As the `out_proj` of nn.MultiheadAttention, which reads its weight."""

    class Bare(nn.MultiheadAttention):
        def forward(self, x, mask=None):
            return super().forward(x, x, x, need_weights=False)[0]

    class Own(Block):
        def __init__(self, width, heads):
            super().__init__(width, heads)
            self.attn = Bare(width, heads, batch_first=True)

    attention = Site("attn", ("attn",), {"pre": "norm1"}, {"mask": "mask"}, points={"o": Projection("attn.out_proj")})
    register_family(with_stack(layer=Own, sites=(attention, FFN), heads="attn.num_heads"))
    model = net(Own)
    with refused(model, "does not call 'attn.out_proj' of layer 0 as a module"):
        resformer.patch(model, "normformer", init="paper")
    resformer.patch(model, "highway")


def test_what_stands_between_two_layers_is_told():
    class Reading(Net):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x).mul(0.5)
            return self.head(self.norm(x))

    register_family(own_family())
    model = Reading()
    with refused(model, r"'hyper_connections' this Reading fails \(AttributeError: .*between two layers"):
        resformer.patch(model, "hyper_connections")
    resformer.patch(model, "highway")


def test_a_norm_that_cannot_be_made_anew():
    class Odd(nn.Module):
        def __init__(self, width, *, groups):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return self.weight * x

    class Own(Block):
        def __init__(self, width, heads):
            super().__init__(width, heads)
            self.norm1, self.norm2 = Odd(width, groups=2), Odd(width, groups=2)

    register_family(own_family(Own))
    model = net(Own)
    with refused(model, "a Odd of family 'mine' cannot be made from the width alone"):
        resformer.patch(model, "sandwich", init="paper")
    resformer.patch(model, "highway")


def test_the_wrong_variant_says_what_is_wanted(monkeypatch):
    only = replace(families()["bert"], name="other", only={"hidden_act": "relu"})
    model = tiny_host("bert")
    monkeypatch.delitem(registry._FAMILIES, "bert")
    register_family(only)
    with refused(model, r"family 'other' is for {'hidden_act': 'relu'}, and here it is {'hidden_act': 'gelu'}"):
        resformer.patch(model, "rezero")
