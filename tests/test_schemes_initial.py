"""Schemes of initial scale: the papers' constants, and the weights of the hosts that they scale."""

import math

import pytest
import torch
from test_hosts import THREE, projections
from test_schemes import WIDTH, place
from transformers import AutoModelForCausalLM

import resformer
from resformer import schemes
from resformer.host import find_host
from resformer.testing.hosts import batch, tiny_host


def paper(name, at=None, **options):
    return schemes()[name](at or place(), init="paper", **options)


def layers_of(family, model):
    return find_host(model).layers


# ------------------------------------------------------------------------------------------------ constants


@pytest.mark.parametrize(("sites", "value"), [(1, 1.373), (12, 2.017), (96, 4.495)])
def test_admin_closed_form(sites, value):
    """sqrt((n + 1) / ln(n + 1) - 1) for n sublayers, as the package admin-torch computes it."""
    assert paper("admin", place(sites=sites), profile=False).w.tolist() == pytest.approx([value] * WIDTH, abs=1e-3)
    assert paper("admin", place(sites=sites)).w.tolist() == [1.0] * WIDTH
    assert schemes()["admin"](place(sites=sites), profile=False).w.tolist() == [1.0] * WIDTH


def test_fixup_constants():
    scheme = paper("fixup", place(sites=24, layers=12))
    assert (scheme.scale.item(), scheme.before.item(), scheme.after.item()) == (1, 0, 0)
    attention, ffn = 24 ** (-1 / 6), 24**-0.5
    expected = {"q": attention, "k": attention, "v": attention, "o": 0, "up": ffn, "down": 0}
    assert scheme.edits() == pytest.approx(expected)
    # an encoder of 6 layers and a decoder of 4 have 2 · 6 + 3 · 4 sites, seen from either
    for where in (
        {"sites": 12, "layers": 6, "other_layers": 4},
        {"sites": 12, "layers": 4, "other_layers": 6, "stack": "decoder"},
    ):
        assert paper("fixup", place(**where)).edits()["up"] == pytest.approx(24**-0.5)
    assert schemes()["fixup"](place()).edits() == {}


def test_t_fixup_constants():
    def edits(**where):
        return paper("t_fixup", place(layers=12, **where)).edits()

    encoder, decoder = 0.67 * 12**-0.25, (9 * 12) ** -0.25
    assert edits() == pytest.approx(dict.fromkeys(("v", "o", "up", "down"), encoder))
    assert edits(stack="decoder") == pytest.approx(dict.fromkeys(("v", "o", "up", "down"), decoder))
    assert edits(opens=True)["embed"] == edits(opens=True, stack="decoder")["embed"] == pytest.approx(decoder)


def test_pro_res_warms_up_layer_by_layer():
    """min(1, t / (T l)), as the paper's table of schedules."""
    first, fourth = paper("pro_res", place(layer=0), warmup=100), paper("pro_res", place(layer=3), warmup=100)
    for step, expected in ((0, (0, 0)), (50, (0.5, 0.125)), (100, (1, 0.25)), (399, (1, 0.9975)), (4000, (1, 1))):
        for scheme, value in zip((first, fourth), expected, strict=True):
            scheme.set_progress(step)
            assert scheme.alpha.item() == pytest.approx(value)


ADDING = ["skip_init", "x0_mix", "fixup", "pro_res"]


@pytest.mark.parametrize(
    ("family", "name"),
    [("bert", name) for name in (*ADDING, "admin", "branch_norm")] + [("gpt2", name) for name in (*ADDING, "gpas")],
)
def test_what_is_kept_is_kept_bit_for_bit(family, name):
    host, given = tiny_host(family, dtype=torch.float32), batch(padded=True)
    expected = host(**given).last_hidden_state
    assert torch.equal(resformer.patch(host, name)(**given).last_hidden_state, expected)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("family", THREE)
def test_fixup_scales_and_zeroes_weights(family):
    host, patched = tiny_host(family), resformer.patch(tiny_host(family), "fixup", init="paper")
    gains = dict.fromkeys("qkv", 4 ** (-1 / 6)) | {"up": 0.5, "o": 0.0, "down": 0.0}
    for before, after in zip(layers_of(family, host), layers_of(family, patched), strict=True):
        there = projections(family, after)
        for role, weight in projections(family, before).items():
            torch.testing.assert_close(there[role], gains.get(role, 1.0) * weight, rtol=1e-12, atol=0)
    resformer.unpatch(patched)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), patched.parameters(), strict=True))


def test_weights_that_fixup_zeroed_stay_if_they_were_trained():
    model = resformer.patch(tiny_host("bert"), "fixup", init="paper")
    weight = model.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.add_(1.0)
    resformer.unpatch(model)
    assert torch.equal(weight, torch.ones_like(weight))


def test_t_fixup_scales_embeddings_once_and_the_tied_head_with_them():
    host = tiny_host("gpt2", AutoModelForCausalLM)
    patched = resformer.patch(tiny_host("gpt2", AutoModelForCausalLM), "t_fixup", init="paper")
    gain = 18**-0.25  # a decoder of two layers
    for name in ("wte", "wpe"):
        before, after = getattr(host.transformer, name).weight, getattr(patched.transformer, name).weight
        torch.testing.assert_close(after, gain * before)
    assert patched.lm_head.weight is patched.transformer.wte.weight
    assert patched.transformer.h[1].resformer.acts == {"attn": {}, "ffn": {}}
    resformer.unpatch(patched)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), patched.parameters(), strict=True))
    assert torch.equal(host(**batch()).logits, patched(**batch()).logits)


@pytest.mark.parametrize("family", THREE)
def test_t_fixup_scales_weights(family):
    host, patched = tiny_host(family), resformer.patch(tiny_host(family), "t_fixup", init="paper")
    gain = 18**-0.25 if family == "gpt2" else 0.67 * 2**-0.25
    for before, after in zip(layers_of(family, host), layers_of(family, patched), strict=True):
        there = projections(family, after)
        for role, weight in projections(family, before).items():
            torch.testing.assert_close(
                there[role], (1 if role in ("q", "k", "gate") else gain) * weight, rtol=1e-12, atol=0
            )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("admin", {"profile": "yes"}, "'profile' must be True or False, got 'yes'"),
        ("branch_norm", {"warmup": 0}, "'warmup' must be a whole number of at least 1, got 0"),
        ("branch_norm", {"warmup": 10.0}, "'warmup' must be a whole number"),
        ("pro_res", {"warmup": math.inf}, "'warmup' must be a whole number"),
        ("pro_res", {"warmup": True}, "'warmup' must be a whole number"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        paper(name, **options)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_t_fixup_leaves_embeddings_alone_that_other_layers_read(family):
    host, model = tiny_host(family, layers=4), tiny_host(family, layers=4)
    resformer.patch(model, "t_fixup", init="paper", layers=range(2, 4))
    for (name, before), after in zip(host.named_parameters(), model.parameters(), strict=False):
        if "embed" in name or name.startswith("wt") or name.startswith("wp"):
            assert torch.equal(before, after), name
    resformer.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), model.parameters(), strict=True))
