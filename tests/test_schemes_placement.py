"""Schemes of norm placement: how many layers are post-LN, what the readouts do with final norms, what is scaled."""

import math

import pytest
import torch
from reference import REFERENCES
from transformers import AutoModelForCausalLM

import resformer
from resformer import families, schemes
from resformer.schemes import Place
from resformer.testing.hosts import batch, randomize, tiny_host
from resformer.testing.nets import net_of_host

THREE = ["bert", "gpt2", "modernbert"]
OURS = [
    *("res_post_norm", "sandwich", "peri_ln", "mix_ln", "keel", "post_activation", "resi_dual", "siamese_norm", "b2t"),
    *("normformer", "ln_scaling", "hybrid_norm", "sub_ln"),
]


@pytest.mark.parametrize(("share", "layers", "post"), [(0.25, 12, 3), (0.25, 3, 0), (0.25, 7, 1), (0, 4, 0), (1, 4, 4)])
def test_mix_ln_has_as_many_post_ln_layers_as_the_paper(share, layers, post):
    places = [Place("ffn", index=n, sites=layers, layer=n, layers=layers, width=4) for n in range(layers)]
    found = [schemes()["mix_ln"](place, share=share).norms() for place in places]
    assert found == [{"post", "final"}] * post + [{"pre", "final"}] * (layers - post)


@pytest.mark.parametrize("family", THREE)
def test_mix_ln_on_hosts(family):
    """Half of the layers each, by the paper's equation; what trains is used; undone exactly."""
    given = batch(padded=True)
    model, twin = tiny_host(family, layers=4), tiny_host(family, layers=4)
    resformer.patch(model, "mix_ln", init="paper", share=0.5)
    randomize(model)
    net, x = net_of_host(family, twin, model, given, lambda n, of, name: {"post" if n < 2 else "pre", "final"})
    with torch.no_grad():
        expected = REFERENCES["mix_ln"](net, x)
    found = model(**given).last_hidden_state
    real = given["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)
    found.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None or not p.requires_grad or "pooler" in name, f"{name} is unused"
    resformer.unpatch(model)
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert torch.equal(model(**given).last_hidden_state, twin(**given).last_hidden_state)


def test_mix_ln_counts_from_the_first_patched_layer():
    model = resformer.patch(tiny_host("gpt2", layers=6), "mix_ln", init="paper", layers=range(2, 6))
    acts = [set(layer.resformer.acts["ffn"]) for layer in model.h[2:]]
    assert acts == [{"post"}, {"pre"}, {"pre"}, {"pre"}]


@pytest.mark.parametrize("share", [1.5, -0.1, math.nan, "half", True])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match="option 'share'"):
        resformer.patch(tiny_host("bert"), "mix_ln", init="paper", share=share)


def test_b2t_scales_the_projections_of_every_layer():
    host, model = tiny_host("bert", layers=3), resformer.patch(tiny_host("bert", layers=3), "b2t", init="paper")
    for (name, before), after in zip(host.named_parameters(), model.parameters(), strict=True):
        scaled = "encoder.layer" in name and name.endswith("weight") and "LayerNorm" not in name
        torch.testing.assert_close(after, before / math.sqrt(3) if scaled else before, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("family", "made"), [("bert", True), ("gpt2", False), ("modernbert", False)])
def test_resi_dual_reads_out_through_the_hosts_own_final_norm(family, made):
    model = resformer.patch(tiny_host(family), "resi_dual", init="paper")
    assert any("final_norm" in key and ".resformer." in key for key in model.state_dict()) == made
    said = str(resformer.describe(model))
    assert ("made for the scheme" in said) == made
    assert ("inside the scheme's readout" in said) != made
    own = families()[family].stacks[0].final_norm
    if own:  # it acts on the dual stream alone: the post-LN stream is added after it
        with torch.no_grad():
            for p in model.get_submodule(own).parameters():
                p.zero_()
        p_stream = model(**batch()).last_hidden_state
        plain = resformer.patch(tiny_host(family), "post_ln", init="paper")(**batch()).last_hidden_state
        torch.testing.assert_close(p_stream, plain, rtol=1e-12, atol=1e-12)


def test_resi_dual_within_a_host_makes_its_final_norm():
    model = resformer.patch(tiny_host("gpt2", layers=3), "resi_dual", init="paper", layers=range(2))
    assert hasattr(model.h[1].resformer, "final_norm")
    x = torch.randn(2, 16).double()
    assert torch.equal(model.ln_f(x), tiny_host("gpt2", layers=3).ln_f(x)), "the host's own still acts at its end"


def test_constants():
    where = {"index": 3, "sites": 24, "layer": 1, "layers": 12, "width": 4}
    assert schemes()["keel"](Place("ffn", **where)).alpha == 24
    assert schemes()["siamese_norm"](Place("ffn", **where)).gain == pytest.approx(1 / math.sqrt(4))


def test_post_activation_is_never_negative():
    found = resformer.patch(tiny_host("bert"), "post_activation", init="paper")(**batch()).last_hidden_state
    assert (found >= 0).all()
    assert found.any()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_with_cross_attention_all_parameters_are_used(family, name):
    """Three sites a layer: norms and parameters for the cross-attention too, and a cache that agrees."""
    changes = {"is_decoder": True, "add_cross_attention": True}
    model = resformer.patch(tiny_host(family, AutoModelForCausalLM, **changes), name, init="paper")
    randomize(model)
    states = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = model(**batch(), encoder_hidden_states=states).logits
    found.square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None or not p.requires_grad, f"{key} is unused"
    ids = batch()["input_ids"]
    first = model(input_ids=ids[:, :-1], encoder_hidden_states=states, use_cache=True)
    last = model(input_ids=ids[:, -1:], encoder_hidden_states=states, past_key_values=first.past_key_values)
    torch.testing.assert_close(last.logits[:, -1], found[:, -1], rtol=1e-9, atol=1e-9)


def test_a_norm_that_the_host_leaves_out_is_made_where_another_stream_is_read():
    """ModernBERT's first attention has none, since its input comes from one; SiameseNorm reads a sum there."""
    model = resformer.patch(tiny_host("modernbert"), "siamese_norm", init="paper")
    assert model.layers[0].resformer.acts["attn"] == {"pre": "resformer.attn_pre_norm"}
    assert model.layers[1].resformer.acts["attn"] == {"pre": "attn_norm"}
    assert resformer.patch(tiny_host("modernbert"), "pre_ln").layers[0].resformer.acts["attn"] == {"pre": "attn_norm"}
