"""Hosts with attention and feed-forward side by side: one site a layer, x ← scheme(x, attn(N x) + ffn(N' x))."""

from dataclasses import replace

import pytest
import torch
from reference import REFERENCES, slots_of
from reference.net import Net, Site, Vector, layer_norm, nothing, once, tokenwise
from reference.placement import add
from test_patching import assert_same, snapshot
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    StableLmConfig,
    StableLmModel,
)

import resformer
from resformer import families
from resformer.edits import names_ends
from resformer.host import find_host
from resformer.hosts import family as registry
from resformer.support import refusal
from resformer.testing.hosts import HEADS, WIDTH, batch, gradients, randomize, tiny_host
from resformer.testing.mechanics import MECHANICS, check_compile, check_export

PARALLEL = ["gpt_neox", "phi", "gptj"]
ALL = [*PARALLEL, "gpt_neox_sequential"]
LAYERS = {"gpt_neox": "layers", "gpt_neox_sequential": "layers", "phi": "layers", "gptj": "h"}
ENDS = {  # "o" and "down"
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
}
PER_HEAD = WIDTH // HEADS


def layers_of(model, family):
    return model.base_model.get_submodule(LAYERS[family])


def patched(family, name, *args, init="paper", layers=3, options=None, **host):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resformer.patch(
            tiny_host(family, *args, layers=layers, **host), name, init=init, verify=False, **(options or {})
        )
    randomize(model)
    return model


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(padded=True))[0]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ------------------------------------------------------------------------------------------------ who is served

ONE_SITE = "here each layer has only one"
TWO_WAYS = "joins attention in one way and the feed-forward in another.*side by side"
REFUSED = {"b2t": ONE_SITE, "normformer": TWO_WAYS, "hybrid_norm": TWO_WAYS, "se_gate": "serves encoder stacks"}
VALUES = {"value_residual": "'gptj' names no site 'attn' that hands its attention all arguments"}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt_neox", REFUSED),
        ("phi", REFUSED),
        ("gptj", REFUSED | VALUES),
        ("gpt_neox_sequential", {"se_gate": REFUSED["se_gate"]}),
    ],
)
def test_every_scheme_is_served_or_refused_with_a_reason(family, expected):
    model = tiny_host(family)
    before, state = snapshot(model), torch.random.get_rng_state()
    found = {name: reason for name in resformer.schemes() if (reason := refusal(family, name, "paper"))}
    assert_same(snapshot(model), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.keys() == expected.keys()
    for name, reason in found.items():
        with pytest.raises(ValueError, match=expected[name]) as caught:
            resformer.patch(model, name, init="paper")
        assert str(caught.value) == reason
    for name in resformer.schemes().keys() - found.keys():
        resformer.unpatch(resformer.patch(model, name, init="paper"))
    assert_same(snapshot(model), before)


def test_the_configuration_tells_the_variants_apart():
    assert find_host(tiny_host("gpt_neox")).family.name == "gpt_neox"
    assert find_host(tiny_host("gpt_neox_sequential")).family.name == "gpt_neox_sequential"
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 20}
    model = StableLmModel(StableLmConfig(**small, num_hidden_layers=1, vocab_size=32, use_parallel_residual=True))
    with pytest.raises(ValueError, match=r"no family describes this StableLmModel.*StableLmDecoderLayer"):
        resformer.patch(model, "identity")


# ------------------------------------------------------------------------------------------------ the update


def norms_of(layer, family):
    return {
        "gpt_neox": lambda: [layer.input_layernorm, layer.post_attention_layernorm],
        "phi": lambda: [layer.input_layernorm],
        "gptj": lambda: [layer.ln_1],
    }[family]()


def attention_of(twin, layer, family, mask, x):
    positions = torch.arange(x.shape[1])[None]
    if family == "gptj":
        return lambda x: layer.attn(x, attention_mask=mask, position_ids=positions)[0]
    rotary = twin.rotary_emb(x, positions)
    attention = layer.attention if family == "gpt_neox" else layer.self_attn
    return lambda x: attention(x, attention_mask=mask, position_embeddings=rotary)[0]


def net_of(family, model, given, name, init) -> tuple[Net, torch.Tensor]:
    """A patched base model as a list of sublayers, one a layer, over a host with the same weights."""
    depth = model.config.num_hidden_layers
    twin = tiny_host(family, layers=depth, attention=model.config._attn_implementation)
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if ".resformer." not in key})
    wanted = slots_of(name, init, "pre")
    real, tokens = given["attention_mask"].bool(), given["input_ids"].shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None] & real[:, None, None]
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    x = twin.get_input_embeddings()(given["input_ids"])
    built, slots, first = [], set(), []
    for number, (layer, theirs) in enumerate(zip(layers_of(twin, family), layers_of(model, family), strict=True)):
        own, free = theirs.resformer, norms_of(layer, family)
        act = wanted(number, depth, "both")
        slots |= act
        act = act & {"pre", "out", "post"}
        norms = {}
        if "pre" in act:  # side by side as well, for schemes that act between the norm and the sublayers
            norms["pre"] = lambda x, pair=tuple(free): torch.cat([norm(x) for norm in pair], dim=-1)
            free = []
        for slot in sorted(act - {"pre"}):
            norms[slot] = free.pop(0) if free else getattr(own, f"both_{slot}_norm")
        if name == "sub_ln":
            norm_before(layer, family, own.both.state_dict())
        if name == "value_residual":
            mix_values(layer, family, own.both.state_dict(), first)
        attention = attention_of(twin, layer, family, mask, x)
        f = lambda z, attention=attention, mlp=layer.mlp: attention(z[..., :WIDTH]) + mlp(z[..., -WIDTH:])
        built.append([Site(f, own.both.state_dict(), **norms)])
    last = find_host(twin).stacks[0].spec.final_norm
    final = getattr(twin, last) if "final" in slots else nothing
    embed = layers_of(model, family)[0].resformer.embed_norm if "embed" in slots else nothing
    return Net(built, final, embed, init=init, real=real), x


class Before(nn.Module):
    """A linear map with a norm before it, written out."""

    def __init__(self, linear, weight, bias):
        super().__init__()
        self.linear, self.scale, self.shift = linear, weight.tolist(), bias.tolist()

    def forward(self, x):
        return self.linear(tokenwise(lambda v: layer_norm(v, self.scale, self.shift), x))


def norm_before(layer, family, p):
    for path, name in zip(ENDS[family], ("norm", "down_norm"), strict=True):
        parent, _, leaf = path.rpartition(".")
        linear = layer.get_submodule(path)
        setattr(layer.get_submodule(parent), leaf, Before(linear, p[f"{name}.weight"], p[f"{name}.bias"]))


class MixedValues(nn.Module):
    """A projection whose values are mixed with those of the first layer, channel by channel."""

    def __init__(self, linear, channels, p, first):
        super().__init__()
        self.linear, self.channels, self.p, self.first = linear, channels, p, first

    def forward(self, x):
        y = self.linear(x).clone()
        for i, c in enumerate(self.channels):
            if self.p:
                y[..., c] = self.p["a"].item() * self.first[i] + self.p["b"].item() * y[..., c]
            else:
                self.first.append(y[..., c].clone())
        return y


def mix_values(layer, family, p, first):
    if family == "phi":
        layer.self_attn.v_proj = MixedValues(layer.self_attn.v_proj, range(PER_HEAD), p, first)  # one head of values
        return
    channels = [head * 3 * PER_HEAD + 2 * PER_HEAD + i for head in range(HEADS) for i in range(PER_HEAD)]
    layer.attention.query_key_value = MixedValues(layer.attention.query_key_value, channels, p, first)


def deepnorm(net: Net, site: Site):
    """2 L sublayers, though L sites."""
    alpha = (2 * len(net.layers)) ** 0.25
    return lambda x, y: [alpha * a + b for a, b in zip(x, y, strict=True)]


LOOPS = REFERENCES | {"deepnorm": once(deepnorm), "value_residual": once(add)}  # the values: in the twin
SERVED = [name for name in resformer.schemes() if name not in REFUSED]
OPTIONS = {"scaled": {"shortcut": 0.7, "branch": 0.3}}  # by default the plain sum
SIX = ["rezero", "highway", "denseformer", "hyper_connections", "post_ln", "ode"]


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
def test_the_update_is_the_papers_on_the_sum_of_both(family, name):
    check_update(family, name, "paper", attention="sdpa", tolerance=1e-10)


@pytest.mark.parametrize("name", SIX[:4])
@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
def test_the_update_after_a_preserving_start(family, name):
    check_update(family, name, "preserve", attention="sdpa", tolerance=1e-10)


@pytest.mark.parametrize("name", SIX)
def test_the_update_on_gptj(name):
    check_update("gptj", name, "paper", attention="eager", tolerance=1e-5)  # it attends in single precision


def check_update(family, name, init, attention, tolerance):
    given = batch(padded=True)
    options = OPTIONS.get(name, {})
    model = patched(family, name, init=init, layers=5, attention=attention, options=options)
    host = tiny_host(family, layers=5, attention=attention)
    with torch.no_grad():
        net, x = net_of(family, model, given, name, init)
        net.options = options
        found, expected = model(**given)[0], LOOPS[name](net, x)
        real = given["attention_mask"].bool()
        torch.testing.assert_close(found[real], expected[real], rtol=tolerance, atol=tolerance)
        if name not in ("identity", "pre_ln", "drop_path", "dropout_shortcut"):
            assert relative(found[real], host(**given)[0][real]) > 1e-3, "the scheme must matter"


# ------------------------------------------------------------------------------------------------ norms


def test_norms_that_are_kept_moved_made_and_left_unused():
    for family, first, second in (
        ("gpt_neox", "input_layernorm", "post_attention_layernorm"),
        ("phi", "input_layernorm", None),
        ("gptj", "ln_1", None),
    ):
        both = {"pre": first} | ({"pre_ffn": second} if second else {})
        expected = {
            "identity": both,
            "pre_ln": both,
            "sandwich": both | {"out": "resformer.both_out_norm"},
            "keel": both | {"post": "resformer.both_post_norm"},
            "post_ln": {"post": first},
            "res_post_norm": {"out": first},
            "skip_init": {},
        }
        for name, acts in expected.items():
            model = resformer.patch(tiny_host(family), name, init="paper")
            for layer in layers_of(model, family):
                assert layer.resformer.acts == {"both": acts}, (family, name)
                for path in filter(None, (first, second)):
                    trained = {p.requires_grad for p in layer.get_submodule(path).parameters()}
                    assert trained == {path in acts.values()}, (family, name, path)
            model.train()(**batch(), use_cache=False)[0].square().sum().backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad), (family, name)
            resformer.unpatch(model)
            assert all(p.requires_grad for p in model.parameters())


def test_placement_moves_both_norms():
    model = resformer.patch(tiny_host("gpt_neox"), "layer_scale", init="paper", placement="sandwich")
    acts = layers_of(model, "gpt_neox")[0].resformer.acts["both"]
    assert acts == {
        "pre": "input_layernorm",
        "pre_ffn": "post_attention_layernorm",
        "out": "resformer.both_out_norm",
    }


# ------------------------------------------------------------------------------------------------ projections


class NormedHeads(nn.Module):
    """Queries, keys and values of each head normed, each with its own gain, by loops over the rows of the matrix."""

    def __init__(self, linear, gains):
        super().__init__()
        self.W, self.b, self.gains = linear.weight.tolist(), linear.bias.tolist(), gains.tolist()

    def rule(self, v: Vector) -> Vector:
        y = [sum(w * a for w, a in zip(row, v, strict=True)) + b for row, b in zip(self.W, self.b, strict=True)]
        for head in range(HEADS):
            for part in range(3):
                start = (3 * head + part) * PER_HEAD
                size = sum(y[start + i] ** 2 for i in range(PER_HEAD)) / PER_HEAD
                for i in range(PER_HEAD):
                    y[start + i] *= self.gains[part][i] / (size + 1e-5) ** 0.5
        return y

    def forward(self, x):
        rows = [self.rule(v) for v in x.reshape(-1, WIDTH).tolist()]
        return torch.tensor(rows, dtype=torch.float64).reshape(*x.shape[:-1], 3 * WIDTH)


def test_a_projection_fused_head_by_head_is_cut_so():
    """And the sequential variant, in which schemes may act inside: N(x + Attn'(x)), then x + F(x)."""
    model, twin = (tiny_host("gpt_neox_sequential", layers=3, attention="sdpa") for _ in range(2))
    resformer.patch(model, "hybrid_norm", init="paper")
    randomize(model)
    given = batch(padded=True)
    real, x = given["attention_mask"].bool(), twin.embed_in(given["input_ids"])
    seen = torch.ones(7, 7, dtype=torch.bool).tril()[None, None] & real[:, None, None]
    rotary = twin.rotary_emb(x, torch.arange(7)[None])
    with torch.no_grad():
        for layer, host in zip(model.layers, twin.layers, strict=True):
            gain = layer.resformer.attn.gain
            assert len({tuple(row) for row in gain.tolist()}) == 3
            projection = NormedHeads(host.attention.query_key_value, gain)
            found, expected = layer.attention.query_key_value(x), projection(x)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            host.attention.query_key_value = projection
            attended = host.attention(x, attention_mask=seen, position_embeddings=rotary)[0]
            x = host.input_layernorm(x + attended)
            x = x + host.mlp(x)
        found = model(**given)[0]
    torch.testing.assert_close(found[real], twin.final_layer_norm(x)[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("name", ["deepnorm", "sub_ln", "fixup"])
def test_weights_are_scaled_by_what_two_sublayers_a_layer_ask_for(family, name):
    """With three layers, 6 sublayers, whether they stand side by side or not."""
    n = 6
    beta, gain = (4 * n) ** -0.25, torch.tensor(n).double().log().sqrt().item()
    gains = {
        "deepnorm": {"q": 1.0, "k": 1.0, "v": beta, "o": beta, "up": beta, "down": beta},
        "sub_ln": {"q": 1.0, "k": 1.0, "v": gain, "o": gain, "up": gain, "down": gain},
        "fixup": dict.fromkeys("qkv", n ** (-1 / 6)) | {"o": 0.0, "up": n**-0.5, "down": 0.0},
    }[name]
    host = tiny_host(family, layers=3)
    model = resformer.patch(tiny_host(family, layers=3), name, init="paper")
    for before, after in zip(layers_of(host, family), layers_of(model, family), strict=True):
        for path, rows in rows_of(family).items():
            theirs, found = before.get_submodule(path).weight, after.get_submodule(path).weight
            assert len(rows) == len(theirs)
            for row, role in enumerate(rows):
                torch.testing.assert_close(found[row], gains[role] * theirs[row], rtol=1e-12, atol=0)
    if name == "deepnorm":
        alphas = {scheme.alpha for layer in layers_of(model, family) for scheme in layer.resformer.schemes}
        assert alphas == {n**0.25}
    resformer.unpatch(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), host.parameters(), strict=True))


def rows_of(family: str) -> dict[str, list[str]]:
    """The role of each row of each weight, by hand."""
    wide = ["up"] * 20
    if family.startswith("gpt_neox"):
        fused = [role for _ in range(HEADS) for role in ["q"] * PER_HEAD + ["k"] * PER_HEAD + ["v"] * PER_HEAD]
        o, down = ENDS["gpt_neox"]
        return {"attention.query_key_value": fused, o: ["o"] * WIDTH, "mlp.dense_h_to_4h": wide, down: ["down"] * WIDTH}
    attention, up = ("self_attn", "mlp.fc1") if family == "phi" else ("attn", "mlp.fc_in")
    heads = {"q": HEADS, "k": 1, "v": 1} if family == "phi" else dict.fromkeys("qkv", HEADS)
    single = {f"{attention}.{role}_proj": [role] * heads[role] * PER_HEAD for role in "qkv"}
    o, down = ENDS[family]
    return single | {o: ["o"] * WIDTH, up: wide, down: ["down"] * WIDTH}


def test_a_branch_is_scaled_only_where_both_its_ends_are_named(monkeypatch):
    assert all(names_ends(site) for name in ALL for site in families()[name].stacks[0].sites)
    phi = families()["phi"]
    (site,) = phi.stacks[0].sites
    attention, feed_forward = site.parts
    half = resformer.hosts.parallel(attention, replace(feed_forward, points={}), norms=site.norms)
    assert not names_ends(half)
    monkeypatch.setitem(registry._FAMILIES, "phi", replace(phi, stacks=(replace(phi.stacks[0], sites=(half,)),)))
    with pytest.raises(ValueError, match="scales the weights of branch, which family 'phi' does not name"):
        resformer.patch(tiny_host("phi"), "depth_scaled")
    model = patched("phi", "layer_scale", init="preserve")
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not name the projection that site 'both' ends with"):
        resformer.fold(model)
    with pytest.raises(ValueError, match="does not name the projection that site 'both' ends with"):
        resformer.grow(model, 4)
    assert_same(snapshot(model), before)


# ------------------------------------------------------------------------------------------------ folding, growing

FOLDS = {
    "layer_scale": "preserve",
    "depth_scaled": "paper",
    "drop_path": "preserve",
    "ln_scaling": "paper",
    "pro_res": "preserve",
    "gpas": "preserve",
}


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("family", PARALLEL)
def test_folded_into_both_sublayers(family, name):
    model = patched(family, name, init=FOLDS[name])
    if name == "gpas":
        expected, before = output(model), snapshot(model)
        with pytest.raises(ValueError, match="cannot be folded"):
            resformer.fold(model)
        assert_same(snapshot(model), before)
        assert torch.equal(output(model), expected)
        return
    expected, plain = output(model), tiny_host(family, layers=3)
    assert relative(expected, output(plain)) > 1e-3 or name == "drop_path"
    resformer.fold(model)
    tolerance = 1e-6 if family == "gptj" else 1e-10  # GPT-J attends in single precision
    assert relative(output(model), expected) <= tolerance
    assert model.state_dict().keys() == plain.state_dict().keys()
    changed = {key for key, value in plain.state_dict().items() if not torch.equal(value, model.state_dict()[key])}
    if name in ("layer_scale", "depth_scaled", "pro_res"):
        kinds = ("weight", "bias")
        assert changed == {
            f"{LAYERS[family]}.{layer}.{path}.{kind}" for layer in range(3) for path in ENDS[family] for kind in kinds
        } & set(plain.state_dict())
    if name == "ln_scaling":  # layer 1 is not scaled
        assert all("norm" in key or "ln_1" in key for key in changed)
        assert len(changed) == 2 * 2 * (2 if family == "gpt_neox" else 1)


@pytest.mark.parametrize("name", ["identity", "rezero", "layer_scale", "denseformer", "sandwich"])
@pytest.mark.parametrize("family", ALL)
def test_grown_to_the_bit(family, name):
    model = patched(family, name, AutoModelForSequenceClassification, layers=2)
    expected = output(model)
    resformer.grow(model, 4)
    assert torch.equal(output(model), expected)
    assert len(layers_of(model, family)) == model.config.num_hidden_layers == 4
    model.train()(**batch(labels=True), use_cache=False).loss.backward()
    top = layers_of(model, family)[-1]
    ends = [top.get_submodule(path).weight.grad for path in ENDS[family.removesuffix("_sequential")]]
    own = [p.grad for p in top.resformer.parameters()]
    assert any(grad is not None and bool(grad.any()) for grad in (*ends, *own)), "the new layers learn"


def test_post_ln_cannot_grow():
    model = patched("phi", "post_ln", layers=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot grow"):
        resformer.grow(model, 3)
    assert_same(snapshot(model), before)


# ------------------------------------------------------------------------------------------------ around the host


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForTokenClassification])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neox_sequential", "phi"])
def test_identity_under_other_heads_and_with_a_cache(family, auto):
    make = {"dtype": torch.float32, "layers": 3}
    host, model = tiny_host(family, auto, **make), resformer.patch(tiny_host(family, auto, **make), "identity")
    given = batch(padded=True) | {"use_cache": True}
    expected, found = host(**given), model(**given)
    assert torch.equal(found.logits, expected.logits)
    if auto is AutoModelForCausalLM:
        mask = torch.cat([given["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        step = {"input_ids": torch.tensor([[4], [5]]), "attention_mask": mask}
        again = [m(**step, past_key_values=o.past_key_values) for m, o in ((host, expected), (model, found))]
        assert torch.equal(again[0].logits, again[1].logits)
        assert again[0].past_key_values.get_seq_length() == again[1].past_key_values.get_seq_length() == 8


@pytest.mark.parametrize("name", ["highway", "denseformer", "hyper_connections", "value_residual", "sub_ln"])
@pytest.mark.parametrize("family", ALL)
def test_generates_with_a_cache_what_it_does_without(family, name):
    if (family, name) == ("gptj", "value_residual"):
        pytest.skip("refused")
    model = patched(family, name, AutoModelForCausalLM)
    given = {"input_ids": batch()["input_ids"], "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**given, use_cache=True)
    assert torch.equal(cached, model.generate(**given, use_cache=False))
    calls = []
    layers_of(model, family)[0].register_forward_hook(lambda module, args, out: calls.append(args[0][0].shape))
    model.generate(**given, use_cache=True)
    assert [shape[-2] for shape in calls] == [7, 1, 1, 1, 1, 1], "the cache must be used"


@pytest.mark.parametrize("family", PARALLEL)
def test_a_scheme_that_calls_its_branches_twice_refuses_a_cache(family):
    model = patched(family, "ode", AutoModelForCausalLM)
    assert model.config.use_cache is False
    with pytest.raises(ValueError, match="a KV cache cannot follow"):
        model(**batch(), use_cache=True)


MECHANICAL = [
    ("gpt_neox", "denseformer"),
    ("gpt_neox", "post_ln"),
    ("gpt_neox_sequential", "hybrid_norm"),
    ("phi", "hyper_connections"),
    ("phi", "sub_ln"),
    ("phi", "ode"),
    ("gptj", "rezero"),
    ("gptj", "denseformer"),
]


@pytest.mark.parametrize("check", MECHANICS)
@pytest.mark.parametrize(("family", "name"), MECHANICAL)
def test_mechanics(family, name, check):
    MECHANICS[check](family, name, {})


@pytest.mark.parametrize(
    ("family", "name"), [pytest.param("gpt_neox", "denseformer", marks=pytest.mark.slow), ("phi", "value_residual")]
)
def test_compiles_and_exports(family, name):
    check_compile(family, name, {})
    check_export(family, name, {})


def test_tied_embeddings_are_scaled_once_and_come_back(tmp_path):
    host = tiny_host("phi", AutoModelForCausalLM, tie_word_embeddings=True)
    model = resformer.patch(tiny_host("phi", AutoModelForCausalLM, tie_word_embeddings=True), "t_fixup", init="paper")
    gain = (9 * 2) ** -0.25
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight, gain * host.lm_head.weight, rtol=1e-12, atol=0)
    model.save_pretrained(tmp_path)
    loaded = resformer.from_pretrained(tmp_path, AutoModelForCausalLM).double()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits, rtol=1e-6, atol=1e-6)
    resformer.unpatch(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), host.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # what PEFT itself does
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt_neox", ["query_key_value", "dense"]),
        ("phi", ["q_proj", "v_proj", "dense"]),
        ("gptj", ["q_proj", "out_proj", "fc_in"]),
    ],
)
def test_lora(family, targets):
    peft = pytest.importorskip("peft")
    model = patched(family, "rezero", AutoModelForSequenceClassification)
    before = model(**batch()).logits
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, modules_to_save=["resformer"])
    adapted = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(adapted(**batch()).logits, before, rtol=1e-6, atol=1e-6)
    adapted.train()(**batch(labels=True), use_cache=False).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {target for target in targets for name in trained if f".{target}.lora" in name} == set(targets)
    assert sum("resformer" in name for name in trained) == 3
    assert all(gradient is not None for name, gradient in gradients(adapted).items() if name in trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if name in trained:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    after = adapted.eval()(**batch()).logits
    assert (after - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, after, rtol=1e-6, atol=1e-6)
