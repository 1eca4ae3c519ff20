"""ALBERT: one layer called at every depth, with a scheme of its own at each call; by hand in double precision."""

import copy
import math

import pytest
import torch
from reference import INSIDE, REFERENCES, slots_of
from test_trainer import make_trainer, patched
from transformers import (
    AlbertForPreTraining,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import resformer
from resformer.diagnostics.gradient_flow import gradient_norms
from resformer.host import find_host
from resformer.optim import param_groups, scheme_parameters
from resformer.schedule import progress
from resformer.schemes.placement import MixLN
from resformer.testing import mechanics
from resformer.testing.attention import Attention, heads_of
from resformer.testing.contract import check_learns, check_refuses, check_unpatch
from resformer.testing.hosts import HEADS, batch, checkpoint, keeps, randomize, stands, tiny_host
from resformer.testing.nets import Net, Site, nothing

CLASSIFY = AutoModelForSequenceClassification
LAYER = "encoder.albert_layer_groups.{}.albert_layers.{}"
SHAPES = {  # layers, groups, layers in a group: (group, layer) at each call
    (4, 1, 1): [(0, 0)] * 4,
    (3, 2, 1): [(0, 0), (0, 0), (1, 0)],
    (2, 1, 2): [(0, 0), (0, 1), (0, 0), (0, 1)],
    (3, 2, 2): [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1)],
}
SERVED = [name for name in REFERENCES if stands(name, "albert") and name not in INSIDE]
KEPT = [name for name in SERVED if keeps(name, {}, "albert")]
FEW = ["highway", "mix_ln", "denseformer", "mhc"]  # a gate, norms in two places, a history, streams


def shaped(shape=(4, 1, 1), auto=None, **changes):
    layers, groups, inner = shape
    make = {} if auto is None else {"auto": auto}
    return tiny_host("albert", layers=layers, num_hidden_groups=groups, inner_group_num=inner, **make, **changes)


def net_of_albert(model, given, calls, slots):
    """A patched ALBERT written out: the weights of its one layer at each depth, the scheme's of that depth; and what
    comes out of the embeddings."""
    w = model.state_dict()

    def linear(path, x):
        return x @ w[f"{path}.weight"].T + w[f"{path}.bias"]

    def norm(path):
        def run(x):
            centred = x - x.mean(-1, keepdim=True)
            return (
                centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{path}.weight"]
                + (w[f"{path}.bias"])
            )

        return run

    def feed_forward(at):
        def run(x):
            a = linear(f"{at}.ffn", x)
            gelu = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
            return linear(f"{at}.ffn_output", gelu)

        return run

    def attention(at, mask):
        def project(x):
            return tuple(heads_of(linear(f"{at}.attention.{m}", x), HEADS) for m in ("query", "key", "value"))

        made = Attention(nothing, project, lambda x: linear(f"{at}.attention.dense", x), mask)
        made.host = lambda x: made.with_values(x, lambda v: v)
        return made

    ids, real = given["input_ids"], given["attention_mask"].bool()
    mask = torch.zeros(real.shape, dtype=torch.float64).masked_fill(~real, -1e9)[:, None, None]
    tables = {name: w[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = tables["word"][ids] + tables["position"][: ids.shape[1]] + tables["token_type"][0]
    x = linear("encoder.embedding_hidden_mapping_in", norm("embeddings.LayerNorm")(x))

    layers, final = [], nothing
    for number, at in enumerate(LAYER.format(*call) for call in calls):
        row = []
        own = f"{at}.resformer.{number}"
        for name, host_norm in (("attn", f"{at}.attention.LayerNorm"), ("ffn", f"{at}.full_layer_layer_norm")):
            act = slots(number, len(calls), name)
            act, ends = act & {"pre", "out", "post"}, "final" in act
            native = "post" if "post" in act else min(act, default="")
            norms = {slot: norm(host_norm if slot == native else f"{own}.{name}_{slot}_norm") for slot in act}
            if ends and number == len(calls) - 1:
                final = norm(f"{own}.final_norm")
            p = {key.removeprefix(f"{own}.{name}."): v for key, v in w.items() if key.startswith(f"{own}.{name}.")}
            row.append(Site(attention(at, mask) if name == "attn" else feed_forward(at), p, **norms))
        layers.append(row)
    return Net(layers, final, real=real), x


@pytest.mark.parametrize(
    ("name", "init", "shape"),
    [(name, "paper", (3, 2, 1)) for name in SERVED]
    + [(name, "preserve", (3, 2, 1)) for name in [*KEPT, "hyper_connections"]]  # whose paper start scales weights
    + [(name, "paper", shape) for name in FEW for shape in SHAPES if shape != (3, 2, 1)],
)
def test_every_call_computes_the_update_with_parameters_of_its_own(name, init, shape):
    given = batch(padded=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resformer.patch(shaped(shape), name, init=init, verify=False)
    randomize(model)
    net, x = net_of_albert(model, given, SHAPES[shape], slots_of(name, init, "post"))
    net.init = init
    net.embed = getattr(find_host(model).stacks[0].residuals()[0], "embed_norm", net.embed)  # no norm of the host's
    with torch.no_grad():
        found, expected = model(**given).last_hidden_state, REFERENCES[name](net, x)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)


def test_the_hand_written_host_is_albert():
    """Else the comparison would be of two patched models; and its two groups of layers compute different things."""
    given, calls = batch(padded=True), SHAPES[3, 2, 2]
    host = shaped((3, 2, 2))
    real = given["attention_mask"].bool()
    for order, close in ((calls, True), (calls[:4] + calls[:2], False)):
        net, x = net_of_albert(host, given, order, slots_of("identity", "preserve", "post"))
        found = REFERENCES["identity"](net, x)[real]
        assert torch.allclose(found, host(**given).last_hidden_state[real], rtol=1e-10, atol=1e-10) == close


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "init", "said"),
    [
        ("deepnorm", "paper", r"'deepnorm' scales weights \(v, o, up, down\).*AlbertModel share.*init='preserve'"),
        ("hyper_connections", "paper", r"scales weights \(o, down\)"),
        ("depth_scaled", "preserve", r"scales weights \(branch\).*init='paper'"),
        ("t_fixup", "paper", "scales weights"),
        ("normformer", "paper", r"'normformer' acts inside the sublayers \(o, down\), which all layers.*AlbertModel"),
        ("hybrid_norm", "paper", r"acts inside the sublayers \(q, k, v\)"),
    ],
)
def test_what_one_set_of_weights_cannot_serve_is_refused(name, init, said):
    check_refuses("albert", name, {}, init)
    with pytest.raises(ValueError, match=said):
        resformer.patch(shaped(), name, init=init)


def test_calls_are_patched_all_at_once():
    host = shaped()
    with pytest.raises(ValueError, match="share their weights and can only be patched all at once; leave layers out"):
        resformer.patch(host, "highway", layers=range(2))
    assert not any("resformer" in name for name, _ in host.named_modules())


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1)])
def test_growing_is_refused_and_so_is_folding_of_shared_layers(shape):
    """Groups as many as depths share nothing, but have no list to add a layer to."""
    model = resformer.patch(shaped(shape), "layer_scale")
    randomize(model)
    expected = model(**batch()).last_hidden_state
    with pytest.raises(ValueError, match="whose layers have weights of their own; this AlbertModel is not one"):
        resformer.grow(model, 6)
    if shape == (4, 1, 1):
        with pytest.raises(ValueError, match="its layers share their weights, which cannot take on a factor for each"):
            resformer.fold(model)
    else:
        resformer.fold(model)
    torch.testing.assert_close(model(**batch()).last_hidden_state, expected, rtol=1e-10, atol=1e-10)


def test_gradient_flow_is_refused():
    model = resformer.patch(shaped(auto=CLASSIFY), "highway")
    with pytest.raises(ValueError, match=r"gradient_norms is for models of one stack.*'albert' is not one of them"):
        gradient_norms(model, batch(labels=True))


def test_gradient_checkpointing_is_what_it_is_without():
    for model in (shaped(), resformer.patch(shaped(), "denseformer")):
        with pytest.raises(ValueError, match="does not support"):
            checkpoint(model)


# ------------------------------------------------------------------------------------------------ what goes on working


@pytest.mark.parametrize("name", [*FEW, "value_residual", "ode"])
def test_mechanics(name):
    mechanics.check_hidden_states("albert", name, {})
    mechanics.check_copies("albert", name, {})
    mechanics.check_half_precision("albert", name, {})
    mechanics.check_round_trip("albert", name, {})
    check_unpatch("albert", name, {}, "paper")
    check_learns("albert", name, {}, "paper")


def test_compile_and_export():
    """The number of the call travels with the stream, and the attention is seen without its norm."""
    mechanics.check_compile("albert", "denseformer", {})
    mechanics.check_export("albert", "denseformer", {})


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_is_the_host_bit_for_bit_in_every_shape(shape):
    host, patched = (shaped(shape, dtype=torch.float32) for _ in range(2))
    resformer.patch(patched, "identity")
    given = batch(padded=True) | {"output_hidden_states": True, "output_attentions": True}
    expected, found = host(**given), patched(**given)
    for kind, more in (("hidden_states", 1), ("attentions", 0)):
        assert len(found[kind]) == len(expected[kind]) == len(SHAPES[shape]) + more
        assert all(torch.equal(f, e) for f, e in zip(found[kind], expected[kind], strict=True)), kind


@pytest.mark.parametrize(
    "auto", [AutoModelForMaskedLM, AutoModelForTokenClassification, AutoModelForQuestionAnswering, AlbertForPreTraining]
)
def test_heads(auto):
    make = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    host = make(shaped().config).eval()
    patched = resformer.patch(copy.deepcopy(host), "denseformer")
    expected, found = host(**batch(padded=True)), patched(**batch(padded=True))
    for one, other in zip(found.to_tuple(), expected.to_tuple(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_chunked_feed_forward():
    host, patched = (shaped(chunk_size_feed_forward=1) for _ in range(2))
    resformer.patch(patched, "highway")
    assert torch.equal(patched(**batch()).last_hidden_state, host(**batch()).last_hidden_state)


def test_parameters_are_keyed_by_call_and_learn_as_those_of_a_scheme():
    model = resformer.patch(shaped((3, 2, 1)), "rezero")
    keys = [key for key in model.state_dict() if ".resformer." in key]
    layers = [LAYER.format(group, 0) for group in (0, 1)]
    assert keys == [
        f"{layers[0]}.resformer.0.attn.a",
        f"{layers[0]}.resformer.1.attn.a",
        f"{layers[1]}.resformer.2.attn.a",
    ]
    ours = scheme_parameters(model)
    assert {id(p) for p in ours} == {id(model.get_parameter(key)) for key in keys}
    groups = {group["name"]: group for group in param_groups(model, 1e-3)}
    assert {id(p) for p in groups["scheme"]["params"]} == {id(p) for p in ours}


def test_norms_are_frozen_that_no_call_uses(monkeypatch):
    """And counted once."""
    names = [name for name, _ in shaped().named_parameters() if "LayerNorm.w" in name or "layer_norm.w" in name][1:]
    assert len(names) == 2
    host = shaped()
    patched = resformer.patch(host, "rezero", init="paper")  # without norms
    assert not any(patched.get_parameter(name).requires_grad for name in names)
    assert "4 parameters of the host's norms: kept, not trained" in str(resformer.describe(patched))
    resformer.unpatch(patched)
    assert all(p.requires_grad for p in patched.parameters())
    resformer.patch(host, "mix_ln", init="paper", share=0.5)
    assert all(p.requires_grad for p in host.parameters())
    resformer.unpatch(host)
    monkeypatch.setattr(MixLN, "norms", lambda self: {"post"} if self.place.layer == 2 else set())
    resformer.patch(host, "mix_ln", init="paper")
    assert all(p.requires_grad for p in host.parameters())


def test_the_description_counts_calls():
    text = str(resformer.describe(resformer.patch(shaped((3, 2, 2)), "highway")))
    assert "family albert (post-LN), 6 layers" in text
    assert "0 to 5 of 6, sites: attn, ffn" in text
    assert "after the add: attention.LayerNorm" in text
    assert "bit-equal to the host" in text


def test_calibration_sets_each_call_from_data():
    """admin: w² = 1, then Var(w x) + Var(F(x)) at the site before."""
    given = batch(padded=True)
    model = resformer.calibrate(resformer.patch(shaped((3, 2, 1)), "admin", init="paper"), given)
    net, x = net_of_albert(model, given, SHAPES[3, 2, 1], slots_of("admin", "paper", "post"))
    real, w2 = given["attention_mask"].bool(), 1.0
    with torch.no_grad():
        for site in net.sites:
            torch.testing.assert_close(site.p["w"], torch.full((16,), w2**0.5, dtype=torch.float64))
            y = site.branch(x)
            w2 = float((site.p["w"] * x)[real].var(correction=0) + y[real].var(correction=0))
            x = site.post(site.p["w"] * x + y)
    assert w2 != 1.0


def test_trainer_moves_the_schedules_of_all_calls(tmp_path):
    model = patched("albert", "branch_norm")
    resformer.set_progress(model, 0)
    make_trainer(model, tmp_path).train()
    assert progress(model) == 6
    saved = resformer.from_pretrained(tmp_path / "checkpoint-6", CLASSIFY)
    for key, value in model.state_dict().items():
        assert torch.equal(saved.state_dict()[key], value), key


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # what PEFT itself does
@pytest.mark.parametrize("name", ["highway", "mhc"])
def test_lora_trains_and_saves_every_call(tmp_path, name):
    peft = pytest.importorskip("peft")
    settings = {"task_type": "SEQ_CLS", "target_modules": "all-linear", "modules_to_save": ["resformer"]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resformer.patch(shaped((3, 2, 1), auto=CLASSIFY), name, init="paper")
    bare, before = copy.deepcopy(model), model(**batch()).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    torch.testing.assert_close(adapted(**batch()).logits, before, rtol=1e-12, atol=1e-12)
    assert "3 layers" in str(resformer.describe(adapted.base_model.model))
    adapted.train()(**batch(labels=True)).loss.backward()
    trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    assert any("lora" in key and "attention.query" in key for key in trained)
    assert {key.split(".resformer.")[1].split(".")[2] for key in trained if "resformer" in key} == {"0", "1", "2"}
    assert all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
    after = adapted.eval()(**batch()).logits
    assert (after - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    torch.testing.assert_close(again(**batch()).logits, after, rtol=1e-12, atol=1e-12)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, after, rtol=1e-9, atol=1e-9)
    resformer.unpatch(merged)
    assert merged.state_dict().keys() == shaped((3, 2, 1), auto=CLASSIFY).state_dict().keys()


def test_as_many_groups_as_depths_share_nothing():
    """Then it is a host like any other: weights may be scaled, and ranges patched."""
    host = shaped((3, 3, 1))
    expected = host(**batch()).last_hidden_state
    for change in ({"scheme": "deepnorm", "init": "paper"}, {"scheme": "highway", "layers": range(1, 3)}):
        resformer.patch(host, **change)
        assert not [key for key in host.state_dict() if ".resformer.1." in key]
        resformer.unpatch(host)
        assert torch.equal(host(**batch()).last_hidden_state, expected)
