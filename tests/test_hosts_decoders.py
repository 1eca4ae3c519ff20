"""Decoders of Llama's kind and OPT: caches, windows, shared keys, norms with an offset, heads, adapters."""

import copy
import math
import warnings

import pytest
import torch
from reference import INSIDE, REFERENCES, slots_of
from reference.decoders import NATIVE, net_of_decoder
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)
from transformers.utils import logging

import resformer
from resformer.edits import offset_of
from resformer.host import find_host
from resformer.layer import find
from resformer.testing.hosts import (
    HEADS,
    TOKENS,
    WIDTH,
    batch,
    checkpoint,
    exact,
    randomize,
    stands,
    tiny_config,
    tiny_host,
)
from resformer.testing.mechanics import MECHANICS, check_compile

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3", "olmo2", "olmo3"]
DECODERS += ["opt", "opt_post"]
OFFSET = ["gemma", "gemma2", "gemma3"]  # their norms multiply with 1 + w
CAUSAL = AutoModelForCausalLM
HARD = {  # what large models have: narrow heads that share keys, scores that are capped, windows
    "llama": {"head_dim": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2": {"head_dim": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 5}
    | {"attn_logit_softcapping": 2.0},
}


def patched(family: str, name: str, auto=AutoModel, *, init="paper", options=None, **changes):
    """A host patched with trained-like parameters."""
    model = tiny_host(family, auto, **changes)
    resformer.patch(model, name, init=init, verify=False, **(options or {}))
    randomize(model)
    return model


def output(model, **given) -> torch.Tensor:
    """Of a copy: sums of products may round otherwise where weights lie in memory as a file had them."""
    with torch.no_grad():
        return copy.deepcopy(model)(**batch(padded=True), **given)[0]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).detach().abs().max() / expected.double().detach().abs().max())


def layers_of(model):
    return find_host(model).layers


# ------------------------------------------------------------------------------------------------ the update by hand

GAINS = {  # what a scheme multiplies at init="paper", with three layers
    "sub_ln": dict.fromkeys(("v", "o", "up", "down"), math.sqrt(math.log(6))),
    "deepnorm": dict.fromkeys(("v", "o", "up", "down"), (8 * 3) ** -0.25),
    "hyper_connections": dict.fromkeys(("o", "down"), 4**-0.5),
    "b2t": dict.fromkeys(("q", "k", "v", "o", "up", "down"), 3**-0.5),
    "fixup": dict.fromkeys(("q", "k", "v"), 6 ** (-1 / 6)) | {"up": 6**-0.5, "o": 0.0, "down": 0.0},
    "t_fixup": dict.fromkeys(("v", "o", "up", "down", "embed"), (9 * 3) ** -0.25),
}


def scaled(weights: dict[str, torch.Tensor], gains: dict[str, float]) -> dict[str, torch.Tensor]:
    """Weights of the host times what the paper says; `up` is the up projection and not the gate."""
    roles = {f"{role}_proj.weight": gain for role, gain in gains.items()}
    roles["embed_tokens.weight"] = gains.get("embed", 1.0)
    return {
        key: weight * next((g for end, g in roles.items() if key.endswith(f".{end}") or key == end), 1.0)
        for key, weight in weights.items()
    }


KINDS = {"rezero", "highway", "denseformer", "hyper_connections", "sub_ln", "ode"}  # of state
KINDS |= {"post_ln", "peri_ln", "deepnorm", "fixup", "t_fixup", "hybrid_norm", "value_residual"}  # of norms and edits
BY_HAND = [
    pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in REFERENCES if stands(name, "llama")
]


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_update_is_the_papers_on_a_host_written_out(family, name):
    """Both in double precision throughout; the weights are those of the host, times the paper's factors."""
    given = batch(padded=True)
    host = tiny_host(family, layers=3, **HARD[family])
    model = patched(family, name, layers=3, **HARD[family])
    weights = scaled(host.state_dict(), GAINS.get(name, {}))
    rules = INSIDE[name][1] if name in INSIDE else None
    net, x = net_of_decoder(family, weights, model, given, slots_of(name, "paper", NATIVE[family]), rules)
    with exact(), torch.no_grad():
        found = model(**given, use_cache=False).last_hidden_state
    expected = REFERENCES[name](net, x)
    real = given["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ caches and windows

PROMPT = {"input_ids": batch(tokens=5)["input_ids"], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("family", DECODERS)
def test_identity_with_a_cache_is_the_host_bit_for_bit(family):
    """The cache is longer than the windows, and shorter once these have passed."""
    host, model = (tiny_host(family, CAUSAL, dtype=torch.float32) for _ in range(2))
    resformer.patch(model, "identity")
    expected, found = (m(**batch(), use_cache=True) for m in (host, model))
    assert torch.equal(found.logits, expected.logits)
    for ids in ([[4], [5]], [[6], [7]]):
        step = {"input_ids": torch.tensor(ids), "use_cache": True}
        expected, found = (m(**step, past_key_values=o.past_key_values) for m, o in ((host, expected), (model, found)))
        assert torch.equal(found.logits, expected.logits)
        for ours, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("name", ["identity", "highway", "hyper_connections", "denseformer", "value_residual"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_cached_step_computes_what_the_whole_text_does(family, name):
    if (family, name) == ("gemma2", "value_residual"):
        pytest.skip("refused, see below")
    model = patched(family, name, CAUSAL, layers=3)
    given = batch()
    whole = model(**given, use_cache=False).logits
    past, steps = None, []
    for part in given["input_ids"].split([4, 1, 1, 1], dim=1):
        found = model(input_ids=part, past_key_values=past, use_cache=True)
        past = found.past_key_values
        steps.append(found.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-6, atol=1e-6)  # norms are in single precision
    assert torch.equal(model.generate(**PROMPT, use_cache=True), model.generate(**PROMPT, use_cache=False))


@pytest.mark.parametrize("family", DECODERS)
def test_identity_generates_what_the_host_does(family):
    host, model = (tiny_host(family, CAUSAL) for _ in range(2))
    resformer.patch(model, "identity")
    for given in (PROMPT, PROMPT | {"num_beams": 2}):
        assert torch.equal(model.generate(**given), host.generate(**given))


def test_values_that_a_window_has_forgotten_are_asked_for_in_vain():
    """Gemma 2 attends within a window in every other layer, where the cache keeps no more than that."""
    model = patched("gemma2", "value_residual", CAUSAL)
    with pytest.raises(ValueError, match="pass use_cache=False"):
        model.generate(**PROMPT, use_cache=True)
    assert model.generate(**PROMPT, use_cache=False).shape == (2, 9)


def test_schemes_that_repeat_refuse_a_cache():
    model = patched("llama", "ode", CAUSAL)
    assert model.config.use_cache is False
    assert model.generation_config.use_cache is False
    past = tiny_host("llama", CAUSAL)(**batch(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="pass use_cache=False"):
        model(input_ids=torch.tensor([[4], [5]]), past_key_values=past)
    assert model.generate(**PROMPT).shape == (2, 9)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "olmo3"])
def test_windows_are_shorter_than_the_texts(family):
    """Else what is shown of caches would be shown without them."""
    wide = output(tiny_host(family, sliding_window=64))
    assert tiny_config(family).sliding_window < TOKENS
    assert relative(output(tiny_host(family)), wide) > 1e-3
    model = resformer.patch(tiny_host(family), "highway")
    assert [getattr(layer, "attention_type", "") for layer in layers_of(model)] == [
        getattr(layer, "attention_type", "") for layer in layers_of(tiny_host(family))
    ]


@pytest.mark.parametrize(("family", "layers"), [("gemma3", 6), ("olmo3", 4)])
@pytest.mark.parametrize("name", ["identity", "hyper_connections", "value_residual"])
def test_layers_with_and_without_windows(family, layers, name):
    """The last of these layers attends to all, and its angles are others."""
    host, model = (tiny_host(family, layers=layers) for _ in range(2))
    assert set(host.config.layer_types) == {"sliding_attention", "full_attention"}
    with exact():
        resformer.patch(model, name)
        assert relative(output(model), output(host)) <= 1e-12


# ------------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("family", DECODERS)
def test_new_norms_are_of_the_hosts_class_with_its_eps(family):
    """Each site of Peri-LN has three norms and the stack one at each end: no host has all of them."""
    host = tiny_host(family, **({} if family.startswith("opt") else {"rms_norm_eps": 3e-4}))
    model = resformer.patch(host, "peri_ln", init="paper")
    own = next(module for module in layers_of(model)[0].modules() if "Norm" in type(module).__name__)
    made = [m for name, m in model.named_modules() if "resformer" in name and name.endswith("_norm")]
    assert made
    for norm in made:
        assert type(norm) is type(own)
        eps = "variance_epsilon" if hasattr(own, "variance_epsilon") else "eps"
        assert getattr(norm, eps) == getattr(own, eps)
        x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        if not family.startswith("opt"):
            assert getattr(norm, eps) == 3e-4
            torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3).double(), rtol=1e-2, atol=0)
    assert {offset_of(norm) for norm in made} == {float(family in OFFSET)}


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_edits_of_the_branch_scale_the_norm_that_it_ends_with(family):
    """x + a F(x) computes x + F(x) where 1 + w (of OLMo 2: w) is divided by a, and no other weight is changed."""
    host, model = tiny_host(family), tiny_host(family)
    resformer.patch(model, "depth_scaled")
    a, offset = 4**-0.5, float(family in OFFSET)
    ends = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    for key, weight in host.state_dict().items():
        expected = (offset + weight) / a - offset if key.endswith(ends) else weight
        torch.testing.assert_close(model.state_dict()[key], expected, rtol=1e-14, atol=1e-14)
    with exact():
        assert relative(output(model), output(host)) <= 1e-12


@pytest.mark.parametrize("family", ["gemma", "gemma2", "olmo2", "llama", "opt", "opt_post"])
@pytest.mark.parametrize(
    ("name", "init", "options"),
    [
        ("depth_scaled", "preserve", {}),
        ("scaled", "preserve", {"branch": 0.3}),
        ("deepnorm", "paper", {}),
        ("branch_norm", "paper", {}),
        ("sub_ln", "paper", {}),
        ("t_fixup", "paper", {}),
        ("peri_ln", "paper", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unpatching_gives_every_bit_back(family, name, init, options, dtype):
    host, model = (tiny_host(family, CAUSAL, dtype=dtype) for _ in range(2))
    eps = [getattr(m, "variance_epsilon", getattr(m, "eps", None)) for m in host.modules()]
    resformer.patch(model, name, init=init, **options)
    model.train()(**batch(), use_cache=False).logits.sum().backward()
    resformer.unpatch(model).eval()
    assert [getattr(m, "variance_epsilon", getattr(m, "eps", None)) for m in model.modules()] == eps
    assert all(torch.equal(a, b) for a, b in zip(host.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(output(model), output(host))


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3", "olmo2", "opt", "opt_post"])
@pytest.mark.parametrize(
    ("name", "options"), [("rezero", {}), ("layer_scale", {}), ("scaled", {"branch": 0.3}), ("depth_scaled", {})]
)
def test_folding_is_exact(tmp_path, family, name, options):
    """A plain model, which plain transformers loads."""
    model = tiny_host(family, CAUSAL, layers=3)
    native = "paper" if name == "scaled" else "preserve"
    with exact():
        resformer.patch(model, name, init=native, **options)
        randomize(model)
        expected = output(model)
        assert relative(output(tiny_host(family, CAUSAL, layers=3)), expected) > 1e-3 or name == "depth_scaled"
        resformer.fold(model)
        assert relative(output(model), expected) <= 1e-12
    model.save_pretrained(tmp_path)
    plain = CAUSAL.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    with exact():
        assert relative(output(plain), expected) <= 1e-12
    assert not any("resformer" in key for key in plain.state_dict())


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3", "olmo2", "olmo3", "opt"])
@pytest.mark.parametrize(
    ("name", "init"), [("rezero", "preserve"), ("rezero", "paper"), ("hyper_connections", "paper")]
)
def test_growing_keeps_every_bit(tmp_path, family, name, init):
    model = patched(family, name, CAUSAL, init=init, layers=4)
    expected = output(model)
    resformer.grow(model, 5)
    assert len(layers_of(model)) == model.config.num_hidden_layers == 5
    assert torch.equal(output(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        output(resformer.from_pretrained(tmp_path, CAUSAL, attn_implementation="eager").eval()), expected
    )
    model.train()(**batch(), labels=batch()["input_ids"], use_cache=False).loss.backward()
    top = [p for p in layers_of(model)[-1].parameters() if p.requires_grad and p.grad is not None and p.grad.any()]
    assert top, "what is new must learn"


# ------------------------------------------------------------------------------------------------ OPT

VARIANTS = [  # of OPT: old checkpoints lack the final norm, opt-350m has narrow embeddings and its norms after
    ("opt", {"_remove_final_layer_norm": True}),
    ("opt", {"word_embed_proj_dim": 12}),
    ("opt_post", {"word_embed_proj_dim": 12}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_variants_of_opt_keep_what_they_compute(tmp_path, family, changes):
    for name in ("identity", "rezero", "hyper_connections", "denseformer", "value_residual", "ode"):
        host, model = (tiny_host(family, CAUSAL, **changes) for _ in range(2))
        keys = list(model.state_dict())
        resformer.patch(model, name, **({"method": "euler"} if name == "ode" else {}))
        assert find_host(model).family.name == family
        assert relative(output(model), output(host)) <= (0 if name == "identity" else 1e-12), name
        model.save_pretrained(tmp_path / name)
        loaded = resformer.from_pretrained(tmp_path / name, CAUSAL, attn_implementation="eager").eval()
        assert torch.equal(output(loaded), output(model))
        resformer.unpatch(model)
        assert list(model.state_dict()) == keys
        assert torch.equal(output(model), output(host))


@pytest.mark.parametrize(("name", "made"), [("resi_dual", True), ("pre_ln", False), ("post_ln", False)])
def test_a_host_without_a_final_norm(name, made):
    """A scheme that adds after the final norm is made one; else the stack ends as the host does."""
    model = patched("opt", name, _remove_final_layer_norm=True)
    assert hasattr(layers_of(model)[-1].resformer, "final_norm") is made
    assert find_host(model).stacks[0].spec.final_norm == ""
    assert output(model).isfinite().all()


def test_opt_by_hand_after_its_own_norms():
    """x ← N(a x + F(x)) with the weights of the host, as patching writes it and as OPT computes its layers."""
    host, model = tiny_host("opt_post"), resformer.patch(tiny_host("opt_post"), "scaled", init="paper", shortcut=2.0)
    layer, x = host.decoder.layers[0], torch.randn(2, 5, WIDTH, dtype=torch.float64)
    y = layer.self_attn_layer_norm(2.0 * x + layer.self_attn(x)[0])
    y = layer.final_layer_norm(2.0 * y + layer.fc2(layer.fc1(y).relu()))
    torch.testing.assert_close(model.decoder.layers[0](x), y, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ inside the sublayers


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "opt"])
def test_widths_inside(family):
    changes = HARD.get(family, {})
    model = resformer.patch(tiny_host(family, **changes), "identity")
    config = model.config
    size = getattr(config, "head_dim", WIDTH // HEADS)
    queries, keys = (size * getattr(config, n, HEADS) for n in ("num_attention_heads", "num_key_value_heads"))
    own = layers_of(model)[0].resformer
    assert own.attn.place.widths == {"q": queries, "k": keys, "v": keys, "o": queries}
    assert own.attn.place.heads == config.num_attention_heads
    inner = config.ffn_dim if family == "opt" else config.intermediate_size
    points = ("up", "down") if family == "opt" else ("gate", "up", "down")
    assert own.ffn.place.widths == dict.fromkeys(points, inner)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_the_gate_of_a_feed_forward_is_not_the_up_projection(family):
    """What scales `up` scales one factor of the product once."""
    host, model = tiny_host(family), resformer.patch(tiny_host(family), "sub_ln", init="paper")
    gain = math.sqrt(math.log(4))
    for before, after in zip(layers_of(host), layers_of(model), strict=True):
        assert torch.equal(after.mlp.gate_proj.weight, before.mlp.gate_proj.weight)
        assert torch.equal(after.self_attn.q_proj.weight, before.self_attn.q_proj.weight)
        assert torch.equal(after.self_attn.k_proj.weight, before.self_attn.k_proj.weight)
        for path in ("mlp.up_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj"):
            torch.testing.assert_close(find(after, path).weight, gain * find(before, path).weight, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------------------ heads and embeddings

AUTOS = (CAUSAL, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)


@pytest.mark.parametrize("auto", AUTOS)
@pytest.mark.parametrize("family", DECODERS)
def test_all_heads(tmp_path, family, auto):
    if type(tiny_config(family)) not in auto._model_mapping:
        pytest.skip("not in transformers")
    host, model = (tiny_host(family, auto, dtype=torch.float32) for _ in range(2))
    resformer.patch(model, "rezero")
    assert torch.equal(output(model), output(host))
    model.save_pretrained(tmp_path)
    loaded = resformer.from_pretrained(tmp_path, auto, attn_implementation="eager").eval()
    assert type(loaded).__name__ == type(host).__name__
    assert torch.equal(output(loaded), output(host))
    assert torch.equal(output(resformer.unpatch(loaded)), output(host))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "opt"])
def test_scaled_embeddings(tmp_path, family, tied):
    """T-Fixup scales the embeddings, and with them a head that is tied to them; Gemma's own factor on them stays."""
    make = {"auto": CAUSAL, "tie_word_embeddings": tied}
    host, model = (tiny_host(family, **make) for _ in range(2))
    gain = (9 * 2) ** -0.25
    entering = []
    for one in (host, resformer.patch(model, "t_fixup", init="paper")):
        layers_of(one)[0].register_forward_pre_hook(lambda m, args: entering.append(args[0]))
        one(**batch())
    torch.testing.assert_close(entering[1], gain * entering[0], rtol=1e-12, atol=0)
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (words is head) is tied
    factor = gain if tied else 1.0
    torch.testing.assert_close(head, factor * host.get_output_embeddings().weight, rtol=1e-12, atol=0)
    model.save_pretrained(tmp_path)
    loaded = resformer.from_pretrained(tmp_path, CAUSAL, attn_implementation="eager").eval()
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is tied
    assert torch.equal(output(loaded), output(model))
    resformer.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(host.state_dict().values(), model.state_dict().values(), strict=True))


# ------------------------------------------------------------------------------------------------ what goes on around


@pytest.fixture
def quiet():
    said = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(said)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("check", MECHANICS)
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, "hyper_connections") for family in ("llama", "gemma2", "olmo2", "opt", "opt_post")),
        *((family, name) for family in ("llama", "gemma2", "opt_post") for name in ("sub_ln", "value_residual", "ode")),
    ],
)
def test_mechanics(family, name, check):
    MECHANICS[check](family, name, {})


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_checkpointing_turns_the_cache_off_with_a_word(monkeypatch, family):
    """As transformers does for the host; the loss is that of no cache."""
    model = patched(family, "hyper_connections", CAUSAL).train()
    given = batch() | {"labels": batch()["input_ids"]}
    plain = model(**given, use_cache=False).loss
    said = []
    monkeypatch.setattr("resformer.layer.logger.warning_once", said.append)
    checkpoint(model)
    cache = DynamicCache(config=model.config)
    found = model(**given, past_key_values=cache, use_cache=False)
    assert torch.equal(found.loss, plain)
    assert cache.get_seq_length() == 0
    assert len(said) == 2, "by each layer"
    assert "`past_key_values=None`" in said[0]
    found.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "resformer" in name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", DECODERS)
def test_half_precision_keeps_what_the_host_computes(family, dtype):
    """Where the algebra is exact to the bit; where norms are scaled, to their rounding."""
    host = tiny_host(family, CAUSAL, dtype=dtype)
    for name in ("rezero", "highway", "hyper_connections", "depth_scaled"):
        model = resformer.patch(tiny_host(family, CAUSAL, dtype=dtype), name)
        assert output(model).dtype == dtype
        error = relative(output(model), output(host))
        assert error <= (0 if name in ("rezero", "highway") else 0.05), name


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param("llama", "hyper_connections", marks=pytest.mark.slow),
        ("gemma2", "sub_ln"),
        pytest.param("opt", "highway", marks=pytest.mark.slow),
    ],
)
def test_compiles_to_one_graph(family, name):
    check_compile(family, name, {})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["rezero", "hyper_connections", "sub_ln", "value_residual"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "opt"])
def test_lora_on_queries_and_values(family, name):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = patched(family, name, CAUSAL)
        before = output(model)
        settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["resformer"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
        torch.testing.assert_close(output(adapted), before, rtol=1e-12, atol=1e-12)
        adapted.train()(**batch(), labels=batch()["input_ids"], use_cache=False).loss.backward()
        trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
        assert {key.split(".lora_")[0].rpartition(".")[2] for key in trained if "lora" in key} == {"q_proj", "v_proj"}
        assert all(p.grad is not None for p in trained.values()), [k for k, p in trained.items() if p.grad is None]
        with torch.no_grad():
            for p in trained.values():
                p.add_(0.1 * torch.randn_like(p))
        after = output(adapted.eval())
        assert relative(after, before) > 1e-3
        merged = adapted.merge_and_unload()
    assert relative(output(merged), after) <= 1e-6  # norms are in single precision
