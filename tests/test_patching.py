"""Patching in place: what must go on working around it, how it is undone, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from reference import VARIANTS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel, LongT5Config

import resformer
from resformer import families, patching, schemes
from resformer.host import find_host
from resformer.layer import Residual
from resformer.testing.hosts import batch, batch_for, can_preserve, randomize, stands, tiny_host

THREE = ["bert", "gpt2", "modernbert"]
NAMES = list(schemes())
CLASSIFY = AutoModelForSequenceClassification
# One of each kind: one stream, moved norms, moved final norm, scaled weights, history, streams, inside, block.
KINDS = {"rezero", "post_ln", "resi_dual", "deepnorm", "denseformer", "mhc", "sub_ln", "hybrid_norm", "ode"}


def patched_host(family: str, name: str, auto=CLASSIFY, *, options=None, **changes):
    """A host patched with trained-like parameters."""
    if not stands(name, family):
        pytest.skip("not for this stack")
    torch.manual_seed(0)  # some schemes draw their start
    model = resformer.patch(tiny_host(family, auto, **changes), name, init="paper", **(options or {}))
    randomize(model)
    return model


def snapshot(model) -> dict:
    """All that patching could change."""
    return {
        "classes": [type(module) for module in model.modules()],
        "keys": list(model.state_dict()),
        "weights": [value.clone() for value in model.state_dict().values()],
        "trained": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "eps": [module.eps for module in model.modules() if hasattr(module, "eps")],
    }


def assert_same(found: dict, expected: dict) -> None:
    for key, value in expected.items():
        if key == "weights":
            assert all(torch.equal(f, e) for f, e in zip(found[key], value, strict=True))
        else:
            assert found[key] == value, key


# ------------------------------------------------------------------------------------------------ undone


@pytest.mark.parametrize("init", ["paper", "preserve"])
@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("name", NAMES)
def test_unpatch_gives_the_host_back(family, name, init):
    host = tiny_host(family)
    if not stands(name, family) or (family != "bert" and name not in KINDS):
        pytest.skip("refused, or see the contract")
    host.train()
    before, expected = snapshot(host), host.eval()(**batch_for(family)).last_hidden_state
    host.train()
    if init == "preserve" and not can_preserve(name, {}, families()[family].kind):
        with pytest.raises(ValueError, match="init='paper'"):
            resformer.patch(host, name, init=init)
    else:
        resformer.patch(host, name, init=init)
        assert any(isinstance(module, Residual) for module in host.modules())
        host.train()(**batch_for(family)).last_hidden_state.sum().backward()
        resformer.unpatch(host)
    assert_same(snapshot(host), before)
    assert torch.equal(host.eval()(**batch_for(family)).last_hidden_state, expected)


def test_trained_weights_survive_unpatch():
    model = resformer.patch(tiny_host("bert"), "deepnorm")
    weight = model.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.add_(1.0)
    alpha, trained = 4**0.25, weight.detach().clone()
    resformer.unpatch(model)
    torch.testing.assert_close(model.encoder.layer[0].output.dense.weight, trained / alpha)


def test_frozen_norms_stay_frozen():
    model = tiny_host("bert")
    norm = model.encoder.layer[0].output.LayerNorm
    norm.weight.requires_grad_(False)
    resformer.patch(model, "rezero", init="paper")
    assert not norm.bias.requires_grad
    resformer.unpatch(model)
    assert not norm.weight.requires_grad
    assert norm.bias.requires_grad


@pytest.mark.parametrize("family", ["bert", "gpt2"])  # its norms; its final norm
def test_what_is_frozen_while_patched_stays_frozen(family):
    model = resformer.patch(tiny_host(family), "post_ln" if family == "gpt2" else "rezero", init="paper")
    resformer.unpatch(model.requires_grad_(False))
    assert not any(p.requires_grad for p in model.parameters())
    norms = [p for name, p in model.named_parameters() if "ln_" in name or "LayerNorm" in name]
    for p in norms:
        p.requires_grad_(True)
    resformer.unpatch(resformer.patch(model, "rezero", init="paper"))
    assert all(p.requires_grad for p in norms), "norms that alone were trained are trained again"


# ------------------------------------------------------------------------------------------------ mechanics


RANDOM = ("drop_path", "dropout_shortcut")


@pytest.mark.parametrize("name", [RANDOM[0], pytest.param(RANDOM[1], marks=pytest.mark.slow)])
def test_random_schemes_compile(name):
    """Random masks differ between the two ways; in evaluation they are the same function."""
    torch._dynamo.reset()
    model = patched_host("bert", name, options={"p": 0.5})
    run = torch.compile(lambda **kw: model(**kw).logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(**batch()), model(**batch()).logits, rtol=1e-12, atol=1e-12)
    model.train()
    assert run(**batch()).isfinite().all()


def test_solvers_refuse_a_cache():
    model = resformer.patch(tiny_host("gpt2", AutoModelForCausalLM), "ode", init="paper")
    assert model(**batch()).past_key_values is None
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**batch(), use_cache=True)
    resformer.unpatch(model)
    assert model(**batch()).past_key_values is not None


@pytest.mark.parametrize("family", THREE)
def test_a_range_of_layers(family):
    for layers, numbers in ((range(1, 3), {1, 2}), (slice(0, 2), {0, 1}), ([2], {2}), (slice(-1, None), {2})):
        model = resformer.patch(tiny_host(family, layers=3), "hyper_connections", layers=layers)
        found = [n for n, layer in enumerate(find_host(model).layers) if hasattr(layer, "resformer")]
        assert set(found) == numbers
        expected = tiny_host(family, layers=3)(**batch()).last_hidden_state
        torch.testing.assert_close(model(**batch()).last_hidden_state, expected, rtol=1e-10, atol=1e-10)


def test_models_of_one_class_do_not_mix():
    """The subclass of a layer is shared; all that a scheme is must lie on the instance."""
    one, other = patched_host("bert", "highway"), patched_host("bert", "hyper_connections")
    outputs = [copy.deepcopy(model)(**batch()).logits for model in (one, other)]
    assert type(one.bert.encoder.layer[0]) is type(other.bert.encoder.layer[0])
    resformer.unpatch(patched_host("bert", "ode"))
    assert torch.equal(one(**batch()).logits, outputs[0])
    assert torch.equal(other(**batch()).logits, outputs[1])


@pytest.mark.parametrize("placement", ["native", "pre", "post", "sandwich", "none"])
@pytest.mark.parametrize("family", THREE)
def test_placement_moves_the_norms_of_the_host(family, placement):
    model = resformer.patch(tiny_host(family), "scaled", init="paper", placement=placement)
    own = [module for module in model.modules() if isinstance(module, Residual)]
    kind = families()[family].kind
    expected = {"pre", "out"} if placement == "sandwich" else {kind if placement == "native" else placement} - {"none"}
    assert all(set(acts) == expected for residual in own for acts in residual.acts.values())
    model(**batch()).last_hidden_state.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad or "pooler" in name, f"{name} is unused"


def test_describe_says_what_is_in_force():
    host = tiny_host("bert", CLASSIFY)
    assert "none" in str(resformer.describe(host))
    text = str(resformer.describe(resformer.patch(host, "highway")))
    for part in ("x ← N(2 (T ⊙ F(x) + (1 - T) ⊙ x))", "bit-equal", "attention.output.LayerNorm", "arXiv:1505.00387"):
        assert part in text
    assert f"{2 * 2 * (16 * 16 + 16):,} of" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "<table>" in resformer.describe(host)._repr_html_()
    gpt = str(resformer.describe(resformer.patch(tiny_host("gpt2"), "layer_scale")))
    assert "x ← x + a ⊙ F(N(x))" in gpt
    post = str(resformer.describe(resformer.patch(tiny_host("gpt2"), "post_ln", init="paper")))
    assert "ln_f, passed over" in post
    assert "does not keep the host" in " ".join(post.split())


# ------------------------------------------------------------------------------------------------ not verified


@pytest.mark.parametrize("init", ["paper", "preserve"])
@pytest.mark.parametrize("name", ["identity", *sorted(KINDS)])
def test_a_model_that_is_not_verified_is_the_same(name, init):
    if init == "preserve" and not can_preserve(name, {}, "post"):
        pytest.skip("refused")
    torch.manual_seed(0)
    verified = resformer.patch(tiny_host("bert"), name, init=init)
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    model = resformer.patch(tiny_host("bert"), name, init=init, verify=False)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same(snapshot(model), snapshot(verified))
    assert torch.equal(model(**batch()).last_hidden_state, verified(**batch()).last_hidden_state)
    assert_same(snapshot(resformer.unpatch(model)), snapshot(tiny_host("bert")))


def test_a_model_that_is_not_verified_is_not_run():
    model = tiny_host("bert")

    def fail(*args):
        raise RuntimeError("it was run")

    hook = model.encoder.layer[0].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="it was run"):
        resformer.patch(model, "rezero")
    resformer.patch(model, "rezero", verify=False)
    hook.remove()
    assert "not measured" in str(resformer.describe(model))
    resformer.patch(resformer.unpatch(model), "rezero")
    assert "not measured" not in str(resformer.describe(model))


# ------------------------------------------------------------------------------------------------ refused


def wrapped(model):
    return torch.nn.DataParallel(model)


REFUSED = [
    ("rezro", {}, "Did you mean 'rezero'"),
    ("highway", {"bais": 0}, "Did you mean 'bias'"),
    ("highway", {"bias": float("nan")}, "finite"),
    ("highway", {"init": "papr"}, "Did you mean 'paper'"),
    ("highway", {"placement": "prae"}, "Did you mean 'pre'"),
    ("highway", {"placement": "pre"}, "moves the norms"),
    ("post_ln", {"placement": "pre"}, "fixes where the norms act"),
    ("pre_ln", {}, "cannot keep"),
    ("plain", {}, "on any host"),
    ("highway", {"layers": [0, 2]}, "contiguous"),
    ("highway", {"layers": range(2, 5)}, "within 0 to 2"),
    ("highway", {"layers": []}, "contiguous"),
    ("highway", {"layers": 1}, "contiguous"),
    ("highway", {"layers": "all"}, "contiguous"),
    ("highway", {"layers": [0.0, 1.0]}, "contiguous"),
    (["highway"], {}, "unknown scheme"),
    ("ode", {"method": ["rk2"]}, "unknown method"),
    ("ode", {"init": "paper", "placement": "pre"}, "whole layers"),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED, ids=[f"{n}-{a}" for n, a, _ in REFUSED])
def test_bad_input_is_refused_and_changes_nothing(name, arguments, message, verify):
    model = tiny_host("bert", layers=3)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        resformer.patch(model, name, verify=verify, **arguments)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("verify", [True, False])
def test_models_that_cannot_be_patched(verify):
    with pytest.raises(ValueError, match="before wrapping"):
        resformer.patch(torch.nn.DataParallel(tiny_host("bert")), "rezero", verify=verify)
    with pytest.raises(ValueError, match="before wrapping"):
        resformer.patch(torch.compile(tiny_host("bert")), "rezero", verify=verify)
    with pytest.raises(ValueError, match="ResidualStack"):
        resformer.patch(torch.nn.Linear(2, 2), "rezero", verify=verify)
    from transformers import LongT5EncoderModel

    other = LongT5EncoderModel(LongT5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, vocab_size=20))
    with pytest.raises(ValueError, match=r"LongT5EncoderModel.*nearest by name: .*t5.*register_family"):
        resformer.patch(other, "rezero", verify=verify)
    with torch.device("meta"):
        empty = BertModel(BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=20))
    with pytest.raises(ValueError, match="no weights"):
        resformer.patch(empty, "rezero", verify=verify)
    assert not any(isinstance(m, Residual) for m in empty.modules())


@pytest.mark.parametrize("verify", [True, False])
def test_a_subclass_of_a_known_layer_is_not_guessed(verify):
    model = tiny_host("bert")

    class Other(type(model.encoder.layer[0])):
        pass

    model.encoder.layer[1].__class__ = Other
    with pytest.raises(ValueError, match="exact class"):
        resformer.patch(model, "rezero", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_forward_on_the_object_is_refused(verify):
    """As accelerate's hooks set one: patching would change nothing, and say that all is well."""
    model = tiny_host("bert")
    layer = model.encoder.layer[1]
    layer.forward = layer.forward
    with pytest.raises(ValueError, match="patch the model first"):
        resformer.patch(model, "plain", init="paper", verify=verify)


def with_sites(family, *sites):
    return replace(family, stacks=(replace(family.stacks[0], sites=sites),))


@pytest.mark.parametrize("verify", [True, False])
def test_a_sublayer_that_the_family_does_not_know_is_refused(monkeypatch, verify):
    from resformer.hosts import family as module

    bert = families()["bert"]
    monkeypatch.setitem(module._FAMILIES, "bert", with_sites(bert, bert.stacks[0].sites[0], bert.stacks[0].sites[2]))
    resformer.patch(tiny_host("bert"), "rezero")
    with pytest.raises(ValueError, match="says nothing of 'crossattention'"):
        resformer.patch(tiny_host("bert", is_decoder=True, add_cross_attention=True), "rezero", verify=verify)


@pytest.mark.parametrize(("name", "init"), [("deepnorm", "paper"), ("deepnorm", "preserve")])
def test_projections_without_a_name_cannot_be_scaled(monkeypatch, name, init):
    from resformer.hosts import family as module

    bert = families()["bert"]
    nameless = with_sites(bert, *(replace(site, points={}) for site in bert.stacks[0].sites))
    monkeypatch.setitem(module._FAMILIES, "bert", nameless)
    model = tiny_host("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not name; add them to the `points`"):
        resformer.patch(model, name, init=init)
    assert_same(snapshot(model), before)
    resformer.patch(model, "highway")


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_any_chunk_size_can_be_patched(family):
    model = resformer.patch(tiny_host(family, chunk_size_feed_forward=3), "rezero")
    plain = tiny_host(family, chunk_size_feed_forward=3)
    given = batch(tokens=6)
    torch.testing.assert_close(model(**given).last_hidden_state, plain(**given).last_hidden_state)


def test_layers_must_not_be_dropped_from_under_a_stream():
    model = tiny_host("bert")
    model.config.layerdrop = 0.1
    before = snapshot(model)
    for name, init in (("hyper_connections", "preserve"), ("pre_ln", "paper")):
        with pytest.raises(ValueError, match=r"config.layerdrop = 0.1 leaves layers out.*set it to 0"):
            resformer.patch(model, name, init=init)
        assert_same(snapshot(model), before)
    resformer.patch(model, "highway")


@pytest.mark.parametrize("verify", [True, False])
def test_twice_and_not_at_all(verify):
    model = tiny_host("bert")
    with pytest.raises(ValueError, match="not patched"):
        resformer.unpatch(model)
    resformer.patch(model, "rezero", verify=verify)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"already, with 'rezero'.*unpatch"):
        resformer.patch(model, "highway", verify=verify)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("at", ["multiply", "swap", "difference"])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch, at):
    model = tiny_host("bert", CLASSIFY, layers=3)
    before, calls, original = snapshot(model), [], getattr(patching, at)

    def fail(*args):
        calls.append(1)
        if len(calls) == {"multiply": 4, "swap": 5, "difference": 1}[at]:
            raise RuntimeError("on the way")
        return original(*args)

    monkeypatch.setattr(patching, at, fail)
    with pytest.raises(RuntimeError, match="on the way"):
        resformer.patch(model, "deepnorm")
    assert_same(snapshot(model), before)


def test_a_host_that_changed_is_noticed(monkeypatch):
    """As when a new version of transformers computes its layers in another way."""
    model = tiny_host("bert")
    before = snapshot(model)
    layer = type(model.encoder.layer[0])
    original = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, h, *args, **kwargs: original(self, h, *args, **kwargs) * 1.01)
    with pytest.raises(ValueError, match="family 'bert' does not describe this BertModel"):
        resformer.patch(model, "rezero")
    assert_same(snapshot(model), before)


def test_a_family_with_a_wrong_path_names_it(monkeypatch):
    from resformer.hosts import family as module

    bert = families()["bert"]
    first, *others = bert.stacks[0].sites
    wrong = with_sites(bert, replace(first, norms={"post": "attention.output.Norm"}), *others)
    monkeypatch.setitem(module._FAMILIES, "bert", wrong)
    with pytest.raises(ValueError, match=r"'attention.output.Norm' was not found in BertLayer: no 'Norm'"):
        resformer.patch(tiny_host("bert"), "rezero")
    with pytest.raises(ValueError, match="registered already"):
        resformer.register_family(bert)


def test_every_variant_is_an_option():
    for name, variants in VARIANTS.items():
        assert all(set(options) <= set(schemes()[name].options()) for options in variants)


def test_a_promise_that_is_not_kept_is_an_error(monkeypatch):
    """As on projections that carry something the family does not know of: what is promised is measured."""
    monkeypatch.setattr(schemes()["highway"], "write", lambda self, s, y, norm: norm(s + 1.1 * y))
    model = tiny_host("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match="should keep what this BertModel computes, and the relative difference is"):
        resformer.patch(model, "highway")
    assert_same(snapshot(model), before)


def test_solvers_generate_without_a_cache_by_themselves():
    model = resformer.patch(tiny_host("gpt2", AutoModelForCausalLM), "ode", init="paper")
    assert model.generate(batch()["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 9)
    resformer.unpatch(model)
    assert model.generation_config.use_cache


def test_wrappers_name_the_model_inside():
    model = torch.nn.DataParallel(resformer.patch(tiny_host("bert"), "rezero"))
    for ask in (resformer.unpatch, resformer.describe, resformer.fold, lambda m: resformer.grow(m, 9)):
        with pytest.raises(ValueError, match="holds a patched model; call it on the model inside"):
            ask(model)
