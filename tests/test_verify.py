"""What a family says is compared with what the model computes, and a mistake is told where it lies."""

import warnings
from dataclasses import replace

import pytest
import torch
from test_own_models import IDS, POINTS, Attention, Block, Net, net, own_family, registered, sites  # noqa: F401
from torch import nn
from wrong_specs import ATTN, FFN, refused, told, with_site, with_stack

import resformer
from resformer import families
from resformer.drawing import fresh_seed
from resformer.hosts import Projection, Site, parallel, register_family
from resformer.hosts import family as registry
from resformer.testing.hosts import tiny_host


class Dropping(Block):
    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.rate = 0.1

    def forward(self, x, mask=None):
        drop = lambda y: nn.functional.dropout(y, self.rate, self.training)
        return Block.forward(self, x, mask) if not self.rate else self.dropped(x, mask, drop)

    def dropped(self, x, mask, drop):
        x = x + drop(self.attn(self.norm1(x), mask=mask))
        return x + drop(self.mlp(self.norm2(x)))


def test_a_dropout_that_was_forgotten_is_told():
    said = "in training mode, and there only, .* first in what layer 0 of the encoder returns.*left out of `calls`"
    told(net(Dropping), own_family(Dropping), said)
    told(net(Dropping).train(), own_family(Dropping), said)
    first, second = sites()
    both = tuple(replace(site, calls=(*site.calls, "rate")) for site in (first, second))
    register_family(replace(with_stack(layer=Dropping, sites=both)), replace=True)
    bare, model = net(Dropping).train(), net(Dropping).train()
    torch.manual_seed(0)
    fresh_seed()  # of what the scheme draws; what is tried on the way draws from other generators
    state = torch.get_rng_state()
    torch.manual_seed(0)
    resformer.patch(model, "identity")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    expected = bare(IDS)
    torch.manual_seed(1)
    assert torch.equal(model(IDS), expected)


class Counting(Net):
    """BatchNorm moves in training, and fails where there is one value a channel."""

    def __init__(self):
        super().__init__()
        self.batch = nn.BatchNorm1d(16)

    def forward(self, ids):
        x, mask = self.embed(ids), torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.batch(self.norm(x).flatten(0, 1)))


@pytest.mark.parametrize("ids", [IDS, IDS[:1, :1]], ids=["many", "one"])
def test_what_moves_in_training_is_put_back(ids):
    register_family(replace(own_family(), probe=lambda model: model(ids)))
    model = Counting().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    resformer.unpatch(resformer.patch(model, "highway"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


class Weighing(Attention):
    """Returns two things beside its output."""

    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        return y, y.mean(-1), y.sum(-1)


class Returning(Block):
    form = staticmethod(lambda x, weights: (x, weights))

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.attn = Weighing(width, heads)

    def forward(self, x, mask=None):
        y, weights, _ = self.attn(self.norm1(x), mask=mask)
        x = x + y
        return self.form(x + self.mlp(self.norm2(x)), weights)


class Gathering(Net):
    def __init__(self):
        super().__init__(Returning)

    def forward(self, ids):
        x, mask = self.embed(ids), torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for block in self.blocks:
            out = block(x, mask)
            x = out if isinstance(out, torch.Tensor) else out["x"] if isinstance(out, dict) else out[0]
        return self.head(self.norm(x))


RETURNS = {
    "nothing": ((), None, "returns a tuple of 2, and the family says nothing of what follows .*`Stack.returns`"),
    "another element": (
        (("attn", 2),),
        None,
        r"element 1 of what layer 0 .* a tensor \(2, 8\), and by `returns` it is",
    ),
    "no element": ((("attn", 5),), None, "element 5 of what site 'attn' returned: None"),
    "another site": ((("ffn", 1),), None, "element 1 of what site 'ffn' returned: None"),
    "too many": ((("attn", 1), ("attn", 2)), None, r"element 2 of what layer 0 .* is None.*: a tensor \(2, 8\)"),
    "a tensor": ((("attn", 1),), lambda x, weights: x, "returns a tensor, its states alone, and `returns` names"),
    "a tuple of one": ((), lambda x, weights: (x,), "returns a tuple of 1, its states alone, which .* cannot describe"),
    "a dict": ((), lambda x, weights: {"x": x}, "returns a dict, which a family cannot describe"),
}


@pytest.mark.parametrize("what", list(RETURNS))
def test_what_layers_return_beside_their_states_is_compared(monkeypatch, what):
    returns, form, message = RETURNS[what]
    with monkeypatch.context() as patched:
        if form:
            patched.setattr(Returning, "form", staticmethod(form))
        told(Gathering().eval(), own_family(Returning, returns=returns), message)
    register_family(own_family(Returning, returns=(("attn", 1),)), replace=True)
    resformer.patch(Gathering().eval(), "highway")


class Silent(Block):
    """Branches that begin as nothing."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.attn, self.mlp = (nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in "ab")
        for branch in (self.attn, self.mlp):
            for p in branch[2].parameters():
                nn.init.zeros_(p)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SilentNet(Net):
    def __init__(self):
        super().__init__(Silent)
        for block in self.blocks:
            for branch in (block.attn, block.mlp):
                branch[2].bias = None

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def test_branches_that_begin_as_nothing_hide_no_mistake():
    first, second = (
        Site(name, (path,), {"pre": norm}) for name, path, norm in (("attn", "attn", "norm1"), ("ffn", "mlp", "norm2"))
    )
    told(
        SilentNet().eval(),
        with_stack(
            layer=Silent, sites=(replace(first, norms=second.norms), replace(second, norms=first.norms)), embeddings=()
        ),
        "it computes something else",
    )
    register_family(with_stack(layer=Silent, sites=(first, second)), replace=True)
    resformer.patch(SilentNet(), "highway")


class Side(Block):
    def forward(self, x, mask=None):
        return (x + self.attn(self.norm1(x), mask=mask)) + self.mlp(self.norm1(x))


def test_sums_in_another_order_are_told_as_such():
    both = parallel(ATTN, FFN, norms={"pre": "norm1", "pre_ffn": "norm2"})
    model = net(Side).float()
    for block in model.blocks:
        block.norm2 = block.norm1
    told(model, with_stack(layer=Side, sites=(both,)), r"equal up to rounding.*\(x \+ a\) \+ m")


def test_errors_about_a_model_of_ones_own_speak_of_it():
    register_family(with_stack(sites=(FFN, ATTN)))
    with pytest.raises(
        ValueError, match=r"first in what layer 0 of the encoder returns.*with the forward of the layer"
    ) as error:
        resformer.patch(net(), "highway")
    assert "transformers" not in str(error.value)


def test_arguments_that_are_not_tried_are_named():
    class Without(Net):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    register_family(own_family())
    with pytest.warns(UserWarning, match="gives the layers of the encoder no 'mask'.*have the probe"):
        resformer.patch(Without(), "highway")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resformer.patch(net(), "highway")


NO_SHAPE = {
    "a norm": ({"o": Projection("norm1")}, "point 'o' is 'norm1', a LayerNorm, which is no linear map"),
    "a module": ({"o": Projection("attn")}, "a Attention, which is no linear map"),
    "up for down": ({"o": Projection("mlp.0")}, "point 'o' is 'mlp.0', which gives 24, and the stream is 16 wide"),
    "down for up": ({"q": Projection("mlp.2")}, "point 'q' is 'mlp.2', which takes 24, and the stream is 16 wide"),
    "parts": ({"q": Projection("attn.qkv", 0, 5)}, "a part of 5 of 'attn.qkv', which gives 48"),
    "forgotten parts": ({"v": Projection("attn.qkv"), "o": Projection("attn.out")}, "is 'attn.qkv' fused"),
    "equal parts": (POINTS | {"k": POINTS["q"]}, "points 'q' and 'k' are both 'attn.qkv', part 0 of 3"),
    "unequal parts": (POINTS | {"v": Projection("attn.qkv", 1, 2)}, "points 'q' and 'v' are slices of 'attn.qkv'"),
}


@pytest.mark.parametrize("what", list(NO_SHAPE))
def test_points_have_the_shape_of_what_they_are_named_as(what):
    points, message = NO_SHAPE[what]
    told(net(), with_site(points=points), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": ("norm",)}, "'norm' of `embeddings` is a LayerNorm, which is no table"),
        ({"embeddings": ("narrow",)}, "'narrow' of `embeddings` is 8 wide, and the stream is 16 wide"),
        ({"final_norm": "head"}, "`final_norm` is 'head', a Linear, which is no norm"),
        ({"embed_norm": "embed"}, "`embed_norm` is 'embed', a Embedding, which is no norm"),
    ],
)
def test_what_stands_around_the_layers_has_the_shape_of_it(change, message):
    model = net()
    model.narrow = nn.Embedding(4, 8).double()
    told(model, with_stack(**change), message)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("megatron_bert", {"final_norm": ""}, "'encoder.ln' is a norm of what the last layer of the encoder gives"),
        ("llama", {"final_norm": ""}, "'norm' is a norm of what the last layer of the decoder gives"),
        ("mpnet", {"embed_norm": ""}, "reads what the norm 'embeddings.LayerNorm' gives; name it in `embed_norm`"),
        ("gpt2", {"embed_norm": "ln_f"}, "does not read what the norm 'ln_f' gives; leave it out of `embed_norm`"),
    ],
)
def test_norms_before_and_behind_the_layers_are_where_the_family_says(monkeypatch, family, changes, message):
    known = families()[family]
    stacks = tuple(replace(stack, **changes) for stack in known.stacks)
    monkeypatch.setitem(registry._FAMILIES, family, replace(known, stacks=stacks))
    model = tiny_host(family)
    with refused(model, message):
        resformer.patch(model, "rezero")
