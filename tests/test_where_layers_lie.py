"""Layers are found where they lie, in lists, sequences and among layers of other classes, or it is said where."""

from dataclasses import replace

import pytest
import torch
from test_own_models import IDS, Block, Net, net, own_family, registered, sites  # noqa: F401
from torch import nn
from transformers import AutoModel, BartConfig, JambaConfig, T5Config, T5EncoderModel
from transformers.models.bart.modeling_bart import BartForCausalLM
from wrong_specs import refused, with_stack

import resformer
from resformer import families
from resformer.hosts import Family, Site, Stack, register_family
from resformer.hosts import family as registry
from resformer.testing.hosts import batch, perturb, randomize, tiny_host


@pytest.mark.parametrize(
    "change", [{"root": "decodr"}, {"layers": "layrs"}, {"layer": f"{Block.__module__}.Block"}, {"root": "encoder"}]
)
def test_no_stack_is_left_out_in_silence(monkeypatch, change):
    """By a typo in the path of one stack while the other is found; a class that is not there at all may be absent."""
    encoder, decoder = families()["bart"].stacks
    monkeypatch.delitem(registry._FAMILIES, "bart")
    register_family(Family("mine", (encoder, replace(decoder, **change))))
    model = bart()
    if "layer" in change:
        resformer.patch(model, "highway")
        return
    path = f"{change.get('root', 'decoder')}.{change.get('layers', 'layers')}"
    said = rf"its decoder was not found at '{path}'; layers of its class lie at 'decoder.layers' \(ModuleList\)"
    with refused(model, said):
        resformer.patch(model, "highway")


def bart():
    sizes = {"d_model": 16, "vocab_size": 32, "max_position_embeddings": 24}
    for name in ("encoder", "decoder"):
        sizes |= {f"{name}_layers": 2, f"{name}_attention_heads": 2, f"{name}_ffn_dim": 20}
    return AutoModel.from_config(BartConfig(**sizes)).double().eval()


def test_a_part_that_has_no_other_stack_is_patched():
    config = T5Config(d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2, vocab_size=32)
    resformer.patch(T5EncoderModel(config), "highway")
    resformer.patch(BartForCausalLM(bart().config), "highway")


class InDict(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({str(n): block for n, block in enumerate(self.blocks)})

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x))


def test_where_the_layers_lie_is_said():
    register_family(with_stack(layers="blcks"))
    with refused(
        model := net(), r"'blcks' was not found in Net; layers of this class lie at 'blocks' \(ModuleList\)\. "
    ):
        resformer.patch(model, "rezero")
    register_family(own_family(), replace=True)
    with refused(model := InDict(), r"lie at 'blocks' \(ModuleDict\), and an nn.ModuleList or nn.Sequential is needed"):
        resformer.patch(model, "rezero")


class InSequence(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*self.blocks)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids))))


@pytest.mark.filterwarnings("ignore:the probe of family")
@pytest.mark.parametrize("name", ["highway", "hyper_connections", "denseformer"])
def test_layers_may_lie_in_a_sequence(name):
    register_family(own_family())
    model = InSequence().double().eval()
    before = model(IDS)
    resformer.patch(model, name)
    torch.testing.assert_close(model(IDS), before, rtol=1e-9, atol=1e-9)
    assert torch.equal(resformer.unpatch(model)(IDS), before)


@pytest.mark.parametrize("numbers", [None, [], [0, 1, 3], ["0"], 3])
def test_an_order_gives_numbers_of_layers(numbers):
    register_family(with_stack(order=lambda config: numbers))
    with refused(model := net(), "`order` of the stack 'encoder' must give a list of numbers of its layers, 0 to 2"):
        resformer.patch(model, "highway")


def test_what_stands_between_layers_is_found():
    register_family(with_stack(between={"conv": 0}))
    with refused(model := net(), "'conv' was not found in Net"):
        resformer.patch(model, "highway")


def test_layers_are_asked_for_of_the_stack_that_has_them():
    with pytest.raises(ValueError, match="within 0 to 1, the layers of the decoder, got"):
        resformer.patch(bart(), "highway", layers={"decoder": range(6)})


def test_tables_that_are_not_named_are_asked_for():
    register_family(with_stack(embeddings=()))
    with refused(
        model := net(), "scales the weights of embed, .*name the tables that open the stack in `Stack.embeddings`, or"
    ):
        resformer.patch(model, "t_fixup", init="paper")


def test_a_part_of_a_model_leads_to_the_whole():
    with pytest.raises(ValueError, match=r"of family 't5', which looks for them at 'encoder\.block': patch the model"):
        resformer.patch(tiny_host("t5").encoder, "highway")


# ------------------------------------------------------------------------------------------------ hybrids

JAMBA = Stack(
    layer="transformers.models.jamba.modeling_jamba.JambaAttentionDecoderLayer",
    layers="layers",
    name="decoder",
    final_norm="final_layernorm",
    embeddings=("embed_tokens",),
    sites=(
        Site(
            "attn",
            calls=("self_attn",),
            norms={"pre": "input_layernorm"},
            passes={name: name for name in ("attention_mask", "position_ids", "past_key_values", "use_cache")},
            extra=True,
        ),
        Site("ffn", calls=("feed_forward",), norms={"pre": "pre_ff_layernorm"}),
    ),
)


def jamba():
    """Four layers, of which the second and the fourth attend."""
    config = JambaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=20, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4, pad_token_id=0,
    )  # fmt: skip
    model = AutoModel.from_config(config)
    perturb(model, 0.5, 0)
    return model.eval()


def test_a_hybrid_is_patched_in_its_attention_layers_alone(tmp_path):
    register_family(Family("jamba", (JAMBA,), config="JambaConfig"))
    model, expected = jamba(), jamba()(**batch()).last_hidden_state
    with refused(model, r"layers \[0, 2\] are of class JambaMambaDecoderLayer.*layers=\[1, 3\]"):
        resformer.patch(model, "highway")
    with refused(model, r"'hyper_connections' carries a stream.*other classes stand between \[1, 3\]"):
        resformer.patch(model, "hyper_connections", layers=[1, 3])
    text = " ".join(str(resformer.describe(model)).split())
    assert "2 of JambaAttentionDecoderLayer (numbers 1, 3; the others, JambaMambaDecoderLayer, stay" in text

    resformer.patch(model, "highway", layers=[1, 3])
    torch.testing.assert_close(model(**batch()).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    randomize(model)
    changed = model(**batch()).last_hidden_state
    assert (changed - expected).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert '"numbers"' in (tmp_path / "config.json").read_text()
    loaded = resformer.from_pretrained(tmp_path, AutoModel).eval()
    assert torch.equal(loaded(**batch()).last_hidden_state, changed)
    resformer.unpatch(loaded)
    resformer.patch(loaded, "hyper_connections", layers=[3])
