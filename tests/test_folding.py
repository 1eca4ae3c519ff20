"""Schemes folded into their hosts: a plain model that computes the same, or a refusal that changes nothing."""

import copy

import pytest
import torch
from reference import VARIANTS
from test_patching import assert_same, snapshot
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import resformer
from resformer import folding, schemes
from resformer.host import find_host
from resformer.layer import Residual
from resformer.schemes import Scheme, base
from resformer.testing.hosts import batch, randomize, tiny_host

THREE = ["bert", "gpt2", "modernbert"]
CASES = [(name, options) for name in schemes() for options in ({}, *VARIANTS.get(name, []))]
CASE_IDS = [f"{name}-{options}" if options else name for name, options in CASES]
CLASSIFY = AutoModelForSequenceClassification


def patched(family: str, name: str, *, init="paper", placement=None, layers=None, seed=1, options=None, **changes):
    """A host of three layers, patched, with trained-like parameters."""
    model = tiny_host(family, layers=3, **changes)
    resformer.patch(model, name, init=init, placement=placement, layers=layers, verify=False, **(options or {}))
    randomize(model, seed)
    return model


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(padded=True))[0]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("init", ["paper", "preserve"])
@pytest.mark.parametrize("family", ["bert", "gpt2", pytest.param("modernbert", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_folded_or_left_alone(family, name, options, init):
    try:
        model = patched(family, name, init=init, options=options)
    except ValueError:
        pytest.skip("cannot be patched so")
    expected, before = output(model), snapshot(model)
    try:
        assert resformer.fold(model) is model
    except ValueError as error:
        assert "cannot be folded" in str(error)  # noqa: PT017
        assert_same(snapshot(model), before)
        assert torch.equal(output(model), expected)
        resformer.unpatch(model)
    else:
        assert relative(output(model), expected) <= 1e-10
        assert not any(isinstance(module, Residual) for module in model.modules())
        plain = tiny_host(family, layers=3)
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert type(model) is type(plain)
        assert model.config.to_dict() == plain.config.to_dict()
        plain.load_state_dict(model.state_dict())  # eps and all else that is no weight are the host's
        assert torch.equal(output(plain), output(model))


FOLDS = [
    ("bert", "identity", {}),
    ("bert", "rezero", {"placement": "native"}),
    ("bert", "layer_scale", {"init": "preserve"}),
    ("bert", "scaled", {"options": {"shortcut": 0.7, "branch": 0.3}}),
    ("bert", "scaled", {"init": "preserve", "options": {"shortcut": 0.7, "branch": 0.3}}),
    ("bert", "deepnorm", {}),
    ("bert", "deepnorm", {"init": "preserve"}),
    ("bert", "deepnorm", {"layers": range(1, 3)}),
    ("bert", "deepnorm", {"layers": range(0, 2)}),
    ("bert", "drop_path", {}),
    ("bert", "ode", {"options": {"method": "euler"}}),
    ("distilbert", "deepnorm", {}),
    ("roberta", "deepnorm", {}),
    ("electra", "layer_scale", {"init": "preserve"}),
    ("gpt2", "rezero", {"placement": "native"}),
    ("gpt2", "layer_scale", {}),
    ("gpt2", "layer_scale", {"layers": range(1, 2)}),
    ("gpt2", "scaled", {"options": {"branch": 0.3}}),
    ("modernbert", "rezero", {"placement": "native"}),
    ("modernbert", "layer_scale", {}),
]


@pytest.mark.parametrize(("family", "name", "arguments"), FOLDS, ids=[f"{f}-{n}-{a}" for f, n, a in FOLDS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_algebra_allows_is_folded(family, name, arguments, dtype):
    model = patched(family, name, dtype=dtype, **arguments)
    expected = output(model)
    resformer.fold(model)
    assert relative(output(model), expected) <= {torch.float64: 1e-10, torch.float32: 1e-6}[dtype]


REFUSED = [
    ("bert", "highway", {}, "constant factors"),
    ("bert", "concat", {}, "constant factors"),
    ("gpt2", "hyper_connections", {}, "more than one stream"),
    ("gpt2", "denseformer", {}, "more than one stream"),
    ("gpt2", "scaled", {"options": {"shortcut": 0.7}}, "1 where no norm follows"),
    ("bert", "scaled", {"options": {"shortcut": -0.7}}, "one positive number"),
    ("gpt2", "post_ln", {}, "norms act elsewhere"),
    ("bert", "pre_ln", {}, "norms act elsewhere"),
    ("bert", "rezero", {}, "norms act elsewhere"),  # its paper has none
    ("gpt2", "sub_ln", {}, "acts inside the sublayer"),
    ("gpt2", "ode", {}, "does not see the stream itself, once"),
    (
        "electra",
        "deepnorm",
        {},
        "no norm follows the embeddings",
    ),  # but a projection between
]


@pytest.mark.parametrize(("family", "name", "arguments", "why"), REFUSED, ids=[f"{f}-{n}" for f, n, *_ in REFUSED])
def test_what_cannot_be_folded_says_why(family, name, arguments, why):
    model = patched(family, name, **arguments)
    before = snapshot(model)
    with pytest.raises(ValueError, match=why):
        resformer.fold(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_factor_goes_into_weight_and_bias(family):
    """Linear keeps (out, in), Conv1D (in, out)."""
    model = patched(family, "layer_scale", init="preserve")
    layer = find_host(model).layers[1]
    down = layer.output.dense if family == "bert" else layer.mlp.c_proj
    a, weight, bias = (p.detach().clone() for p in (layer.resformer.ffn.a, down.weight, down.bias))
    resformer.fold(model)
    torch.testing.assert_close(down.weight, a[:, None] * weight if family == "bert" else weight * a)
    torch.testing.assert_close(down.bias, a * bias)


def test_preserving_factors_fold_back_to_the_host():
    host = tiny_host("bert", layers=3)
    model = resformer.fold(resformer.patch(copy.deepcopy(host), "deepnorm"))
    for key, value in host.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-14, atol=0)


def test_a_gate_that_never_learned_is_folded():
    host = tiny_host("gpt2", layers=3)
    model = resformer.fold(resformer.patch(copy.deepcopy(host), "highway"))
    assert torch.equal(output(model), output(host))


@pytest.mark.parametrize(
    ("family", "name", "auto"), [("bert", "deepnorm", CLASSIFY), ("gpt2", "layer_scale", AutoModelForCausalLM)]
)
def test_the_checkpoint_is_an_ordinary_one(tmp_path, family, name, auto):
    """Also after the patched model itself was saved and loaded."""
    model = patched(family, name, auto=auto, attention="sdpa")
    expected = output(model)
    model.save_pretrained(tmp_path / "patched")
    model = resformer.fold(resformer.from_pretrained(tmp_path / "patched", auto))
    model.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").exists()
    assert "resformer" not in (tmp_path / "plain" / "config.json").read_text()
    assert relative(output(auto.from_pretrained(tmp_path / "plain")), expected) <= 1e-10
    assert relative(output(type(model).from_pretrained(tmp_path / "plain")), expected) <= 1e-10


def test_half_precision():
    model = patched("gpt2", "layer_scale", init="preserve", dtype=torch.bfloat16)
    exact = copy.deepcopy(model).double()
    expected, rounding = output(exact), relative(output(model), output(exact))
    resformer.fold(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert relative(output(model), expected) <= 3 * rounding


def test_a_folded_model_can_be_patched_again():
    model = patched("bert", "deepnorm")
    expected = output(model)
    resformer.patch(resformer.fold(model), "highway")
    assert relative(output(model), expected) <= 1e-10


def test_training_mode_and_trained_flags_stay():
    model = patched("bert", "drop_path").train()
    model.encoder.layer[0].output.dense.weight.requires_grad_(False)
    resformer.fold(model)
    assert all(module.training for module in model.modules())
    assert not model.encoder.layer[0].output.dense.weight.requires_grad
    assert all(p.is_leaf for p in model.parameters())


def test_shared_weights_are_not_scaled_twice():
    model = tiny_host("bert", layers=2)
    first, second = model.encoder.layer
    second.output.dense.weight = first.output.dense.weight
    resformer.patch(model, "layer_scale")
    resformer.fold(copy.deepcopy(model))  # factors of 1 change nothing
    randomize(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"output\.dense\.weight' would take on a factor, and its weights are used"):
        resformer.fold(model)
    assert_same(snapshot(model), before)


def test_a_measured_difference_is_refused(monkeypatch):
    for family, name in (("bert", "deepnorm"), ("gpt2", "ode")):
        model = patched(family, name, options={"method": "euler"} if name == "ode" else {})
        before = snapshot(model)
        with monkeypatch.context() as context:
            context.setattr(folding, "difference", lambda found, expected: float("nan"))
            with pytest.raises(ValueError, match="differs by nan"):
                resformer.fold(model)
        assert_same(snapshot(model), before)


def test_cross_attention_is_folded_too():
    changes = {"is_decoder": True, "add_cross_attention": True}
    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for family, name in (("bert", "rezero"), ("gpt2", "layer_scale")):
        model = patched(family, name, init="preserve", auto=AutoModelForCausalLM, **changes)
        expected = model(**batch(), encoder_hidden_states=states).logits
        resformer.fold(model)
        assert relative(model(**batch(), encoder_hidden_states=states).logits.detach(), expected.detach()) <= 1e-10
    with pytest.raises(ValueError, match="cross-attention may be left out"):
        resformer.fold(patched("bert", "deepnorm", **changes))


class Entering(Scheme):
    """A constant on what enters the sublayer, which stands for schemes that scale the norm there.

    x ← x + F(x / 2)
    """

    points = ("in",)

    def inside(self, point, x):
        return x / 2


class Uneven(Scheme):
    """A shortcut with a factor for each channel, which no norm after the add can take on.

    x ← r ⊙ x + F(x)
    """

    def write(self, s, y, norm):
        return norm(torch.linspace(0.5, 1, s.shape[-1], dtype=s.dtype) * s + y)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_constant_inside_is_folded(monkeypatch, family):
    monkeypatch.setitem(base._SCHEMES, "local", Entering)
    model = patched(family, "local")
    expected = output(model)
    assert relative(output(tiny_host(family, layers=3)), expected) > 0.01
    resformer.fold(model)
    assert relative(output(model), expected) <= 1e-10


def test_a_factor_on_the_shortcut_has_to_be_one_number(monkeypatch):
    monkeypatch.setitem(base._SCHEMES, "local", Uneven)
    with pytest.raises(ValueError, match="one positive number"):
        resformer.fold(patched("bert", "local"))


def test_there_must_be_something_to_fold():
    with pytest.raises(ValueError, match="nothing to fold"):
        resformer.fold(AutoModel.from_config(tiny_host("bert").config))


def test_a_gate_that_learned_is_not_folded_where_it_happens_to_be_open():
    """A hard gate is constant between its steps: every token of a probe may be on one side, and others not."""
    model = resformer.patch(tiny_host("gpt2"), "sparse_gate")
    resformer.fold(copy.deepcopy(model))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate.weight"):
                p.copy_(1e-5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="depend on the token"):
        resformer.fold(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_values_of_attention_are_named_as_the_reason():
    with pytest.raises(ValueError, match="it changes the values of attention"):
        resformer.fold(resformer.patch(tiny_host("bert"), "value_residual"))
