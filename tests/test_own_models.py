"""A user's own model, from its spec to a checkpoint: a plain module, and a PreTrainedModel of one's own."""

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import resformer
from resformer.hosts import Family, Projection, Site, Stack, families, register_family
from resformer.hosts import family as registry
from resformer.layer import Residual
from resformer.schemes import schemes
from resformer.testing.hosts import perturb, randomize

IDS = torch.arange(16).reshape(2, 8)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask=None):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class PostBlock(Block):
    def forward(self, x, mask=None):
        x = self.norm1(x + self.attn(x, mask=mask))
        return self.norm2(x + self.mlp(x))


class Net(nn.Module):
    def __init__(self, block=Block, width=16, depth=3, heads=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(32, width), nn.Linear(width, 5)
        self.blocks, self.norm = nn.ModuleList(block(width, heads) for _ in range(depth)), nn.LayerNorm(width)

    def forward(self, ids):
        x, mask = self.embed(ids), torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


POINTS = {name: Projection("attn.qkv", part, 3) for part, name in enumerate("qkv")} | {"o": Projection("attn.out")}


def sites(slot="pre") -> tuple[Site, ...]:
    return (
        Site("attn", calls=("attn",), norms={slot: "norm1"}, passes={"mask": "mask"}, points=POINTS),
        Site(
            "ffn",
            calls=("mlp",),
            norms={slot: "norm2"},
            points={"up": Projection("mlp.0"), "down": Projection("mlp.2")},
        ),
    )


def own_family(layer=Block, slot="pre", **changes) -> Family:
    stack = {"final_norm": "norm", "embeddings": ("embed",), "heads": "attn.heads"} | changes
    return Family(
        "mine", (Stack(layer=layer, layers="blocks", sites=sites(slot), **stack),), probe=lambda model: model(IDS)
    )


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


def net(*given, seed=0) -> Net:
    model = Net(*given)
    perturb(model, 0.5, seed)
    return model.double().eval()


LOCAL = ["rezero", "highway", "deepnorm", "hyper_connections", "sub_ln", "normformer", "hybrid_norm", "ode", "post_ln"]


@pytest.mark.parametrize("slot", ["pre", "post"])
@pytest.mark.parametrize("name", LOCAL)
def test_a_plain_module_is_patched_trained_saved_and_given_back(name, slot):
    block = Block if slot == "pre" else PostBlock
    changes = {} if slot == "pre" else {"final_norm": ""}
    register_family(own_family(block, slot, **changes))
    model = net(block)
    if slot == "post":
        model.norm = nn.Identity()
    before, keys = model(IDS), list(model.state_dict())
    bare = copy.deepcopy(model)
    if f"{slot}" in schemes()[name].preserves:
        resformer.patch(model, name)
        torch.testing.assert_close(model(IDS), before, rtol=1e-9, atol=1e-9)
        resformer.unpatch(model)
        assert torch.equal(model(IDS), before)
    resformer.patch(model, name, init="paper")
    assert schemes()[name].card()["reference"][:15] in " ".join(str(resformer.describe(model)).split())
    randomize(model)
    optimizer = torch.optim.AdamW(resformer.param_groups(model.train(), lr=1e-2, weight_decay=0.1))
    model(IDS).square().mean().backward()
    assert not [path for path, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = resformer.patch(bare, name, init="paper")
    again.load_state_dict(torch.load(file))
    expected = model.eval()(IDS)
    assert torch.equal(again(IDS), expected)
    assert torch.equal(copy.deepcopy(model)(IDS), expected)
    assert list(resformer.unpatch(again).state_dict()) == keys


def test_the_gates_of_a_plain_module_are_those_of_the_equation():
    """By a loop in which the blocks are written out."""
    register_family(own_family())
    model = resformer.patch(net(), "layer_scale", init="paper")
    randomize(model)
    x, mask = model.embed(IDS), torch.ones(8, 8, dtype=torch.bool).tril()
    for block in model.blocks:
        own = block.resformer
        x = x + own.attn.a * block.attn(block.norm1(x), mask)
        x = x + own.ffn.a * block.mlp(block.norm2(x))
    torch.testing.assert_close(model(IDS), model.head(model.norm(x)), rtol=1e-12, atol=1e-12)


def test_classes_made_in_a_function_are_told_apart_by_identity():
    def make():
        class Local(Block):
            pass

        return Local

    one, other = make(), make()
    register_family(own_family(one))
    resformer.patch(net(one), "rezero")
    with pytest.raises(ValueError, match="no family describes this Net"):
        resformer.patch(net(other), "rezero")
    register_family(own_family(f"{__name__}.Block"), replace=True)
    resformer.patch(net(), "rezero")


def test_a_corrected_spec_takes_effect():
    """The subclass of the layer was made for the wrong one."""
    wrong = own_family()
    stack = wrong.stacks[0]
    turned = Stack(layer=Block, layers="blocks", sites=stack.sites[::-1], final_norm="norm")
    register_family(Family("mine", (turned,), probe=wrong.probe))
    with pytest.raises(ValueError, match="family 'mine' does not describe this Net"):
        resformer.patch(net(), "rezero")
    with pytest.raises(ValueError, match="replace=True"):
        register_family(wrong)
    register_family(wrong, replace=True)
    model, expected = net(), net()(IDS)
    assert torch.equal(resformer.patch(model, "identity")(IDS), expected)


def test_heads_are_asked_for_where_a_scheme_needs_them():
    register_family(own_family(heads="num_attention_heads"))
    resformer.patch(net(), "sub_ln", init="paper")
    for name in ("normformer", "hybrid_norm"):
        model = net()
        with pytest.raises(ValueError, match=f"'{name}' needs the number of attention heads.*`heads`"):
            resformer.patch(model, name, init="paper")
        assert not any(isinstance(module, Residual) for module in model.modules())
    register_family(own_family(), replace=True)
    model = resformer.patch(net(), "normformer", init="paper")
    assert model.blocks[0].resformer.attn.gain.shape == (2,)


def test_an_unpatched_module_is_described_with_what_it_can_be_patched_with():
    register_family(own_family())
    text = " ".join(str(resformer.describe(net())).split())
    for part in ("3 of Block, sites: attn, ffn", "width 16, 2 heads", "up 24, down 24", "final norm norm"):
        assert part in text
    assert "value_residual" in text.partition("refused by")[2]
    assert "pre_ln" in text.partition("kept by")[2].partition("changed by")[0]


def test_a_copy_in_a_fresh_process_needs_the_family():
    from resformer.swap import _rebuild, forget

    register_family(own_family())
    resformer.patch(net(), "rezero")
    registry._FAMILIES.pop("mine")
    forget("layer", "mine")
    with pytest.raises(ValueError, match=r"unknown family 'mine'.*register it before"):
        _rebuild(Block, "layer", "mine", "encoder")


# ------------------------------------------------------------------------------------------------ PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "own_model"

    def __init__(self, hidden_size=16, num_attention_heads=2, depth=2, vocab_size=32, **kwargs):
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.depth, self.vocab_size = depth, vocab_size
        super().__init__(**kwargs)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "net"

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.norm = nn.Embedding(config.vocab_size, config.hidden_size), nn.LayerNorm(config.hidden_size)
        blocks = (Block(config.hidden_size, config.num_attention_heads) for _ in range(config.depth))
        self.blocks = nn.ModuleList(blocks)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        x = self.embed(input_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        for block in self.blocks:
            x = block(x, mask=mask)
        return BaseModelOutput(last_hidden_state=self.norm(x))


def own_pretrained() -> Family:
    return Family("own", (Stack(layer=Block, layers="blocks", sites=sites(), final_norm="norm"),))


@pytest.fixture
def own_model():
    register_family(own_pretrained())
    model = OwnModel(OwnConfig())
    perturb(model, 0.5, 0)
    return model.double().eval()


@pytest.mark.parametrize("name", ["highway", "hyper_connections", "deepnorm"])
def test_a_model_of_ones_own_goes_to_disk_and_back(tmp_path, own_model, name):
    before = own_model(IDS).last_hidden_state
    if "pre" in schemes()[name].preserves:
        resformer.patch(own_model, name)
        torch.testing.assert_close(own_model(IDS).last_hidden_state, before, rtol=1e-9, atol=1e-9)
    else:
        resformer.patch(own_model, name, init="paper")
    randomize(own_model)
    own_model(IDS).last_hidden_state.sum().backward()
    own_model.save_pretrained(tmp_path)
    expected = own_model(IDS).last_hidden_state
    loaded = resformer.from_pretrained(tmp_path, OwnModel, dtype=torch.float64).eval()
    assert torch.equal(loaded(IDS).last_hidden_state, expected)
    assert loaded.state_dict().keys() == own_model.state_dict().keys()
    resformer.unpatch(loaded)
    assert type(loaded.config) is OwnConfig


def test_auto_classes_know_what_is_registered_with_them(tmp_path, own_model):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    resformer.patch(own_model, "rezero").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"host of type 'own_model'.*AutoConfig.register\('own_model'"):
        resformer.from_pretrained(tmp_path, AutoModel)
    AutoConfig.register("own_model", OwnConfig)
    AutoModel.register(OwnConfig, OwnModel)
    try:
        loaded = resformer.from_pretrained(tmp_path, AutoModel, dtype=torch.float64).eval()
        assert torch.equal(loaded(IDS).last_hidden_state, own_model(IDS).last_hidden_state)
    finally:
        CONFIG_MAPPING._extra_content.pop("own_model")
        AutoModel._model_mapping._extra_content.pop(OwnConfig)
    assert "own" in families()


@pytest.mark.parametrize("name", ["deepnorm", "sub_ln"])
def test_layers_that_share_a_part_are_not_scaled_twice(name):
    register_family(own_family())
    model = net()
    model.blocks[1].mlp = model.blocks[0].mlp
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers 0 and 1 of this Net share 'mlp\.0\.weight'"):
        resformer.patch(model, name, init="paper")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    resformer.unpatch(resformer.patch(model, "highway"))


class WithDropout(Block):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, mask=None):
        return self.drop(super().forward(x, mask))


class WithScale(Block):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, mask=None):
        return self.scale * super().forward(x, mask)


class Unpacking(Net):
    """Takes the first of what a layer returns, as much code does."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            out = block(x)
            x = out[0] if isinstance(out, tuple) else out
        return self.norm(x)


@pytest.mark.parametrize(("block", "said"), [(WithDropout, "nothing of 'drop'"), (WithScale, "a parameter 'scale'")])
def test_what_a_layer_has_and_no_site_uses_is_named(block, said):
    register_family(own_family(block))
    with pytest.raises(ValueError, match=said):
        resformer.patch(net(block), "highway")


@pytest.mark.parametrize(
    ("passes", "said"),
    [({}, "take 'mask', and no site hands it on"), ({"mask": "msk"}, "passes 'msk' on, which")],
)
def test_arguments_have_to_be_handed_on_by_the_names_of_the_layer(passes, said):
    family = own_family()
    attention, feed_forward = family.stacks[0].sites
    changed = dataclasses.replace(family.stacks[0], sites=(dataclasses.replace(attention, passes=passes), feed_forward))
    register_family(dataclasses.replace(family, stacks=(changed,)))
    with pytest.raises(ValueError, match=said):
        resformer.patch(net(), "highway")


@pytest.mark.parametrize("name", ["resi_dual", "x0_mix", "hyper_connections", "denseformer", "laurel"])
def test_a_loop_that_takes_streams_apart_is_refused(name):
    register_family(own_family())
    torch.manual_seed(0)
    model = Unpacking().double().eval()
    before = model(IDS)
    with pytest.raises(ValueError, match="not given what the layer before it returned"):
        resformer.patch(model, name, init="paper")
    assert torch.equal(model(IDS), before)
    resformer.patch(model, "highway")


def test_patching_in_inference_mode_is_refused():
    register_family(own_family())
    with torch.inference_mode(), pytest.raises(ValueError, match="patch outside of it"):
        resformer.patch(net(), "highway")


class ByKeyword(Net):
    def forward(self, ids):
        x, mask = self.embed(ids), torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(mask=mask, x=x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("name", ["highway", "hyper_connections"])
def test_layers_may_be_called_by_keyword(name):
    register_family(own_family())
    model = ByKeyword().double().eval()
    before = model(IDS)
    resformer.patch(model, name)
    torch.testing.assert_close(model(IDS), before, rtol=1e-9, atol=1e-9)


class Causal(Attention):
    def forward(self, x, causal=False):
        return super().forward(x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if causal else None)


class CausalBlock(Block):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.attn = Causal(width, heads)

    def forward(self, x, causal=True):
        x = x + self.attn(self.norm1(x), causal=causal)
        return x + self.mlp(self.norm2(x))


class CausalNet(Net):
    def __init__(self):
        super().__init__(CausalBlock)

    def forward(self, ids, *given):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, *given)
        return self.head(self.norm(x))


def test_what_a_layer_takes_by_default_is_handed_on():
    attention, feed_forward = sites()
    attention = dataclasses.replace(attention, passes={"causal": "causal"})
    stack = Stack(layer=CausalBlock, layers="blocks", sites=(attention, feed_forward), final_norm="norm")
    register_family(Family("causal", (stack,), probe=lambda model: model(IDS)))
    model = CausalNet().double().eval()
    before, open_ = model(IDS), model(IDS, False)
    assert not torch.allclose(before, open_)
    resformer.patch(model, "identity")
    assert torch.equal(model(IDS), before)
    assert torch.equal(model(IDS, False), open_)


class Skipping(Net):
    skip = -1

    def forward(self, ids):
        x = self.embed(ids)
        for number, block in enumerate(self.blocks):
            if number != self.skip:
                x = block(x)
        return self.head(self.norm(x))


@pytest.mark.filterwarnings("ignore:the probe of family")
@pytest.mark.parametrize("name", ["hyper_connections", "denseformer", "laurel", "x0_mix"])
def test_a_stream_that_was_not_opened_is_told(name):
    register_family(own_family())
    model = resformer.patch(Skipping().eval(), name)
    model.skip = 0
    with pytest.raises(ValueError, match=f"'{name}' carries a stream.*a layer before it was not run.*needs all"):
        model(IDS)
