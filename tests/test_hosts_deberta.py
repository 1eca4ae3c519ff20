"""DeBERTa: layers that return tuples, hidden states gathered by hand, masks of 0 and 1, a convolution in between."""

import pytest
import torch
from reference import INSIDE, REFERENCES, slots_of
from reference.hosts import Call
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import resformer
from resformer import families
from resformer.diagnostics.gradient_flow import gradient_norms
from resformer.testing import mechanics
from resformer.testing.contract import check_learns, check_refuses, check_unpatch
from resformer.testing.hosts import HEADS, WIDTH, batch, checkpoint, exact, gradients, randomize, tiny_host
from resformer.testing.nets import Net, Site, nothing

V3 = {  # as DeBERTa-v3 has it: distances in buckets, their embeddings normed, keys shared, none on the input
    "relative_attention": True,
    "position_buckets": 4,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
CONV = V3 | {"conv_kernel_size": 3, "conv_act": "gelu"}  # as DeBERTa-v2-xlarge
KINDS = {
    "v3": ("deberta_v2", V3),
    "v2-conv": ("deberta_v2", CONV),
    "v2-plain": ("deberta_v2", {"relative_attention": False, "pos_att_type": None, "type_vocab_size": 2}),
    "v2-same-width": ("deberta_v2", V3 | {"embedding_size": WIDTH, "share_att_key": False}),
    "v1": ("deberta", {"pos_att_type": "p2c|c2p", "max_relative_positions": 5}),
    "v1-talking": ("deberta", {"talking_head": True, "pos_att_type": "c2p"}),
}
FEW = ["highway", "se_gate", "denseformer", "mhc"]
HEADS_ON_TOP = [
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
]


def made(kind, *args, **changes):
    family, own = KINDS[kind]
    return tiny_host(family, *args, **own | changes)


# ------------------------------------------------------------------------------------------------ the identity


@pytest.mark.parametrize("auto", HEADS_ON_TOP)
@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_the_host_bit_for_bit(kind, auto):
    """Outputs, hidden states and attentions, as a dictionary and as a tuple; in training the gradients."""
    host, patched = (made(kind, auto, dropout=0.2, dtype=torch.float32) for _ in range(2))
    resformer.patch(patched, "identity")
    given = batch(padded=True) | {"output_hidden_states": True, "output_attentions": True}
    for form in (True, False):
        expected, found = host(**given, return_dict=form), patched(**given, return_dict=form)
        assert type(found) is type(expected)
        pairs = list(zip(flat(found), flat(expected), strict=True))
        assert len(pairs) >= 1 + 3 + 2
        assert all(torch.equal(one, other) for one, other in pairs)
    for model in (host, patched):
        torch.manual_seed(0)
        sum(part.square().sum() for part in flat(model.train()(**batch(padded=True)))).backward()
    for name, gradient in gradients(host).items():
        other = gradients(patched)[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


def flat(output):
    values = output if isinstance(output, tuple) else output.to_tuple()
    return [one for value in values for one in (value if isinstance(value, tuple) else (value,))]


# ------------------------------------------------------------------------------------------------ the update


def net_of_deberta(twin, patched, given, slots, name):
    """The sublayers of an unpatched twin with the same weights, the scheme's parameters beside them."""
    weights = patched.state_dict()
    twin.load_state_dict({key: weights[key] for key in twin.state_dict()})
    real, encoder = given["attention_mask"].bool(), twin.encoder
    points, rule_at = INSIDE.get(name, ("", None))
    for layer, theirs in zip(encoder.layer, patched.encoder.layer, strict=True):
        for site in families()[twin.config.model_type.replace("-", "_")].stacks[0].sites:
            for point in set(points.split()) & set(site.points):
                linear, path = layer.get_submodule(site.points[point].path), site.points[point].path
                call = Call(rule_at(dict(getattr(theirs.resformer, site.name).named_parameters()), point), 0, 1)
                both = (call, linear) if point in ("o", "down") else (linear, call)
                layer.set_submodule(path, nn.Sequential(*both))
    x = twin.embeddings(input_ids=given["input_ids"], mask=given["attention_mask"])
    pairs = (real[:, None, :, None] & real[:, None, None, :]).long()
    about = {"rel_embeddings": encoder.get_rel_embedding(), "relative_pos": encoder.get_rel_pos(x)}

    def attention(layer):
        inner, out = layer.attention.self, layer.attention.output
        return lambda x: out.dense(inner(x, pairs, **about)[0])

    def feed_forward(layer):
        return lambda x: layer.output.dense(layer.intermediate(x))

    layers, final = [], nothing
    for number, (layer, theirs) in enumerate(zip(encoder.layer, patched.encoder.layer, strict=True)):
        row = []
        own = theirs.resformer
        for name, make, norm in (
            ("attn", attention, layer.attention.output.LayerNorm),
            ("ffn", feed_forward, layer.output.LayerNorm),
        ):
            act = slots(number, len(encoder.layer), name)
            if "final" in act:
                final = patched.encoder.layer[-1].resformer.final_norm
            act = act & {"pre", "out", "post"}
            native = "post" if "post" in act else min(act, default="")
            norms = {slot: norm if slot == native else getattr(own, f"{name}_{slot}_norm") for slot in act}
            row.append(Site(make(layer), getattr(own, name).state_dict(), **norms))
        layers.append(row)
    return Net(layers, final, real=real), x


@pytest.mark.parametrize("name", [*FEW, "gru_gate", "attn_residual", "reversible", "mix_ln", "sub_ln", "hybrid_norm"])
@pytest.mark.parametrize("kind", ["v3", "v2-plain", "v1"])
def test_update(kind, name):
    if (kind, name) == ("v1", "hybrid_norm"):
        pytest.skip("refused")
    given = batch(padded=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        patched = resformer.patch(made(kind, layers=4), name, init="paper")
    randomize(patched)
    with torch.no_grad(), exact():  # the norms of v1 compute in single precision
        net, x = net_of_deberta(made(kind, layers=4), patched, given, slots_of(name, "paper", "post"), name)
        found, expected = patched(**given).last_hidden_state, REFERENCES[name](net, x)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", ["v3", "v1"])
def test_a_text_has_the_same_states_alone_as_padded_in_a_batch(kind, name):
    model = resformer.patch(made(kind), name, init="paper")
    randomize(model)
    given = batch(padded=True)
    with exact():
        alone = model(given["input_ids"][1:, :-2]).last_hidden_state
        together = model(**given).last_hidden_state[1:, :-2]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ what goes on working


@pytest.mark.parametrize("name", ["highway", "denseformer", "mhc", "ode"])
@pytest.mark.parametrize("family", ["deberta_v2", "deberta"])
def test_mechanics(family, name):
    """Gradient checkpointing, in both modes, among them."""
    for title, check in mechanics.MECHANICS.items():
        if (family, title) != ("deberta", "half_precision"):  # under autocast its mask overflows, unpatched as well
            check(family, name, {})
    check_unpatch(family, name, {}, "paper")
    check_learns(family, name, {}, "paper")


@pytest.mark.parametrize("kind", ["v3", "v1"])
def test_hidden_states_are_states_and_not_streams(kind):
    model = resformer.patch(made(kind, layers=3), "denseformer")
    randomize(model)
    for form in (True, False):
        out = model(**batch(), output_hidden_states=True, return_dict=form)
        states = out.hidden_states if form else out[1]
        assert [type(state) for state in states] == [torch.Tensor] * 4
        assert [tuple(state.shape) for state in states] == [(2, 7, WIDTH)] * 4
        assert torch.equal(states[-1], out[0])


def test_one_graph():
    mechanics.check_compile("deberta_v2", "denseformer", {})
    mechanics.check_export("deberta_v2", "denseformer", {})


def test_checkpointing_of_a_history_with_distances():
    """In the mode that the host can have: it runs backward twice through the norm of its distances in the other."""
    plain = None
    for on in (False, True):
        model = made("v3", AutoModelForSequenceClassification, layers=3)
        randomize(resformer.patch(model, "denseformer").train())
        if on:
            checkpoint(model, {"use_reentrant": False})
        model(**batch(labels=True)).loss.backward()
        plain = plain or gradients(model)
    assert any("resformer" in name for name in plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["v3", "v1"])
def test_growing_and_folding(kind):
    model = resformer.patch(made(kind), "rezero", init="paper")
    randomize(model)
    given = batch(padded=True)
    expected = model(**given).last_hidden_state
    assert torch.equal(resformer.grow(model, 4)(**given, output_hidden_states=True).hidden_states[4], expected)
    model = resformer.patch(made(kind), "layer_scale")
    randomize(model)
    with exact():
        expected = model(**given).last_hidden_state
        found = resformer.fold(model)(**given).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert made(kind).state_dict().keys() == model.state_dict().keys()


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("family", ["deberta_v2", "deberta"])
def test_values_are_out_of_reach(family):
    check_refuses(family, "value_residual", {}, "paper")
    with pytest.raises(ValueError, match=f"acts on the values of self-attention, and family '{family}' names no site"):
        resformer.patch(tiny_host(family), "value_residual")


def test_queries_of_the_first_version_get_their_bias_later():
    check_refuses("deberta", "hybrid_norm", {}, "paper")
    check_refuses("deberta", "fixup", {}, "paper")
    with pytest.raises(ValueError, match="needs the inside points 'q', 'k' and 'v'"):
        resformer.patch(tiny_host("deberta"), "hybrid_norm", init="paper")


def test_gradient_flow_is_refused():
    model = resformer.patch(tiny_host("deberta_v2", AutoModelForSequenceClassification), "highway")
    with pytest.raises(ValueError, match="whose layers return their states alone"):
        gradient_norms(model, batch(labels=True))


# ------------------------------------------------------------------------------------------------ the convolution


@pytest.mark.parametrize("name", ["highway", "layer_scale", "se_gate", "frac_connections", "rezero"])
def test_schemes_of_one_sublayer_stand_beside_the_convolution(name):
    host, patched = (made("v2-conv", layers=3) for _ in range(2))
    resformer.patch(patched, name)
    given = batch(padded=True)
    expected = host(**given).last_hidden_state
    torch.testing.assert_close(patched(**given).last_hidden_state, expected, rtol=1e-10, atol=1e-10)
    assert (made("v3", layers=3)(**given).last_hidden_state - expected).abs().max() > 0.1, "the convolution matters"


@pytest.mark.parametrize("name", ["denseformer", "hyper_connections", "x0_mix"])
def test_a_stream_does_not_pass_through_the_convolution(name):
    host = made("v2-conv", layers=4)
    keys = host.state_dict().keys()
    said = (
        rf"'{name}' carries a stream.*DebertaV2Model 'encoder.conv' acts between layers 0 and 1.*layers=range\(1, 4\)"
    )
    for layers in (None, range(2)):
        with pytest.raises(ValueError, match=said):
            resformer.patch(host, name, layers=layers)
    assert host.state_dict().keys() == keys
    expected = host(**batch(padded=True)).last_hidden_state
    for layers in (range(1, 4), range(1)):
        resformer.patch(host, name, layers=layers)
        found = host(**batch(padded=True)).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        resformer.unpatch(host)
    assert torch.equal(host(**batch(padded=True)).last_hidden_state, expected)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("kind", ["v3", "v1"])
def test_weights_are_scaled_where_the_paper_says(kind):
    """deepnorm: v, o, up and down by (8 L)^(-1/4); of the fused projection of v1 the third part of each head."""
    host, patched = made(kind), resformer.patch(made(kind), "deepnorm", init="paper")
    factor = (8 * 2) ** -0.25
    for before, after in zip(host.encoder.layer, patched.encoder.layer, strict=True):
        roles = ["attention.output.dense", "intermediate.dense", "output.dense"]
        for name, weight in before.named_parameters():
            gain = torch.ones_like(weight)
            if name in [f"{role}.weight" for role in [*roles, "attention.self.value_proj"]]:
                gain *= factor
            elif name == "attention.self.in_proj.weight":
                gain.unflatten(0, (HEADS, 3, -1))[:, 2] *= factor
            torch.testing.assert_close(after.get_parameter(name), gain * weight, rtol=1e-12, atol=0)
    resformer.unpatch(patched)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), patched.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["v3", "v2-plain", "v1"])
def test_embeddings_are_scaled_that_there_are(kind):
    """t_fixup: (9 L)^(-1/4) of each table; v3 has words alone."""
    host, patched = made(kind), resformer.patch(made(kind), "t_fixup", init="paper")
    tables = [name for name, _ in host.named_parameters() if name.startswith("embeddings") and "_embeddings" in name]
    assert len(tables) == {"v3": 1, "v2-plain": 3, "v1": 2}[kind]
    ratios = {float((patched.get_parameter(name) / host.get_parameter(name)).detach().mean()) for name in tables}
    assert max(ratios) - min(ratios) < 1e-12
    assert 0 < max(ratios) < 1
    resformer.unpatch(patched)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), patched.parameters(), strict=True))
