"""What is particular to encoder families: layers that return tuples, global attention, computed tables."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import resformer
from resformer import families
from resformer.patching import is_patched
from resformer.testing.contract import check_unpatch
from resformer.testing.hosts import (
    WIDTH,
    batch,
    checkpoint,
    gradients,
    head_for,
    perturb,
    randomize,
    stands,
    tiny_config,
    tiny_host,
)
from resformer.testing.mechanics import check_compile, residuals

TUPLES = [name for name, family in families().items() if len(family.stacks) == 1 and family.stacks[0].returns]
CROSSED = [name for name in TUPLES if any(site.when for site in families()[name].stacks[0].sites)]
CARRIED = ["denseformer", "hyper_connections"]  # a history, and several streams


def global_batch() -> dict[str, torch.Tensor]:
    """Two texts, the second padded, with global attention on their first and third tokens."""
    given = batch(padded=True)
    mask = torch.zeros_like(given["input_ids"])
    mask[:, [0, 2]] = 1
    return given | {"global_attention_mask": mask}


def patched(family: str, name: str, auto=AutoModel, *, layers: int = 3, init: str = "paper", **host):
    """A patched host, the scheme's parameters then moved as if trained."""
    model = resformer.patch(tiny_host(family, auto, layers=layers, **host), name, init=init, verify=False)
    randomize(model)
    return model


def trained(family: str, name: str, *, reentrant: bool | None, **host) -> dict[str, torch.Tensor | None]:
    """The gradients of a step with dropout, with one mode of checkpointing or without."""
    model = patched(family, name, head_for(family), dropout=0.2, **host).train()
    if reentrant is not None:
        checkpoint(model, {"use_reentrant": reentrant})
        model.enable_input_require_grads()
    last, calls = residuals(model)[1].schemes[-1], []
    step = last.step
    last.step = lambda *given: calls.append(1) or step(*given)
    torch.manual_seed(0)
    model(**batch(padded=True)).logits.square().mean().backward()
    assert len(calls) == (1 if reentrant is None else 2), "checkpointing computes a layer twice"
    return gradients(model)


# ------------------------------------------------------------------------------------------------ tuples


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("family", [name for name in TUPLES if tiny_host(name).supports_gradient_checkpointing])
def test_checkpointing_of_tuples_gives_the_gradients_of_none(family, name):
    plain = trained(family, name, reentrant=None)
    for reentrant in (False, True):
        found = trained(family, name, reentrant=reentrant)
        for path, gradient in plain.items():
            assert (gradient is None) == (found[path] is None), path
            if gradient is not None:
                torch.testing.assert_close(found[path], gradient, rtol=1e-10, atol=1e-12, msg=path)
    moved = [path for path, gradient in plain.items() if ".resformer." in path and gradient is not None]
    assert any(plain[path].any() for path in moved)


def test_a_host_without_checkpointing_refuses_it_patched_as_well():
    for model in (tiny_host("mpnet"), patched("mpnet", "denseformer")):
        with pytest.raises(ValueError, match="does not support"):
            checkpoint(model)


@pytest.mark.parametrize("name", ["identity", *CARRIED])
@pytest.mark.parametrize("family", TUPLES)
def test_hidden_states_of_tuples_in_both_forms(family, name):
    """With return_dict on and off the same states and attentions, none of them with a stream beside it."""
    model = patched(family, name)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    given = batch(padded=True) | ({"use_cache": False} if hasattr(model.config, "use_cache") else {})
    found, plain = model(**given, **wanted), model(**given, **wanted, return_dict=False)
    assert [type(state) for state in found.hidden_states] == [torch.Tensor] * 4
    assert {tuple(state.shape) for state in found.hidden_states} == {(2, 7, 16)}
    assert torch.equal(found.hidden_states[-1], found.last_hidden_state)
    assert len(found.attentions) == 3
    real = [value for value in found.to_tuple() if value is not None]
    plain = [value for value in plain if value is not None]
    assert len(real) == len(plain)
    for ours, theirs in zip(real, plain, strict=True):
        ours, theirs = (value if isinstance(value, tuple) else (value,) for value in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    host = tiny_host(family, layers=3)
    host.load_state_dict({key: value for key, value in model.state_dict().items() if ".resformer." not in key})
    first = host(**given, **wanted).hidden_states[0]
    assert torch.equal(found.hidden_states[0], first), "what enters the first layer is no matter of the scheme"


@pytest.mark.parametrize("name", ["identity", *CARRIED])
@pytest.mark.parametrize("family", CROSSED)
def test_cross_attentions_of_tuples(family, name):
    """Of a decoder that also shows the attentions on an encoder's states."""
    changes = {"is_decoder": True, "add_cross_attention": True}
    model = patched(family, name, AutoModelForCausalLM, **changes)
    host = tiny_host(family, AutoModelForCausalLM, layers=3, **changes)
    states = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = batch() | {"encoder_hidden_states": states, "output_attentions": True, "output_hidden_states": True}
    given["encoder_attention_mask"] = batch(padded=True)["attention_mask"]
    found, expected = model(**given, use_cache=False), host(**given, use_cache=False)
    for kind in ("attentions", "cross_attentions", "hidden_states"):
        assert [one.shape for one in found[kind]] == [one.shape for one in expected[kind]], kind
        if name == "identity":
            assert all(torch.equal(a, b) for a, b in zip(found[kind], expected[kind], strict=True)), kind
    assert not any(attention[1, ..., -2:].any() for attention in found.cross_attentions), "the states' padding is seen"


@pytest.mark.parametrize("family", TUPLES)
def test_unpatching_tuples_takes_the_hook_away(family):
    for name in CARRIED:
        check_unpatch(family, name, {}, "paper")
    host = tiny_host(family)
    hooks = sum(len(module._forward_hooks) for module in host.modules())
    resformer.unpatch(resformer.patch(host, "denseformer"))
    assert sum(len(module._forward_hooks) for module in host.modules()) == hooks


def compiles(family: str) -> bool:
    """Whether transformers' own model gives one graph."""
    model = tiny_host(family, head_for(family), dtype=torch.float32)
    torch._dynamo.reset()
    try:
        torch.compile(lambda **given: model(**given).logits, fullgraph=True, backend="eager")(**batch())
    except torch._dynamo.exc.TorchDynamoException:
        return False
    return True


@pytest.mark.slow  # some seconds each
@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("family", [*TUPLES, "nomic_bert", "roberta_prelayernorm"])
def test_what_compiles_unpatched_compiles_patched(family, name):
    if not compiles(family):
        pytest.skip("the host itself gives no one graph")
    check_compile(family, name, {})


# ------------------------------------------------------------------------------------------------ Longformer


def test_longformer_with_global_attention_is_the_host():
    """The third output of its attention, and gradients that reach the projections of global tokens."""
    host, model = (tiny_host("longformer", layers=3, dtype=torch.float32) for _ in range(2))
    resformer.patch(model, "identity")
    given = global_batch() | {"output_attentions": True, "output_hidden_states": True}
    expected, found = host(**given), model(**given)
    for kind in ("attentions", "global_attentions", "hidden_states"):
        assert len(found[kind]) == len(expected[kind])
        assert all(torch.equal(a, b) for a, b in zip(found[kind], expected[kind], strict=True)), kind
    for outputs in (expected, found):
        outputs.last_hidden_state.square().sum().backward()
    path = "encoder.layer.1.attention.self.value_global.weight"
    assert gradients(host)[path].any()
    assert all(torch.equal(g, gradients(model)[n]) for n, g in gradients(host).items() if g is not None)
    assert not torch.equal(host(**batch(padded=True)).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("name", ["rezero", "scaled", "se_gate", "highway", *CARRIED])
def test_schemes_keep_longformer_with_global_attention(name):
    given = global_batch()
    expected = tiny_host("longformer")(**given).last_hidden_state
    found = resformer.patch(tiny_host("longformer"), name)(**given).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_se_gate_on_longformer_takes_the_mean_over_all_text_global_or_not():
    """Its mask is 0 for text, large where attention is global and negative for padding."""
    model = patched("longformer", "se_gate")
    given = global_batch()
    found = model(**given).last_hidden_state[1, :-2]
    alone = {key: value[1:, :-2] for key, value in given.items()}
    torch.testing.assert_close(model(**alone).last_hidden_state[0], found, rtol=1e-6, atol=1e-6)
    seen = []
    scheme = model.encoder.layer[1].resformer.attn
    step = scheme.step
    scheme.step = lambda s, branch, norm: seen.append(branch.real()) or step(s, branch, norm)
    model(**given)
    assert torch.equal(seen[0], torch.nn.functional.pad(given["attention_mask"].bool(), (0, 1)))  # up to the window


@pytest.mark.parametrize("name", ["deepnorm", "sub_ln"])
def test_weights_of_global_attention_are_scaled_as_those_of_local(name):
    host, model = tiny_host("longformer"), resformer.patch(tiny_host("longformer"), name, init="paper")
    for before, after in zip(host.encoder.layer, model.encoder.layer, strict=True):
        for role in ("query", "key", "value"):
            ratios = [
                (getattr(after.attention.self, role + end).weight / getattr(before.attention.self, role + end).weight)
                for end in ("", "_global")
            ]
            torch.testing.assert_close(ratios[0], ratios[1], rtol=1e-12, atol=0)
            assert (abs(ratios[1] - 1) > 1e-3).all() == (role == "value")
    resformer.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), model.parameters(), strict=True))


def test_hybrid_norm_norms_the_global_queries_keys_and_values_too():
    """With each norm a projection could be of any size, and nothing would change."""
    model = patched("longformer", "hybrid_norm")
    given = global_batch()
    expected = model(**given).last_hidden_state
    with torch.no_grad():
        for layer in model.encoder.layer:
            for role in ("query", "key", "value", "query_global", "key_global", "value_global"):
                projection = getattr(layer.attention.self, role)
                projection.weight.mul_(1e3)
                projection.bias.mul_(1e3)
    torch.testing.assert_close(model(**given).last_hidden_state, expected, rtol=1e-3, atol=1e-3)


def test_longformer_grows_with_its_windows():
    model = AutoModel.from_config(tiny_config("longformer", attention_window=[4, 8])).double().eval()
    perturb(model, 0.2, 0)
    randomize(resformer.patch(model, "rezero", init="paper"))
    expected = model(**global_batch()).last_hidden_state
    resformer.grow(model, 4)
    assert model.config.attention_window == [4, 8, 8, 8]
    assert [layer.attention.self.one_sided_attn_window_size for layer in model.encoder.layer] == [2, 4, 4, 4]
    torch.testing.assert_close(model(**global_batch()).last_hidden_state, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------ others


@pytest.mark.parametrize("family", ["roformer", "longformer", "mpnet", "megatron_bert"])
def test_values_are_refused_where_attention_takes_no_function(family):
    assert not stands("value_residual", family)
    model = tiny_host(family)
    with pytest.raises(ValueError, match=f"{family!r} names no site 'attn' that hands its attention all arguments"):
        resformer.patch(model, "value_residual", init="paper")
    assert not is_patched(model)


def test_roformer_with_rotary_values_and_its_own_sines():
    host, model = (tiny_host("roformer", rotary_value=True) for _ in range(2))
    resformer.patch(model, "identity")
    assert torch.equal(model(**batch()).last_hidden_state, host(**batch()).last_hidden_state)
    table = host.encoder.embed_positions.weight
    assert torch.equal(table[1, :1], torch.ones(1).sin().double()), "the tiny host has the sines and not noise"


def test_mpnet_attends_by_distance():
    """The position bias reaches the attention of a patched layer."""
    model = patched("mpnet", "denseformer")
    before = model(**batch()).last_hidden_state
    with torch.no_grad():
        model.encoder.relative_attention_bias.weight.mul_(-3)
    assert (model(**batch()).last_hidden_state - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["electra", "roformer", "albert"])
@pytest.mark.parametrize("size", [12, WIDTH])
def test_a_projection_after_the_norm_of_the_embeddings_leaves_the_stream_without(family, size):
    """So a scheme that wants x_0 normed is made a norm; ALBERT always has the projection."""
    model = resformer.patch(tiny_host(family, embedding_size=size), "peri_ln", init="paper")
    made = any(name.endswith("embed_norm") for name, _ in model.named_modules())
    assert made == (family == "albert" or size != WIDTH)
