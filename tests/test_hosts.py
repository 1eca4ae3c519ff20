"""Schemes on hosts: the identity is the host bit for bit, preserving schemes keep it, and the update is the paper's."""

import pytest
import torch
from reference import PARAMETERS, REFERENCES, VARIANTS, slots_of
from transformers import AutoModelForCausalLM

import resformer
from resformer import families, schemes
from resformer.support import refusal
from resformer.testing.contract import check_preserves, check_refuses
from resformer.testing.hosts import (
    FFN,
    TOKENS,
    WIDTH,
    attentions,
    batch,
    batch_for,
    gradients,
    head_for,
    keeps,
    stands,
    tiny_config,
    tiny_host,
)
from resformer.testing.nets import net_of_host

FAMILIES = list(families())
# those of one stack whose layers may have cross-attention
CROSSED = [name for name, f in families().items() if len(f.stacks) == 1 and any(s.when for s in f.stacks[0].sites)]
AS_LONG = ["megatron_bert"]  # its cross-attention takes no states but those as long as the text
THREE = ["bert", "gpt2", "modernbert"]
CASES = [(name, options) for name in schemes() for options in ({}, *VARIANTS.get(name, []))]
CASE_IDS = [f"{name}-{options}" if options else name for name, options in CASES]

STACKS = {"encoder": 1, "decoder": 0}  # of tiny encoder-decoders, with how many more layers than were asked for

SOME = ["highway", "deepnorm", "denseformer", "hyper_connections", "value_residual"]
EXACT = {"highway", "exclusive_gate", "shortcut_gate", "rezero", "layer_scale", "denseformer", "drop_path"}
EXACT |= {"sparse_gate", "se_gate", "projection", "direct", "dropout_shortcut"}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).detach().abs().max() / expected.double().detach().abs().max())


# ------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize(("family", "attention"), [(name, kind) for name in FAMILIES for kind in attentions(name)])
def test_identity_is_the_host_bit_for_bit(family, attention):
    """Logits, hidden states, attentions; and with dropout at equal seeds the loss and every gradient."""
    make = dict(attention=attention, dropout=0.2, dtype=torch.float32)
    host = tiny_host(family, head_for(family), **make)
    patched = resformer.patch(tiny_host(family, head_for(family), **make), "identity")
    assert patched.state_dict().keys() == host.state_dict().keys()
    given = batch_for(family, padded=True)
    wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    expected, found = host(**given, **wanted), patched(**given, **wanted)
    assert torch.equal(found.logits, expected.logits)
    kinds = {"hidden_states": 3} | ({"attentions": 2} if attention == "eager" else {})
    if len(families()[family].stacks) > 1:  # three layers under two
        kinds = {f"{stack}_{kind}": n + more for stack, more in STACKS.items() for kind, n in kinds.items()}
        kinds |= {"cross_attentions": 2} if attention == "eager" else {}
    for kind, number in kinds.items():
        assert len(found[kind]) == len(expected[kind]) == number, kind
        assert all(torch.equal(f, e) for f, e in zip(found[kind], expected[kind], strict=True)), kind
    losses = []
    for model in (host, patched):
        model.train()
        torch.manual_seed(0)
        losses.append(model(**given).logits.square().mean())
        losses[-1].backward()
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], expected.logits.square().mean()), "dropout must be on for this to mean anything"
    for name, gradient in gradients(host).items():
        other = gradients(patched)[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("family", CROSSED)
def test_identity_with_cross_attention_and_cache(family):
    changes = {"is_decoder": True, "add_cross_attention": True}
    host, patched = (tiny_host(family, AutoModelForCausalLM, dtype=torch.float32, **changes) for _ in range(2))
    resformer.patch(patched, "identity")
    assert any(name.endswith("resformer.cross") for name, _ in patched.named_modules())
    length = TOKENS if family in AS_LONG else 5
    states = torch.randn(2, length, host.config.hidden_size, generator=torch.Generator().manual_seed(0))
    given = batch() | {"encoder_hidden_states": states, "use_cache": True}
    expected, found = host(**given), patched(**given)
    assert torch.equal(found.logits, expected.logits)
    padded = given | {"encoder_attention_mask": (torch.arange(length) < torch.tensor([[length], [2]])).long()}
    assert torch.equal(patched(**padded).logits, host(**padded).logits)
    assert not torch.equal(host(**padded).logits[1], expected.logits[1]), "the mask of the states must matter"
    step = {"input_ids": torch.tensor([[4], [5]]), "encoder_hidden_states": states}
    again = [model(**step, past_key_values=o.past_key_values) for model, o in ((host, expected), (patched, found))]
    assert torch.equal(again[0].logits, again[1].logits)
    without = dict(batch())
    assert torch.equal(patched(**without).logits, host(**without).logits)
    assert not torch.equal(patched(**without).logits, found.logits), "cross-attention must matter"


def test_states_for_a_host_without_cross_attention_are_refused_as_the_host_does():
    model = resformer.patch(tiny_host("gpt2"), "rezero")
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model(**batch(), encoder_hidden_states=torch.zeros(2, 5, 16, dtype=torch.float64))


def test_chunked_feed_forward():
    host, patched = (tiny_host("bert", chunk_size_feed_forward=1) for _ in range(2))
    resformer.patch(patched, "highway")
    assert torch.equal(patched(**batch()).last_hidden_state, host(**batch()).last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_visited_once(family):
    model = resformer.patch(tiny_host(family, layers=3), "identity")
    visits = []
    for name, module in model.named_modules():
        if type(module) is schemes()["identity"]:
            module.step = lambda s, f, n, name=name, step=module.step: visits.append(name) or step(s, f, n)
    model(**batch_for(family))
    stacks = families()[family].stacks
    crosses = len(stacks) > 1  # else no states are given
    sites = [(3 + STACKS.get(s.name, 0) * crosses) * sum(crosses or not site.when for site in s.sites) for s in stacks]
    assert len(visits) == len(set(visits)) == sum(sites)


# ------------------------------------------------------------------------------------------------ preservation


# Norms around the sublayers, and two stacks. Shared layers, sublayers side by side and DeBERTa have files of their own.
BUILDS = {"gemma2", "t5"}


def preserving_cases():
    """Every scheme on every family but those three, which the contract is about; most of them slow tests."""
    for family in FAMILIES:
        if family not in THREE:
            for name in schemes():
                late = family not in BUILDS and name not in SOME
                yield pytest.param(family, name, marks=[pytest.mark.slow] if late else [])


@pytest.mark.parametrize(("family", "name"), list(preserving_cases()))
def test_preserving_schemes_keep_every_family(family, name):
    """The three of the contract apart."""
    if refusal(family, name, "paper"):
        check_refuses(family, name, {}, "paper")
    elif keeps(name, {}, family):
        check_preserves(family, name, {})
    else:
        check_refuses(family, name, {}, "preserve" if stands(name, family) else "paper")


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("name", sorted(EXACT))
def test_where_the_algebra_is_exact_so_are_the_bits(family, name):
    if not stands(name, family):
        pytest.skip("not for this stack")
    given = batch(padded=True)
    host, patched = (tiny_host(family, dtype=torch.float32) for _ in range(2))
    resformer.patch(patched, name)
    assert torch.equal(patched(**given).last_hidden_state, host(**given).last_hidden_state)


def test_branches_of_the_hosts_matter():
    """Else preservation would be easy: without its branches each host computes something else."""
    for family in FAMILIES:
        host, patched = tiny_host(family), resformer.patch(tiny_host(family), "rezero", init="paper")
        given = batch_for(family)
        assert relative(patched(**given).last_hidden_state, host(**given).last_hidden_state) > 0.1, family


# ------------------------------------------------------------------------------------------------ the update on hosts


@pytest.mark.parametrize("name", ["drop_path", "dropout_shortcut"])
@pytest.mark.parametrize("family", THREE)
def test_random_schemes_in_training_leave_out_what_the_paper_says(family, name):
    """Masks drawn again from the same seed, in the order of the sites."""
    given = batch(padded=True)
    patched = resformer.patch(tiny_host(family, layers=3), name, p=0.8).train()
    net, x = net_of_host(
        family, tiny_host(family, layers=3), patched, given, slots_of(name, "preserve", families()[family].kind)
    )
    net.options, net.training = {"p": 0.8}, True
    outputs = []
    for compute in (lambda: patched(**given).last_hidden_state, lambda: REFERENCES[name](net, x)):
        torch.manual_seed(3)
        outputs.append(compute().detach())
    real = given["attention_mask"].bool()
    torch.testing.assert_close(outputs[0][real], outputs[1][real], rtol=1e-10, atol=1e-10)
    assert relative(outputs[0], patched.eval()(**given).last_hidden_state) > 0.1


@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_parameters_are_as_many_as_said(name, options):
    model = resformer.patch(tiny_host("bert", layers=4), name, init="paper", verify=False, **options)
    own = [scheme for layer in model.encoder.layer for scheme in layer.resformer.schemes]
    own = [scheme for scheme in own if scheme.name == name]
    found = sum(p.numel() for scheme in own for p in scheme.parameters())
    assert found == PARAMETERS.get(name, lambda *_, **__: 0)(4, WIDTH, FFN, **options)
    assert found == schemes()[name].extra_parameters([scheme.place for scheme in own], **options)


# ------------------------------------------------------------------------------------------------ weight edits


def projections(family: str, layer) -> dict[str, torch.Tensor]:
    """Role -> weight (out, in), written out by hand for three hosts."""
    if family == "bert":
        attention = layer.attention.self
        q, k, v = attention.query.weight, attention.key.weight, attention.value.weight
        return {
            "q": q,
            "k": k,
            "v": v,
            "o": layer.attention.output.dense.weight,
            "up": layer.intermediate.dense.weight,
            "down": layer.output.dense.weight,
        }
    if family == "gpt2":  # Conv1D keeps (in, out)
        q, k, v = layer.attn.c_attn.weight.T.split(16)
        others = layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj
        return {"q": q, "k": k, "v": v} | dict(zip(("o", "up", "down"), (m.weight.T for m in others), strict=True))
    q, k, v = layer.attn.Wqkv.weight.split(16)
    gate, up = layer.mlp.Wi.weight.chunk(2)  # Wi gives what is activated, and what that multiplies
    others = {"o": layer.attn.Wo.weight, "gate": gate, "up": up, "down": layer.mlp.Wo.weight}
    return {"q": q, "k": k, "v": v} | others


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize(("name", "gain"), [("deepnorm", (8 * 2) ** -0.25), ("sub_ln", 1.1774100225154747)])
def test_weights_are_scaled_where_the_paper_says(family, name, gain):
    """sub_ln: sqrt(ln 4) with two layers."""
    host, patched = tiny_host(family), resformer.patch(tiny_host(family), name, init="paper")
    get = {"bert": lambda m: m.encoder.layer, "gpt2": lambda m: m.h, "modernbert": lambda m: m.layers}[family]
    for before, after in zip(get(host), get(patched), strict=True):
        there = projections(family, after)
        for role, weight in projections(family, before).items():
            factor = gain if role in ("v", "o", "up", "down") else 1.0
            torch.testing.assert_close(there[role], factor * weight, rtol=1e-12, atol=0)
    resformer.unpatch(patched)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), patched.parameters(), strict=True))


def test_the_tiny_hosts_are_what_the_tests_take_them_for():
    assert {families()[family].kind for family in THREE} == {"post", "pre"}
    assert tiny_config("modernbert").local_attention // 2 < TOKENS
