"""Schemes that look back over depth: how they start, what they keep, and the way to the values of attention."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from reference import slots_of
from torch import nn
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import resformer
from resformer import ResidualStack, families, schemes
from resformer.attention import Routed
from resformer.description import equation
from resformer.schemes import Place
from resformer.testing.hosts import batch, randomize, tiny_host
from resformer.testing.nets import net_of_host

WIDTH = 6
THREE = ["bert", "gpt2", "modernbert"]
LAYERS = {"bert": "encoder.layer", "gpt2": "h", "modernbert": "layers"}
ATTENTION = {"bert": "attention.self", "gpt2": "attn", "modernbert": "attn"}


def made(name: str, init: str = "paper", *, where: dict | None = None, **options):
    known = {"name": "attn", "index": 5, "sites": 8, "layer": 2, "layers": 4, "width": WIDTH, "opens": False}
    known |= {"first": False, "last": True, "closes": False}
    return schemes()[name](Place(**(known | (where or {}))), init=init, **options)


# ------------------------------------------------------------------------------------------------ initial values


def test_initial_values_of_the_papers():
    dlcl = made("dlcl")
    assert dlcl.a.tolist() == pytest.approx([1 / 4] * 4), "the mean of the embedding and three layers"
    assert made("dlcl", where={"opens": True}).open.item() == 1
    assert not made("attn_residual").query.any()
    ends = made("attn_residual", where={"closes": True})
    assert not ends.last_query.any()
    assert made("attn_residual", where={"opens": True, "layer": 0}).query is None
    lstm = made("depth_lstm")
    assert lstm.shift.tolist() == [0.0] * WIDTH + [1.0] * WIDTH + [0.0] * 2 * WIDTH
    assert not lstm.b.any()
    assert lstm.gain.eq(1).all()
    laurel = made("laurel", previous=3)
    assert laurel.w.tolist() == [0, 0]
    columns = [[i % 4 == j for i in range(WIDTH)] for j in range(4)]  # column-orthogonal, with the paper's factor
    torch.testing.assert_close(laurel.A.data, torch.tensor(columns) / math.sqrt(4 * WIDTH))
    assert not laurel.B.any()
    assert laurel.g.tolist() == [1, 1, 1]
    assert made("laurel", rank=0, previous=3).g.tolist() == [0, 0, 0]
    assert made("laurel", previous=9).g.shape == (6,), "no more states than there are"
    for init, values in (("paper", (0.5, 0.5)), ("preserve", (0.0, 1.0))):
        values_of = made("value_residual", init)
        assert (values_of.a.item(), values_of.b.item()) == values


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("static_mix", {"seed": -1}),
        ("static_mix", {"seed": True}),
        ("static_mix", {"seed": 1.0}),
        ("static_mix", {"dilation": 0}),
        ("attn_residual", {"blocks": 0}),
        ("attn_residual", {"blocks": "all"}),
        ("laurel", {"weights": 1}),
        ("laurel", {"rank": -1}),
        ("laurel", {"rank": False}),
        ("laurel", {"rank": WIDTH + 1}),
        ("laurel", {"previous": 1.5}),
        ("laurel", {"weights": False, "rank": 0}),
    ],
)
def test_bad_options_are_refused(name, options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        made(name, **options)


@pytest.mark.parametrize("name", ["dlcl", "static_mix", "depth_lstm"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_what_cannot_keep_a_host_says_so(name, family):
    with pytest.raises(ValueError, match="on any host"):
        resformer.patch(tiny_host(family), name)


def test_formulas_say_what_is_in_force():
    assert made("attn_residual", "preserve").formula().startswith("h = n Σ")
    assert "2 blocks" in made("attn_residual", blocks=2).formula()
    assert made("laurel", weights=False).formula() == "x ← F(x) + x + B A x"
    assert "β (x + Σ_j g_j x_j, j < 2)" in made("laurel", rank=0, previous=2).formula()


# ------------------------------------------------------------------------------------------------ fixed mixtures


def test_static_weights_follow_from_the_seed_alone(tmp_path):
    torch.manual_seed(5)
    model = resformer.patch(tiny_host("bert", layers=3), "static_mix", init="paper", seed=7)
    torch.manual_seed(6)
    weights = [layer.resformer.ffn.a for layer in model.encoder.layer]
    assert [len(row) for row in weights] == [2, 3, 4]
    assert all(math.isclose(sum(row), 1) and min(row) > 0 for row in weights)
    again = resformer.patch(tiny_host("bert", layers=3), "static_mix", init="paper", seed=7)
    other = resformer.patch(tiny_host("bert", layers=3), "static_mix", init="paper", seed=8)
    assert weights == [layer.resformer.ffn.a for layer in again.encoder.layer]
    assert weights != [layer.resformer.ffn.a for layer in other.encoder.layer]
    assert not any("resformer" in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = resformer.from_pretrained(tmp_path, AutoModel, attn_implementation="eager")
    assert weights == [layer.resformer.ffn.a for layer in loaded.encoder.layer]
    torch.testing.assert_close(loaded(**batch()).last_hidden_state, model(**batch()).last_hidden_state)


# ------------------------------------------------------------------------------------------------ attention residuals


def sources(scheme_options: dict, layers: int = 4) -> list[int]:
    """How many sources each sublayer of a stack reads."""
    seen = []
    stack = ResidualStack([torch.sin] * 2 * layers, WIDTH, "attn_residual", layer_size=2, **scheme_options)
    for one in stack.schemes:
        one.read = lambda s, read=one.read: seen.append(len(s)) or read(s)
    stack(torch.randn(2, WIDTH))
    return seen


def test_blocks_are_summed_and_begun_anew():
    assert sources({}) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sources({"blocks": 2}) == [1, 2, 2, 2, 2, 3, 3, 3], "at a block's start there is no partial sum"
    assert sources({"blocks": 4}) == sources({"blocks": 9}) == [1, 2, 2, 3, 3, 4, 4, 5]
    assert sources({"blocks": 1}) == [1] + [2] * 7


@pytest.mark.parametrize("options", [{}, {"blocks": 2}])
def test_sources_are_what_branches_gave_and_not_states(options):
    """Their sum is the state of the host; with cumulative states it would count early branches many times."""
    host, model = (tiny_host("gpt2", layers=3) for _ in range(2))
    resformer.patch(model, "attn_residual", **options)
    found = []
    model.h[-1].resformer.ffn.finish = lambda s, norm: found.append(s) or norm(sum(s))
    model(**batch())
    states = []
    host.ln_f.register_forward_pre_hook(lambda module, given: states.append(given[0]))
    host(**batch())
    assert len(found[0]) == (3 if options else 7)
    torch.testing.assert_close(sum(found[0]), states[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("init", ["paper", "preserve"])
def test_the_first_sublayer_sees_the_embedding_itself(init):
    """ModernBERT's has no norm that would undo a factor."""
    model = resformer.patch(tiny_host("modernbert"), "attn_residual", init=init)
    randomize(model)
    seen = []
    model.layers[0].attn.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(**batch())
    assert torch.equal(seen[0], tiny_host("modernbert").embeddings(batch()["input_ids"]))


# ------------------------------------------------------------------------------------------------ laurel


def test_the_identity_stays():
    """Where a branch gives nothing, x goes on with what the low-rank map adds to it."""
    stack = ResidualStack([torch.zeros_like], WIDTH, "laurel", placement="none").double()
    randomize(stack)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(stack(x), x)
    (one,) = stack.schemes
    with torch.no_grad():
        one.B.copy_(torch.randn_like(one.B))
    torch.testing.assert_close(stack(x), x + x @ one.A.T @ one.B.T)
    with torch.no_grad():
        one.w.copy_(torch.tensor([0.0, math.log(3.0)]))
    torch.testing.assert_close(stack(x), 1.5 * (x + x @ one.A.T @ one.B.T))


# ------------------------------------------------------------------------------------------------ value residual


def with_values(family: str, auto=AutoModelForSequenceClassification, **changes):
    model = resformer.patch(tiny_host(family, auto, **changes), "value_residual", init="paper")
    randomize(model)
    return model


def attention_modules(model) -> list[nn.Module]:
    base = model.base_model
    family = next(name for name in THREE if name in type(base).__module__.split("."))
    return [layer.get_submodule(ATTENTION[family]) for layer in base.get_submodule(LAYERS[family])]


@pytest.mark.parametrize("family", THREE)
def test_attention_written_out_is_the_hosts(family):
    """Else the reference of the values would prove little."""
    model, given = tiny_host(family), batch(padded=True)
    patched = resformer.patch(tiny_host(family), "identity")
    kind = families()[family].kind
    net, x = net_of_host(family, model, patched, given, slots_of("identity", "preserve", kind))
    with torch.no_grad():
        site = net.layers[1][0]
        found, expected = site.f.with_values(x, lambda v: v), site.f(x)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", THREE)
def test_implementations_of_attention(family):
    """The model's configuration stays its own, and both implementations and the change between them work."""
    given = batch(padded=True)
    eager, sdpa = (with_values(family, attention=attention) for attention in ("eager", "sdpa"))
    expected = eager(**given).logits
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if family == "modernbert" else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(sdpa(**given).logits, expected, **tolerance)
    assert eager.config._attn_implementation == "eager"
    sdpa.set_attn_implementation("eager")
    assert torch.equal(sdpa(**given).logits, expected)
    seen = eager(**given, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in seen] == [(2, 2, 7, 7)] * 2
    eager.set_attn_implementation("sdpa")
    torch.testing.assert_close(eager(**given).logits, expected, **tolerance)


def test_a_function_of_ones_own_finds_the_hosts_configuration(monkeypatch):
    """As flash attention reads its own name from the module that it is given."""
    names = []

    def look(module, *args, **kwargs):
        names.append((module.config._attn_implementation, module.is_causal, module.training))
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "look", look)
    model = with_values("gpt2")
    expected = model(**batch()).logits
    model.config._attn_implementation = "look"
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-10, atol=1e-10)
    assert names == [("look", True, False)] * 2


@pytest.mark.parametrize("family", THREE)
def test_configurations_are_put_back(family):
    model = tiny_host(family)
    before = [module.config for module in attention_modules(model)]
    resformer.patch(model, "value_residual")
    for module, config in zip(attention_modules(model), before, strict=True):
        assert isinstance(module.config, Routed)
        assert module.config.hidden_size == config.hidden_size
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for module in attention_modules(other):
            assert module.config.config is other.config, "a copy follows its own configuration"
    resformer.unpatch(model)
    assert all(m.config is config for m, config in zip(attention_modules(model), before, strict=True))
    resformer.patch(model, "highway")
    assert not any(isinstance(module.config, Routed) for module in attention_modules(model))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_save_load_and_generate(tmp_path, attention):
    model = with_values("gpt2", AutoModelForCausalLM, attention=attention, layers=3)
    given = {"input_ids": batch()["input_ids"], "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**given, use_cache=False)
    assert torch.equal(model.generate(**given, use_cache=True), expected)
    assert torch.equal(model.generate(**given, cache_implementation="static", disable_compile=True), expected)
    model.save_pretrained(tmp_path)
    loaded = resformer.from_pretrained(tmp_path, AutoModelForCausalLM, attn_implementation=attention)
    torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_cross_attention_keeps_its_own_values(family):
    changes = {"is_decoder": True, "add_cross_attention": True}
    host, model = (tiny_host(family, AutoModelForCausalLM, **changes) for _ in range(2))
    resformer.patch(model, "value_residual")
    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = batch() | {"encoder_hidden_states": states, "use_cache": True}
    expected, found = host(**given), model(**given)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)
    step = {"input_ids": torch.tensor([[4], [5]]), "encoder_hidden_states": states}
    again = [one(**step, past_key_values=o.past_key_values) for one, o in ((host, expected), (model, found))]
    torch.testing.assert_close(again[1].logits, again[0].logits, rtol=1e-10, atol=1e-10)


def test_the_first_patched_layer_gives_the_values():
    host, model = (tiny_host("gpt2", layers=3) for _ in range(2))
    resformer.patch(model, "value_residual", init="paper", layers=[1, 2])
    assert [hasattr(layer, "resformer") for layer in model.h] == [False, True, True]
    assert not list(model.h[1].resformer.parameters())
    with torch.no_grad():
        model.h[2].resformer.attn.a.zero_()
        model.h[2].resformer.attn.b.fill_(1)
    torch.testing.assert_close(model(**batch()).last_hidden_state, host(**batch()).last_hidden_state)


def test_gpt2_with_upcast_attention():
    make = {"reorder_and_upcast_attn": True, "dtype": torch.float32}
    host, model = (tiny_host("gpt2", **make) for _ in range(2))
    resformer.patch(model, "value_residual")
    assert torch.equal(model(**batch()).last_hidden_state, host(**batch()).last_hidden_state)


def test_attention_that_goes_another_way_is_noticed():
    model = with_values("bert")
    module = attention_modules(model)[1]
    module.config = module.config.config
    with pytest.raises(RuntimeError, match="attended without asking for its values"):
        model(**batch())


def test_values_of_other_shapes_are_refused():
    scheme = made("value_residual")
    with pytest.raises(ValueError, match="equal values in all layers"):
        scheme.same(torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 4))


def test_hosts_whose_attention_cannot_be_reached_are_refused(monkeypatch):
    from resformer.hosts import family as module

    bert, model = families()["bert"], tiny_host("bert")
    first, *others = bert.stacks[0].sites
    closed = replace(bert, stacks=(replace(bert.stacks[0], sites=(replace(first, extra=False), *others)),))
    monkeypatch.setitem(module._FAMILIES, "bert", closed)
    with pytest.raises(ValueError, match=r"values of self-attention.*'bert'"):
        resformer.patch(model, "value_residual")
    assert not hasattr(model.encoder.layer[0], "resformer")
    monkeypatch.undo()
    attention_modules(model)[1].config = None
    with pytest.raises(ValueError, match=r"BertSelfAttention does not take its attention"):
        resformer.attention.route(attention_modules(model)[1])


def test_stacks_refuse_it():
    with pytest.raises(ValueError, match="acts inside the sublayers"):
        ResidualStack([nn.Linear(4, 4)], 4, "value_residual")


@pytest.mark.parametrize(("family", "attention"), [("bert", "eager"), ("gpt2", "sdpa"), ("modernbert", "sdpa")])
def test_value_residual_compiles_to_one_graph(family, attention):
    torch._dynamo.reset()
    model = with_values(family, dtype=torch.float32, attention=attention)
    run = torch.compile(lambda **given: model(**given).logits, fullgraph=True, backend="aot_eager")
    given = batch() | {"use_cache": False}
    torch.testing.assert_close(run(**given), model(**given).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("host", "scheme", "options", "layer"),
    [
        ("bert", "denseformer", {}, "x ← N(x + F(x))"),
        ("bert", "denseformer", {"placement": "pre"}, "x ← x + F(N(x))"),
        ("bert", "static_mix", {}, "x ← N(x + F(x))"),
        ("bert", "dlcl", {}, "x ← x + F(N(x))"),
        ("gpt2", "denseformer", {}, "x ← x + F(N(x))"),
    ],
)
def test_the_equation_of_a_mixture_says_what_the_layers_do_with_their_norms(host, scheme, options, layer):
    model = resformer.patch(tiny_host(host, layers=2), scheme, init="paper", **options)
    head, _, rule = equation(model).partition("; in the layers ")
    assert rule == layer
    assert head.startswith("x ← Σ_")
