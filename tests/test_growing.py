"""Patched models made deeper: the same function to the bit, with new layers that learn; or refused and left alone."""

import copy
import pickle

import pytest
import torch
from reference import VARIANTS
from test_patching import assert_same, snapshot
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import resformer
from resformer import families, growing, schemes
from resformer.host import find_host
from resformer.layer import Residual
from resformer.schedule import progress
from resformer.schemes import Scheme, base
from resformer.testing.hosts import batch, checkpoint, gradients, head_for, randomize, tiny_config, tiny_host

THREE = ["bert", "gpt2", "modernbert"]
CASES = [(name, options) for name in schemes() for options in ({}, *VARIANTS.get(name, []))]
CASE_IDS = [f"{name}-{options}" if options else name for name, options in CASES]
CLASSIFY = AutoModelForSequenceClassification


def patched(family: str, name: str, auto=CLASSIFY, *, init="paper", placement=None, options=None, layers=2, **changes):
    """A host patched with trained-like parameters."""
    model = tiny_host(family, auto, layers=layers, **changes)
    resformer.patch(model, name, init=init, placement=placement, verify=False, **(options or {}))
    randomize(model)
    return model


def layers_of(model) -> torch.nn.ModuleList:
    return find_host(model).stacks[0].layers


def output(model, **given) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(**batch(padded=True), **given)[0]


@pytest.mark.parametrize("init", ["paper", "preserve"])
@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "modernbert"))]
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=text, marks=[pytest.mark.slow] if options else [])
        for (name, options), text in zip(CASES, CASE_IDS, strict=True)
    ],
)
def test_grown_or_left_alone(tmp_path, family, name, options, init):
    try:
        model = patched(family, name, init=init, options=options, attention="sdpa").train()
    except ValueError:
        pytest.skip("cannot be patched so")
    expected, before, own = output(model), snapshot(model), list(model.parameters())
    try:
        assert resformer.grow(model, 4) is model
    except ValueError:
        assert_same(snapshot(model), before)
        assert torch.equal(output(model), expected)
        assert all(p is q for p, q in zip(model.parameters(), own, strict=True))
        model(**batch(labels=True)).loss.backward()
        resformer.unpatch(model)
        return
    assert torch.equal(output(model), expected)
    assert {id(p) for p in own} <= {id(p) for p in model.parameters()}
    assert len(layers_of(model)) == model.config.num_hidden_layers == 4
    assert all(module.training for module in model.modules())
    schemes_now = [layer.resformer.schemes[-1] for layer in layers_of(model)]
    assert [(one.place.layer, one.place.layers) for one in schemes_now] == [(n, 4) for n in range(4)]

    model.save_pretrained(tmp_path)
    found = resformer.from_pretrained(tmp_path, CLASSIFY)
    assert found.config.resformer == model.config.resformer
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in model.state_dict().items())
    assert torch.equal(output(found), output(model))

    seen = set()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    new = [(n, p) for n, p in layers_of(model).named_parameters() if n.startswith(("2.", "3.")) and p.requires_grad]
    for step in range(20):  # few are enough where no branch is left out at random
        torch.manual_seed(step)
        model(**batch(labels=True, seed=step)).loss.backward()
        assert all(p.grad is not None for _, p in new)
        seen |= {n for n, p in new if p.grad.any()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 2 and len(seen) == len(new):
            break
    assert seen == {n for n, _ in new}
    assert not torch.equal(output(model), expected)
    resformer.unpatch(model)
    assert model.state_dict().keys() == tiny_host(family, CLASSIFY, layers=4).state_dict().keys()


GROWS = [
    *(
        (family, name, {})
        for family in ("gpt2", "modernbert")
        for name in ("identity", "pre_ln", "rezero", "drop_path")
    ),
    *((family, name, {}) for family in ("gpt2", "modernbert") for name in ("layer_scale", "hyper_connections")),
    ("gpt2", "highway", {"init": "preserve"}),
    ("gpt2", "rezero", {"placement": "sandwich"}),
    ("bert", "pre_ln", {}),  # its final norm is the scheme's own, and moves up
    ("bert", "rezero", {}),
    ("bert", "layer_scale", {"placement": "pre"}),
    ("bert", "layer_scale", {"placement": "sandwich"}),
    ("distilbert", "pre_ln", {}),
    ("electra", "hyper_connections", {}),
    ("roberta", "rezero", {"placement": "none"}),
]


@pytest.mark.parametrize(("family", "name", "arguments"), GROWS, ids=[f"{f}-{n}-{a}" for f, n, a in GROWS])
def test_what_adds_to_a_clean_stream_grows(family, name, arguments):
    model = patched(family, name, **arguments)
    expected = output(model)
    for depth in (3, 6):  # what has grown can grow again
        resformer.grow(model, depth)
        assert torch.equal(output(model), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other), expected)


REFUSED = [
    ("bert", "identity", {"init": "preserve"}, r"post-LN.*relative difference is [1-9]"),
    ("bert", "highway", {}, "relative difference"),
    ("bert", "plain", {}, "relative difference"),
    ("bert", "deepnorm", {}, "factors that depend on depth"),
    ("gpt2", "sub_ln", {}, "factors that depend on depth"),
    ("gpt2", "highway", {}, "relative difference"),  # its carry gate closes the stream a little
    ("gpt2", "scaled", {"options": {"shortcut": 0.9}}, "relative difference"),
    ("gpt2", "plain", {}, "relative difference"),
]


@pytest.mark.parametrize(("family", "name", "arguments", "why"), REFUSED, ids=[f"{f}-{n}" for f, n, *_ in REFUSED])
def test_what_cannot_grow_says_why(family, name, arguments, why):
    model = patched(family, name, **arguments)
    before = snapshot(model)
    with pytest.raises(ValueError, match=why):
        resformer.grow(model, 3)
    assert_same(snapshot(model), before)


def test_new_layers_start_closed_or_with_zero_output():
    """One zero on the way, never two, or nothing would learn."""
    model = resformer.grow(patched("gpt2", "rezero"), 3)
    top = layers_of(model)[2]
    assert top.resformer.attn.a == 0
    assert torch.equal(top.mlp.c_proj.weight, layers_of(model)[1].mlp.c_proj.weight)
    model = resformer.grow(patched("gpt2", "rezero", init="preserve"), 3)
    top = layers_of(model)[2]
    assert top.resformer.attn.a == 1
    for module in (top.attn.c_proj, top.mlp.c_proj):
        assert not module.weight.any()
        assert not module.bias.any()
    assert torch.equal(top.mlp.c_fc.weight, layers_of(model)[1].mlp.c_fc.weight)


def test_a_factor_that_rounding_hides_is_not_taken_for_zero():
    """Beyond 24 layers layer_scale starts at 1e-6, which bfloat16 does not see beside the stream."""
    model = patched("gpt2", "layer_scale", dtype=torch.bfloat16, layers=1)
    expected = output(model)
    resformer.grow(model, 25)
    assert torch.equal(output(model), expected)
    assert not layers_of(model)[24].mlp.c_proj.weight.any()


def test_generate_with_a_cache():
    given = {"input_ids": batch()["input_ids"], "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for name in ("rezero", "hyper_connections"):
        model = patched("gpt2", name, AutoModelForCausalLM)
        expected = model.generate(**given)
        resformer.grow(model, 4)
        for use_cache in (True, False):
            assert torch.equal(model.generate(**given, use_cache=use_cache), expected)
        assert len(model(**batch()).past_key_values) == 4
        randomize(model, seed=2)
        assert torch.equal(*(model.generate(**given, use_cache=use_cache) for use_cache in (True, False)))


def can_grow(family) -> bool:
    return len(family.stacks) == 1 and family.stacks[0].order is None


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("family", [name for name, one in families().items() if can_grow(one)])
def test_hidden_states_and_attentions(family, before):
    """transformers hangs its hooks on the layers at the first forward."""
    model = patched(family, "rezero", head_for(family))
    if before:
        model(**batch(), output_hidden_states=True)
    resformer.grow(model, 3)
    found = model(**batch(), output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 4
    assert len(found.attentions) == 3


@pytest.mark.parametrize("family", THREE)
def test_gradient_checkpointing_goes_on(family):
    found = []
    for checkpointed in (False, True):
        model = patched(family, "rezero").train()
        if checkpointed:
            checkpoint(model)
        resformer.grow(model, 4)
        assert [layer.gradient_checkpointing for layer in layers_of(model)] == [checkpointed] * 4
        model(**batch(labels=True), use_cache=False).loss.backward()
        found.append(gradients(model))
    for key, gradient in found[0].items():
        assert gradient is None or torch.equal(gradient, found[1][key]), key


def test_the_pattern_of_layers_goes_on():
    model = resformer.grow(patched("modernbert", "rezero"), 5)
    full, sliding = "full_attention", "sliding_attention"
    assert model.config.layer_types == [full, sliding, sliding, full, sliding]
    assert [layer.attention_type for layer in layers_of(model)] == model.config.layer_types
    assert all(getattr(m, "config", model.config) is model.config for m in layers_of(model).modules())
    model = patched("modernbert", "rezero", layers=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="parts outside its layers"):
        resformer.grow(model, 2)
    assert_same(snapshot(model), before)


def test_rates_are_those_of_the_new_depth():
    model = resformer.grow(patched("gpt2", "drop_path", options={"p": 0.8}), 4)
    keeps = [getattr(layer.resformer, site).keep for layer in layers_of(model) for site in ("attn", "ffn")]
    assert keeps == pytest.approx([1 - 0.1 * n for n in range(1, 9)])


def test_dtype_and_flags_stay():
    model = patched("bert", "layer_scale", placement="pre", dtype=torch.bfloat16)
    frozen = [layers_of(model)[0].resformer.attn.a, layers_of(model)[1].output.dense.weight]
    for p in frozen:
        p.requires_grad_(False)
    expected = output(model)
    resformer.grow(model, 3)
    assert torch.equal(output(model), expected)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {id(p) for p in model.parameters() if not p.requires_grad} == {id(p) for p in frozen}


def test_weights_from_another_depth_are_not_moved_by_chance():
    """What growing draws at random shows nowhere, where every weight has a model."""
    grown = []
    for seed in (1, 2):
        model = patched("gpt2", "rezero")
        torch.manual_seed(seed)
        grown.append(resformer.grow(model, 4).state_dict())
    assert all(torch.equal(value, grown[1][key]) for key, value in grown[0].items())


class Edited(Scheme):
    """A scheme whose gain on the host's weights is the same at any depth.

    x ← x + F(x)
    """

    def edits(self):
        return {"up": 3.0}


def test_edits_are_still_undone_exactly(monkeypatch):
    monkeypatch.setitem(base._SCHEMES, "local", Edited)
    host = tiny_host("gpt2")
    model = resformer.unpatch(resformer.grow(resformer.patch(copy.deepcopy(host), "local", init="paper"), 3))
    for key, value in host.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    torch.testing.assert_close(model.h[2].mlp.c_fc.weight, host.h[1].mlp.c_fc.weight)


def test_a_schedule_goes_on_where_it_stands():
    """Each layer of pro_res has a horizon of its own: what is carried over is the step, not how far a layer is."""
    model = resformer.patch(tiny_host("gpt2", layers=3), "pro_res", init="paper", warmup=1000)
    resformer.set_progress(model, 1500)
    expected = output(model)
    resformer.grow(model, 5)
    assert torch.equal(output(model), expected)
    assert progress(model) == 1500
    factors = [float(m.attn.alpha) for m in model.modules() if isinstance(m, Residual)]
    assert factors == pytest.approx([1, 0.75, 0.5, 0.375, 0.3])


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("depth", [2, 1, 0, -3, 3.0, "3", True, None])
def test_depth_has_to_be_larger(depth):
    model = patched("gpt2", "rezero")
    before = snapshot(model)
    with pytest.raises(ValueError, match="more than the 2 layers there are, got"):
        resformer.grow(model, depth)
    assert_same(snapshot(model), before)


def test_models_that_cannot_grow():
    with pytest.raises(ValueError, match=r"not patched; resformer.patch\(model, 'identity'\)"):
        resformer.grow(tiny_host("gpt2"), 3)
    part = resformer.patch(tiny_host("gpt2"), "rezero", layers=[1])
    before = snapshot(part)
    with pytest.raises(ValueError, match=r"in all their layers can grow; not patched: \[0\]"):
        resformer.grow(part, 3)
    assert_same(snapshot(part), before)


def test_a_range_of_all_layers_is_all(tmp_path):
    model = resformer.patch(tiny_host("gpt2", attention="sdpa"), "rezero", layers=range(2))
    resformer.grow(model, 3).save_pretrained(tmp_path)
    assert model.config.resformer["layers"] == [0, 3]
    assert torch.equal(output(resformer.from_pretrained(tmp_path, AutoModel)), output(model))


def test_adapters_come_after():
    model = patched("gpt2", "rezero")
    layers_of(model)[1].mlp.c_fc.adapter = torch.nn.Linear(2, 2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="grow the model first"):
        resformer.grow(model, 3)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("at", ["_new_layers", "make_plan", "_take_over", "attach", "_configure", "mark"])
@pytest.mark.parametrize(("family", "name"), [("bert", "deepnorm"), ("gpt2", "post_ln"), ("gpt2", "ode")])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch, at, family, name):
    model = patched(family, name)
    expected, before = output(model), snapshot(model)
    original, calls = getattr(growing, at), []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("on the way")
        return original(*args, **kwargs)

    monkeypatch.setattr(growing, at, fail)
    with pytest.raises((RuntimeError, ValueError), match=r"on the way|depend on depth"):
        resformer.grow(model, 3)
    assert_same(snapshot(model), before)
    assert torch.equal(output(model), expected)
    resformer.unpatch(model)
    original = tiny_host(family, CLASSIFY).state_dict()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in original.items())


def test_a_model_that_shares_the_configuration_keeps_its_depth():
    config = tiny_config("gpt2", layers=2)
    one, other = (type(tiny_host("gpt2", AutoModelForCausalLM))(config) for _ in range(2))
    resformer.grow(resformer.patch(one, "rezero", init="paper"), 4)
    assert one.config.num_hidden_layers == one.base_model.config.num_hidden_layers == 4
    assert other.config.num_hidden_layers == other.base_model.config.num_hidden_layers == 2
    assert all(layer.attn.config is one.config for layer in one.transformer.h)


def test_grouped_feed_forwards_grow():
    encoder = resformer.build_encoder(depth=2, width=32, vocab_size=40, max_length=16, scheme="rezero", cardinality=4)
    expected = output(encoder.eval())
    resformer.grow(encoder, 4)
    assert torch.equal(output(encoder), expected)
    assert encoder.encoder.layer[3].intermediate.middle.weight.shape[0] == 4
