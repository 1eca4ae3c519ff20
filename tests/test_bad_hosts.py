"""Hosts that cannot be patched, and specs that are wrong: each is one clear error, and the model stays as it was."""

import socket
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_own_models import IDS, POINTS, Attention, Block, Net, PostBlock, net, own_family, registered, sites  # noqa: F401
from test_patching import assert_same, snapshot
from torch import distributed, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    JambaConfig,
    T5Config,
    T5EncoderModel,
)
from transformers.models.bart.modeling_bart import BartForCausalLM

import resformer
from resformer import families
from resformer.hosts import Family, Projection, Site, Stack, parallel, register_family
from resformer.hosts import family as registry
from resformer.layer import Residual
from resformer.testing import check_family
from resformer.testing.hosts import batch, perturb, randomize, tiny_host

CLASSIFY = AutoModelForSequenceClassification


@contextmanager
def refused(model, message):
    """One `ValueError`, after which the model is what it was."""
    before = seen(model)
    with pytest.raises(ValueError, match=message):
        yield
    assert_same(seen(model), before)


def seen(model) -> dict:
    if hasattr(model, "config"):
        return snapshot(model)
    model.config = JambaConfig()  # a plain module has none, and `snapshot` looks at it
    try:
        return snapshot(model)
    finally:
        del model.config


# ------------------------------------------------------------------------------------------------ specs, by themselves


def with_stack(**changes) -> Family:
    family = own_family()
    return replace(family, stacks=(replace(family.stacks[0], **changes),))


def with_site(**changes) -> Family:
    first, second = sites()
    return with_stack(sites=(replace(first, **changes), second))


ATTN, FFN = sites()
WRONG = {
    "no stack": (replace(own_family(), stacks=()), "at least one stack"),
    "no site": (with_stack(sites=()), "at least one stack, and each stack a site"),
    "stack name": (with_stack(name="encodr"), "unknown stack 'encodr'.*Did you mean 'encoder'"),
    "two stacks of one name": (replace(own_family(), stacks=own_family().stacks * 2), "'encoder' is there twice"),
    "layer": (with_stack(layer="Block"), "class of modules, or its full name.*got 'Block'"),
    "an instance as layer": (with_stack(layer=Block(4, 1)), "class of modules, or its full name"),
    "layers": (with_stack(layers=""), "path of the list of layers"),
    "site twice": (with_stack(sites=(ATTN, ATTN)), "'attn' is there twice"),
    "call twice": (with_stack(sites=(ATTN, replace(FFN, calls=("attn",)))), "first calls.*'attn' is there twice"),
    "site name": (with_site(name="block"), "a name that is not taken"),
    "slot": (with_site(norms={"before": "norm1"}), "unknown slot 'before' of `norms` of site 'attn' of family 'mine'"),
    "norm twice": (with_site(norms={"pre": "norm1", "out": "norm1"}), "'norm1' is there twice"),
    "a stack alone": (
        replace(own_family(), stacks=own_family().stacks[0]),
        "`stacks` of .* must be a tuple",
    ),
    "a site alone": (
        with_stack(sites=ATTN),
        r"`sites` of .* must be a tuple, \(Site\(...\), ...\), got Site",
    ),
    "calls": (with_site(calls="attn"), r"`calls` of site 'attn' .* must be a tuple, \(path, ...\), got 'attn'"),
    "no calls": (with_site(calls=()), "needs `calls`, a tuple of paths"),
    "norms as a path": (
        with_site(norms="norm1"),
        r"`norms` of site 'attn' .* must be \{name: path, ...\}",
    ),
    "a point as a path": (with_site(points={"q": "attn.q"}), r"must be \{name: Projection\(...\), ...\}"),
    "point": (with_site(points={"query": POINTS["q"]}), "unknown point 'query' of site 'attn'"),
    "part": (with_site(points={"q": Projection("attn.qkv", 3, 3)}), "part 3 of 3"),
    "ends elsewhere": (with_site(ends="mlp.0", norms={"post": "attn.n"}), "must be children of its first call 'attn'"),
    "ends without a norm": (with_site(ends="attn.out", norms={}), "must be children of its first call"),
    "returns": (with_stack(returns=(("atn", 1),)), "unknown site 'atn' of `returns`.*Did you mean 'attn'"),
    "returns the states": (with_stack(returns=(("attn", 0),)), "after the states, from 1 on; got 0"),
    "a name that is no text": (replace(own_family(), name=3), "needs a name, a string, got 3"),
    "no name": (replace(own_family(), name=""), "needs a name"),
    "a list of values": (replace(own_family(), only=["x"]), r"`only` of family 'mine' must be \{name: value"),
    "a probe that is called": (replace(own_family(), probe=IDS), "`probe` of family 'mine' must be a function or None"),
    "a path that is a number": (with_stack(layers=3), "`layers` of stack 'encoder' of family 'mine' must be a string"),
    "no path": (with_stack(final_norm=None), "`final_norm` of .* must be a string, got None"),
    "an order that is a list": (with_stack(order=[0, 1]), "`order` of .* must be a function or None"),
    "returns alone": (with_stack(returns=("attn", 1)), r"`returns` of .* a tuple, \(\(path, number\), ...\), got"),
    "between": (with_stack(between={"conv": "0"}), r"`between` of .* must be \{name: number, ...\}"),
    "a flag that is a word": (with_site(extra="yes"), "`extra` of site 'attn' .* must be True or False, got 'yes'"),
    "after": (with_site(after="clamp"), "`after` of site 'attn' .* must be a function or None"),
    "parts that are text": (
        with_site(points={"q": Projection("attn.qkv", 0, "3")}),
        "`parts` of a projection in `points` of site 'attn' .* must be a whole number, got '3'",
    ),
    "both kinds": (
        Family("mine", (own_family().stacks[0], Stack(layer=Net, layers="x", name="decoder", sites=sites("post")))),
        "norms after the add in one stack only",
    ),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_a_spec_that_no_model_can_fit_is_not_registered(what):
    family, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        register_family(family)
    assert "mine" not in families()


@pytest.mark.parametrize("name", sorted({*vars(Residual({}, {}, {})), "norm", "embed_norm", "training", "_x", ""}))
def test_a_site_is_not_called_what_its_layer_has_already(name):
    with pytest.raises(ValueError, match="a name that is not taken"):
        register_family(with_site(name=name))


def test_a_taken_name_leads_to_another_before_it_leads_to_a_replacement():
    register_family(own_family())
    with pytest.raises(ValueError, match=r"registered already.*give yours another name, or, to correct that one"):
        register_family(own_family(PostBlock))


def test_names_are_found_in_any_case():
    with pytest.raises(ValueError, match=r"unknown family 'BERT'\. Did you mean 'bert'"):
        check_family("BERT")


def test_only_families_are_registered():
    with pytest.raises(ValueError, match=r"takes a resformer\.hosts\.Family, got Stack"):
        register_family(own_family().stacks[0])
    with pytest.raises(ValueError, match=r"registered already, as 'bert'"):
        register_family(replace(families()["bert"], name="mine"))


# ------------------------------------------------------------------------------------------------ specs, on a model


def failing(model):
    raise RuntimeError("no such input")


MISFITS = {
    "path of a norm": (with_site(norms={"pre": "norm0"}), "'norm0' was not found in Block: no 'norm0'"),
    "path of a call": (with_site(calls=("attn", "drop")), "'drop' was not found in Block: no 'drop'"),
    "path of a point": (with_site(points={"q": Projection("attn.q")}), "'attn.q' was not found in Block"),
    "final norm": (with_stack(final_norm="ln"), "'ln' was not found in Net: no 'ln'"),
    "no final norm": (
        with_stack(final_norm=""),
        "'norm' is a norm of what the last layer .* gives; name it in `final_norm`",
    ),
    "a site is missing": (with_stack(sites=(ATTN,)), "says nothing of 'norm2' in its layers; add a site"),
    "the sites are in another order": (with_stack(sites=(FFN, ATTN)), "it computes something else"),
    "a norm is in another slot": (with_site(norms={"out": "norm1"}), "it computes something else .relative difference"),
    "an argument is not passed": (with_site(passes={}), "no site hands it on"),
    "a parameter that is not there": (with_site(passes={"msk": "mask"}), "the sublayers fail.*'msk'"),
    "no probe": (replace(own_family(), probe=None), "needs a `probe`"),
    "a probe that fails": (replace(own_family(), probe=failing), "probe of family 'mine' failed .* no such input"),
    "a probe of nothing": (replace(own_family(), probe=lambda model: None), "must return a tensor .* got a NoneType"),
    "a random probe": (replace(own_family(), probe=lambda m: m(IDS) + torch.rand(1)), "something else each time"),
    "a probe of NaN": (replace(own_family(), probe=lambda m: m(IDS) / 0 * 0), "no finite number"),
    "a probe beside the layers": (replace(own_family(), probe=lambda m: m.embed(IDS)), "comes 0 times by"),
}


@pytest.mark.parametrize("what", list(MISFITS))
def test_a_spec_that_does_not_fit_says_where(what):
    family, message = MISFITS[what]
    register_family(family)
    model = net()
    with refused(model, message):
        resformer.patch(model, "rezero")


def test_norms_that_are_taken_for_each_other_are_noticed_though_all_are_equal():
    first, second = sites()
    register_family(with_stack(sites=(replace(first, norms=second.norms), replace(second, norms=first.norms))))
    model = Net().eval()
    with refused(model, "it computes something else"):
        resformer.patch(model, "rezero")


def test_a_point_that_is_not_called_cannot_be_acted_inside_of():
    """As the `out_proj` of nn.MultiheadAttention, which reads its weight."""

    class Bare(nn.MultiheadAttention):
        def forward(self, x, mask=None):
            return super().forward(x, x, x, need_weights=False)[0]

    class Own(Block):
        def __init__(self, width, heads):
            super().__init__(width, heads)
            self.attn = Bare(width, heads, batch_first=True)

    attention = Site("attn", ("attn",), {"pre": "norm1"}, {"mask": "mask"}, points={"o": Projection("attn.out_proj")})
    register_family(with_stack(layer=Own, sites=(attention, FFN), heads="attn.num_heads"))
    model = net(Own)
    with refused(model, "does not call 'attn.out_proj' of layer 0 as a module"):
        resformer.patch(model, "normformer", init="paper")
    resformer.patch(model, "highway")


def test_what_stands_between_two_layers_is_told():
    class Reading(Net):
        def forward(self, ids):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x).mul(0.5)
            return self.head(self.norm(x))

    register_family(own_family())
    model = Reading()
    with refused(model, r"'hyper_connections' this Reading fails \(AttributeError: .*between two layers"):
        resformer.patch(model, "hyper_connections")
    resformer.patch(model, "highway")


def test_a_norm_that_cannot_be_made_anew():
    class Odd(nn.Module):
        def __init__(self, width, *, groups):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return self.weight * x

    class Own(Block):
        def __init__(self, width, heads):
            super().__init__(width, heads)
            self.norm1, self.norm2 = Odd(width, groups=2), Odd(width, groups=2)

    register_family(own_family(Own))
    model = net(Own)
    with refused(model, "a Odd of family 'mine' cannot be made from the width alone"):
        resformer.patch(model, "sandwich", init="paper")
    resformer.patch(model, "highway")


def test_the_wrong_variant_says_what_is_wanted(monkeypatch):
    only = replace(families()["bert"], name="other", only={"hidden_act": "relu"})
    model = tiny_host("bert")
    monkeypatch.delitem(registry._FAMILIES, "bert")
    register_family(only)
    with refused(model, r"family 'other' is for {'hidden_act': 'relu'}, and here it is {'hidden_act': 'gelu'}"):
        resformer.patch(model, "rezero")


# ------------------------------------------------------------------------------------------------ kinds of models


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


class FakeLinear(nn.Module):
    pass


def test_quantized_models_are_refused(monkeypatch):
    with warnings.catch_warnings():  # torch.ao is to move
        warnings.simplefilter("ignore")
        model = dynamic(tiny_host("bert", dtype=torch.float32))
    with pytest.raises(ValueError, match=r"quantized model .'encoder.layer.0.attention.self.query' is a torch.ao"):
        resformer.patch(model, "rezero")
    for module in ("bitsandbytes.nn.modules", "torchao.dtypes", "optimum.quanto.nn"):
        monkeypatch.setattr(FakeLinear, "__module__", module)
        model = tiny_host("bert")
        model.encoder.layer[0].intermediate.dense.quantized = FakeLinear()
        with refused(model, f"quantized model .* is a {module}.FakeLinear"):
            resformer.patch(model, "rezero")
    model = tiny_host("bert")
    model.is_quantized = True
    with refused(model, r"\(is_quantized\); patch the full-precision model"):
        resformer.patch(model, "rezero")
    model = tiny_host("bert")
    model.config.quantization_config = {"quant_method": "gptq"}
    with refused(model, r"\(config.quantization_config\)"):
        resformer.patch(model, "rezero")
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        model = tiny_host("bert")
        dense = model.encoder.layer[1].output.dense
        dense.weight = nn.Parameter(torch.zeros(16, 20, dtype=dtype), requires_grad=False)
        with pytest.raises(ValueError, match=f"'encoder.layer.1.output.dense.weight' is of {dtype}"):
            resformer.patch(model, "rezero")


def test_layerdrop_is_refused_where_a_stream_is_carried():
    for key in ("layerdrop", "encoder_layerdrop"):
        model = tiny_host("bert")
        setattr(model.config, key, 0.1)
        with refused(model, f"config.{key} = 0.1 leaves layers out"):
            resformer.patch(model, "denseformer")
        refusing = str(resformer.describe(model)).partition("refused by")[2]
        assert "denseformer" in refusing
        assert "rezero" not in refusing
        resformer.patch(model, "rezero")


def test_models_that_are_wrapped_or_shared_out_are_patched_before():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    mesh = init_device_mesh("cpu", (1,))

    def shard(model):
        for layer in model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        return model

    wrappers = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "DataParallel": nn.DataParallel,
        "FullyShardedDataParallel": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        "OptimizedModule": torch.compile,
    }
    try:
        for name, wrap in wrappers.items():
            with pytest.raises(ValueError, match=f"this {name} holds a model; patch the model itself before wrapping"):
                resformer.patch(wrap(tiny_host("bert")), "rezero")
        for model in (shard(tiny_host("bert")), fully_shard(tiny_host("bert"), mesh=mesh)):
            with pytest.raises(ValueError, match=r"is sharded .FSDP.; patch the model before fully_shard"):
                resformer.patch(model, "rezero")
        patched = shard(resformer.patch(tiny_host("bert"), "rezero"))
        with pytest.raises(ValueError, match=r"is sharded .FSDP.; unpatch the model before"):
            resformer.unpatch(patched)
        assert "rezero" in str(resformer.describe(patched))
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # what PEFT itself does
def test_adapters_are_put_on_after_patching():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    model = peft.get_peft_model(tiny_host("bert", CLASSIFY), lora)
    for wrapper in (model, model.base_model):
        with pytest.raises(ValueError, match=f"this {type(wrapper).__name__} holds a model; patch the model itself"):
            resformer.patch(wrapper, "rezero")


def test_a_forward_that_was_exchanged_is_noticed():
    """As accelerate does for mixed precision and for parts on several devices."""
    for pick in (lambda model: model, lambda model: model.bert, lambda model: model.bert.encoder.layer[1]):
        model = tiny_host("bert", CLASSIFY)
        module = pick(model)
        module.forward = module.forward
        with refused(model, "has a forward of its own"):
            resformer.patch(model, "rezero")


def test_compiled_in_place_is_compiled_anew():
    model = tiny_host("bert", CLASSIFY, dtype=torch.float32)
    model.compile(backend="eager")
    before = model(**batch()).logits
    resformer.patch(model, "plain", init="paper")
    expected = resformer.patch(tiny_host("bert", CLASSIFY, dtype=torch.float32), "plain", init="paper")(
        **batch()
    ).logits
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-2)
    torch._dynamo.reset()


def test_a_subclass_with_another_forward_is_refused():
    class Other(type(tiny_host("bert").encoder.layer[0])):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model = tiny_host("bert")
    for layer in model.encoder.layer:
        layer.__class__ = Other
    with refused(model, "no family describes this BertModel.*Other.*exact class.*register_family"):
        resformer.patch(model, "rezero")


# ------------------------------------------------------------------------------------------------ what is compared


def told(model, family, message, scheme="highway"):
    register_family(family, replace=family.name in families())
    with refused(model, message):
        resformer.patch(model, scheme)


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
    state = torch.get_rng_state()
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


# ------------------------------------------------------------------------------------------------ where layers lie


@pytest.mark.parametrize(
    "change", [{"root": "decodr"}, {"layers": "layrs"}, {"layer": f"{__name__}.Block"}, {"root": "encoder"}]
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


def test_values_of_the_first_layer_need_every_layer_too():
    model = tiny_host("opt")
    model.config.layerdrop = model.decoder.layerdrop = 0.5
    with pytest.raises(ValueError, match="needs every layer of a forward pass"):
        resformer.patch(model, "value_residual")


def test_a_part_of_a_model_leads_to_the_whole():
    with pytest.raises(ValueError, match=r"of family 't5', which looks for them at 'encoder\.block': patch the model"):
        resformer.patch(tiny_host("t5").encoder, "highway")


def test_an_unpatched_model_is_described_with_why_schemes_are_refused():
    text = " ".join(str(resformer.describe(tiny_host("albert"))).split())
    assert "normformer: acts inside the sublayers (o, down), which all layers of this AlbertModel share" in text
    model = resformer.patch(tiny_host("t5"), "highway", layers={"decoder": range(2)})
    text = " ".join(str(resformer.describe(model)).split())
    assert "encoder layers 3, not patched: as the host has them" in text
    assert "decoder layers 0 to 1 of 2" in text


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
