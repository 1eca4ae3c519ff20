"""Encoder-decoders: two stacks, cross-attention, biases and clamps that layers hand on, caches, heads, constants."""

import copy
import math
import warnings

import pytest
import torch
from reference import REFERENCES, slots_of
from reference.seq2seq import NATIVE, run
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5EncoderModel,
)
from transformers.utils import logging

import resformer
from resformer import families
from resformer.diagnostics.gradient_flow import gradient_norms
from resformer.diagnostics.token_cosine import token_cosine
from resformer.host import find_host
from resformer.layer import Residual
from resformer.patching import is_patched
from resformer.schemes import Scheme
from resformer.testing.hosts import batch, batch_for, exact, gradients, randomize, tiny_config, tiny_host
from resformer.testing.mechanics import MECHANICS

SEQ2SEQ = [name for name, family in families().items() if len(family.stacks) > 1]
GENERATE = AutoModelForSeq2SeqLM
STATES = ["rezero", "highway", "denseformer", "hyper_connections", "post_ln", "ode"]  # each of another state


def patched(family, name, auto=AutoModel, *, init="paper", options=None, **changes):
    """A host patched with trained-like parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resformer.patch(tiny_host(family, auto, **changes), name, init=init, verify=False, **(options or {}))
    randomize(model)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).detach().abs().max() / expected.double().detach().abs().max())


def stacks_of(model):
    return {stack.spec.name: stack for stack in find_host(model).stacks}


@pytest.fixture
def quiet():
    said = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(said)


# ------------------------------------------------------------------------------------------------ the update by hand


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("name", STATES)
def test_the_update_is_the_papers_in_both_stacks(family, name):
    """Padded source and target, both in double precision throughout; buckets of distance of both kinds."""
    far = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12} if family == "t5" else {}
    given = batch_for(family, padded=True)
    host = tiny_host(family, **far)
    model = patched(family, name, **far)
    ends = (".o.weight", ".wo.weight", ".out_proj.weight", ".fc2.weight")
    gain = 0.5 if name == "hyper_connections" else 1.0  # four streams
    weights = {key: w * (gain if key.endswith(ends) else 1.0) for key, w in host.state_dict().items()}
    with exact(), torch.no_grad():
        found = model(**given, use_cache=False)
    memory, output = run(family, weights, model, given, slots_of(name, "paper", NATIVE[family]), REFERENCES[name])
    for ours, theirs, mask in (
        (found.encoder_last_hidden_state, memory, "attention_mask"),
        (found.last_hidden_state, output, "decoder_attention_mask"),
    ):
        real = given[mask].bool()
        assert not real.all()
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", NATIVE)
def test_admin_has_a_chain_for_each_stack(family):
    """w_1 = 1, w_i+1² = Var(w_i x_i) + Var(F_i), over the numbers of real tokens, in the encoder and anew above it."""
    given = batch_for(family, padded=True)
    host = tiny_host(family)
    model = resformer.calibrate(resformer.patch(tiny_host(family), "admin", init="paper"), given)
    masks = [given["attention_mask"].bool(), given["decoder_attention_mask"].bool()]

    def loop(net, x):
        real, squared = masks.pop(0), 1.0
        for site in net.sites:
            w = math.sqrt(squared)
            assert site.numbers("w") == pytest.approx([w] * 16, rel=1e-6)  # T5's norms are in single precision
            y = site.branch(x)
            squared = float((w * x)[real].var(correction=0) + y[real].var(correction=0))
            x = site.post(w * x + y)
        assert abs(w - 1) > 0.05
        return net.final(x)

    with torch.no_grad():
        run(family, host.state_dict(), model, given, slots_of("admin", "paper", NATIVE[family]), loop)
    assert not masks


# ------------------------------------------------------------------------------------------------ constants


def gains_of(host, model) -> dict[str, float]:
    """By stack, site and role, the factor that all weights there were multiplied with."""
    found: dict[str, list[float]] = {}
    for name, stack in stacks_of(model).items():
        for before, after in zip(stacks_of(host)[name].layers, stack.layers, strict=True):
            for site in stack.spec.sites:
                for role, projection in site.points.items():
                    a, b = (layer.get_submodule(projection.path).weight for layer in (before, after))
                    torch.testing.assert_close(b, (b / a).mean() * a, rtol=1e-9, atol=0)
                    found.setdefault(f"{name} {site.name} {role}", []).append((b / a).mean().item())
    assert all(max(some) - min(some) < 1e-9 for some in found.values())
    return {key: some[0] for key, some in found.items()}


L, M = 3, 2  # of the tiny hosts
INNER = ("v", "o", "up", "down")
DEEP = {"encoder": 0.87 * (L**4 * M) ** (-1 / 16), "decoder": (12 * M) ** -0.25}
MAGNETO = {"encoder": math.sqrt(math.log(3 * M) * math.log(2 * L) / 3), "decoder": math.sqrt(math.log(3 * M))}
SITES = 2 * L + 3 * M
CONSTANTS = {  # (stack, site, role) -> gain, as the papers have it for encoder-decoders
    "deepnorm": lambda stack, site, role: DEEP[stack] if role in INNER else 1.0,
    "sub_ln": lambda stack, site, role: MAGNETO[stack] if role in INNER and site != "cross" else 1.0,
    "fixup": lambda stack, site, role: {"up": SITES**-0.5, "o": 0.0, "down": 0.0, "gate": 1.0}.get(
        role, SITES ** (-1 / 6)
    ),
    "t_fixup": lambda stack, site, role: (
        (0.67 * L**-0.25 if stack == "encoder" else (9 * M) ** -0.25) if role in INNER else 1.0
    ),
}


@pytest.mark.parametrize("family", ["t5", "t5_gated", "bart", "mbart"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_weights_are_scaled_by_the_depths_of_both_stacks(family, name):
    host, model = tiny_host(family), resformer.patch(tiny_host(family), name, init="paper")
    for key, gain in gains_of(host, model).items():
        assert gain == pytest.approx(CONSTANTS[name](*key.split()), rel=1e-9), key
    resformer.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), model.parameters(), strict=True))


def test_the_shortcut_of_deepnorm():
    """Wang et al. 2022, table 2; a stack by itself counts alone."""
    model = resformer.patch(tiny_host("bart"), "deepnorm", init="paper")
    alphas = {name: {s.alpha for own in stack.residuals().values() for s in own.schemes}
              for name, stack in stacks_of(model).items()}  # fmt: skip
    assert alphas == {"encoder": {0.81 * (L**4 * M) ** (1 / 16)}, "decoder": {(3 * M) ** 0.25}}
    alone = resformer.patch(tiny_host("bart"), "deepnorm", init="paper", layers={"encoder": range(L)})
    assert alone.encoder.layers[0].resformer.attn.alpha == (2 * L) ** 0.25
    assert not hasattr(alone.decoder.layers[0], "resformer")


def test_each_stack_has_its_own_heads():
    model = resformer.patch(tiny_host("bart", decoder_attention_heads=4), "normformer", init="paper")
    found = {name: len(stack.layers[0].resformer.attn.gain) for name, stack in stacks_of(model).items()}
    assert found == {"encoder": 2, "decoder": 4}


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_shared_embeddings_are_scaled_once(family):
    host, model = (tiny_host(family, GENERATE) for _ in range(2))
    resformer.patch(model, "t_fixup", init="paper")
    torch.testing.assert_close(
        model.get_input_embeddings().weight, (9 * L) ** -0.25 * host.get_input_embeddings().weight
    )
    embeddings = [stack.root.embed_tokens.weight for stack in stacks_of(model).values()]
    embeddings.append(model.get_output_embeddings().weight)
    assert all(weight is model.get_input_embeddings().weight for weight in embeddings)
    if family != "t5":  # learned positions belong to a stack; those of Marian are given
        for name, depth in (("encoder", L), ("decoder", M)):
            ours, theirs = (stacks_of(m)[name].root.embed_positions.weight for m in (model, host))
            gain = (9 * depth) ** -0.25 if family == "bart" else 1.0
            torch.testing.assert_close(ours, gain * theirs, rtol=1e-12, atol=0)
    resformer.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("layers", [{"decoder": range(M)}, {"encoder": range(1, L), "decoder": range(M)}])
def test_embeddings_that_other_layers_read_are_not_scaled(layers):
    host, model = tiny_host("bart"), tiny_host("bart")
    resformer.patch(model, "t_fixup", init="paper", layers=layers)
    assert torch.equal(model.shared.weight, host.shared.weight)
    own, before = model.decoder.embed_positions.weight, host.decoder.embed_positions.weight
    torch.testing.assert_close(own, (9 * M) ** -0.25 * before)


# ------------------------------------------------------------------------------------------------ one stack alone


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_one_stack_alone(tmp_path, family):
    given = batch_for(family, padded=True)
    host, model = tiny_host(family), tiny_host(family)
    resformer.patch(model, "denseformer", layers={"decoder": range(1, 2)})
    assert [len(stack.residuals()) for stack in stacks_of(model).values()] == [0, 1]
    assert type(stacks_of(model)["encoder"].layers[0]) is type(stacks_of(host)["encoder"].layers[0])
    assert torch.equal(model(**given).last_hidden_state, host(**given).last_hidden_state)
    randomize(model)
    found, expected = model(**given), host(**given)
    assert torch.equal(found.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    assert relative(found.last_hidden_state, expected.last_hidden_state) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = resformer.from_pretrained(tmp_path, AutoModel, attn_implementation="eager")
    assert [list(stack.residuals()) for stack in stacks_of(loaded).values()] == [[], [1]]
    assert relative(loaded.double()(**given).last_hidden_state, found.last_hidden_state) < 1e-12
    resformer.unpatch(model)
    assert torch.equal(model(**given).last_hidden_state, host(**given).last_hidden_state)


def test_layers_are_asked_for_by_stack():
    model = tiny_host("t5")
    with pytest.raises(ValueError, match=r"two stacks.*layers=\{'decoder': range\(0, 2\)\}"):
        resformer.patch(model, "rezero", layers=range(2))
    with pytest.raises(ValueError, match=r"unknown stack 'decodr'.*decoder"):
        resformer.patch(model, "rezero", layers={"decodr": range(2)})
    with pytest.raises(ValueError, match="within 0 to 2"):
        resformer.patch(model, "rezero", layers={"encoder": range(4)})
    assert not is_patched(model)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_layerdrop_is_refused_for_streams_in_its_own_stack(stack):
    other = "decoder" if stack == "encoder" else "encoder"
    model = tiny_host("bart", dropout=0.1)
    setattr(model.config, f"{other}_layerdrop", 0.0)
    resformer.unpatch(resformer.patch(model, "rezero"))
    with pytest.raises(ValueError, match=f"config.{stack}_layerdrop = 0.1"):
        resformer.patch(model, "denseformer", layers={stack: range(2)})
    only = tiny_host("bart")
    setattr(only.config, f"{other}_layerdrop", 0.1)  # of the other stack: nothing to this one
    resformer.patch(only, "denseformer", layers={stack: range(2)})
    setattr(model.config, f"{stack}_layerdrop", 0.0)  # which the stack has read already
    with pytest.raises(ValueError, match=rf"Bart{stack.capitalize()} was made with layerdrop = 0.1"):
        resformer.patch(model, "denseformer", layers={stack: range(2)})
    getattr(model, stack).layerdrop = 0.0
    resformer.patch(model, "denseformer", layers={stack: range(2)})


# ------------------------------------------------------------------------------------------------ what layers hand on


@pytest.mark.parametrize("name", ["highway", "hyper_connections", "denseformer", "value_residual"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_hidden_states_and_attentions_are_shown(family, name):
    """Of each stack as many as the host's, (B T D), with a stream between the layers; the last is the output."""
    model, given = patched(family, name, GENERATE), batch_for(family, padded=True)
    found = model(**given, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in found.encoder_hidden_states] == [(2, 7, 16)] * (L + 1)
    assert [tuple(state.shape) for state in found.decoder_hidden_states] == [(2, 5, 16)] * (M + 1)
    assert torch.equal(found.encoder_hidden_states[-1], found.encoder_last_hidden_state)
    shapes = {"encoder_attentions": (L, 7, 7), "decoder_attentions": (M, 5, 5), "cross_attentions": (M, 5, 7)}
    for kind, (number, *tokens) in shapes.items():
        assert [tuple(one.shape) for one in found[kind]] == [(2, 2, *tokens)] * number, kind
    again = model(**given, return_dict=False)
    assert torch.equal(again[0], found.logits)


FFN = ("encoder.block.0.layer.1.DenseReluDense.wo.weight", "decoder.block.0.layer.2.DenseReluDense.wo.weight")
INFINITE = {  # what overflows in half precision: an output projection, or where a norm comes last its weight
    "t5": ("encoder.block.0.layer.0.SelfAttention.o.weight", "decoder.block.0.layer.1.EncDecAttention.o.weight"),
    "umt5": FFN,
    "bart": ("encoder.layers.0.final_layer_norm.weight", None),
    "marian": ("encoder.layers.0.final_layer_norm.weight", None),
    "t5_gated": FFN,
    "mt5": FFN,
    "m2m_100": ("encoder.layers.0.fc2.weight", None),
    "mbart": ("encoder.layers.0.fc2.weight", None),
    "pegasus": ("encoder.layers.0.fc2.weight", None),
}


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("family", INFINITE)
def test_half_precision_is_clamped_as_the_host_does(family, where):
    """T5 after each sublayer, the line of BART after a layer of the encoder alone."""
    if INFINITE[family][where] is None:
        pytest.skip("its decoder clamps nothing")
    kind = ("encoder_hidden_states", "decoder_hidden_states")[where]
    shown = []
    for name in (None, "identity"):
        model = tiny_host(family, dtype=torch.float16)
        if name:
            resformer.patch(model, name)
        with torch.no_grad():
            model.get_parameter(INFINITE[family][where]).fill_(60000.0)
        shown.append([state.nan_to_num(-1.0) for state in model(**batch_for(family), output_hidden_states=True)[kind]])
    assert (shown[0][1].abs() == torch.finfo(torch.float16).max - 1000).any(), "else nothing was clamped"
    assert all(torch.equal(a, b) for a, b in zip(*shown, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_half_precision_keeps_what_the_host_computes(family, dtype):
    """Where the algebra is exact to the bit; where streams are summed, to their rounding."""
    given = batch_for(family, padded=True)
    expected = tiny_host(family, GENERATE, dtype=dtype)(**given).logits
    for name in ("rezero", "highway", "hyper_connections"):
        found = resformer.patch(tiny_host(family, GENERATE, dtype=dtype), name)(**given).logits
        assert found.dtype == dtype
        assert relative(found, expected) <= (0 if name in ("rezero", "highway") else 0.05), name


# ------------------------------------------------------------------------------------------------ caches and generation

SEARCH = {"greedy": {}, "beam": {"num_beams": 3}}


def written(model, **how) -> torch.Tensor:
    given = {key: value for key, value in batch(padded=True).items()}
    return model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False, **how)


@pytest.mark.parametrize("search", SEARCH)
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_generates_with_a_cache_what_it_does_without(family, search):
    """The identity what the host does; schemes of each state the same both ways."""
    host = tiny_host(family, GENERATE)
    assert torch.equal(written(resformer.patch(tiny_host(family, GENERATE), "identity"), **SEARCH[search]),
                       written(host, **SEARCH[search]))  # fmt: skip
    for name in ("hyper_connections", "denseformer", "value_residual"):
        model = patched(family, name, GENERATE)
        found = [written(model, use_cache=cached, **SEARCH[search]) for cached in (True, False)]
        assert torch.equal(*found), name


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_cached_step_computes_what_the_whole_text_does(family):
    model = patched(family, "hyper_connections", GENERATE)
    given = batch_for(family)
    ids, source = given["decoder_input_ids"], {k: given[k] for k in ("input_ids", "attention_mask")}
    whole = model(**source, decoder_input_ids=ids).logits
    first = model(**source, decoder_input_ids=ids[:, :-1], use_cache=True)
    memory = (first.encoder_last_hidden_state,)
    step = model(attention_mask=source["attention_mask"], encoder_outputs=memory, decoder_input_ids=ids[:, -1:],
                 past_key_values=first.past_key_values, use_cache=True)  # fmt: skip
    assert relative(step.logits[:, 0], whole[:, -1]) < 1e-6


@pytest.mark.parametrize("family", ["t5", "umt5", "bart"])
def test_a_scheme_that_repeats_has_the_cache_off_everywhere(family):
    model = patched(family, "ode", GENERATE)
    configs = [model.config, model.generation_config, *(stack.root.config for stack in stacks_of(model).values())]
    assert not any(config.use_cache for config in configs)
    assert torch.equal(written(model), written(model, use_cache=False))
    with pytest.raises(ValueError, match="KV cache cannot follow; pass use_cache=False"):
        model(**batch_for(family), use_cache=True)
    resformer.unpatch(model)
    had = tiny_host(family, GENERATE)
    assert [config.use_cache for config in configs] == [
        config.use_cache
        for config in (had.config, had.generation_config, *(stack.root.config for stack in stacks_of(had).values()))
    ]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_integrating_backwards(family):
    """Its gradients are those of the way forward; where layers hand on biases they would be lost, and it is refused."""
    pytest.importorskip("torchdiffeq")
    tight = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}
    if family == "t5":
        model = tiny_host(family)
        with pytest.raises(ValueError, match=r"T5Block hand on more than their states.*adjoint=False"):
            resformer.patch(model, "ode", init="paper", adjoint=True, **tight)
        assert not is_patched(model)
        return
    found = []
    for adjoint in (False, True):
        model = patched(family, "ode", options=tight | {"adjoint": adjoint})
        model(**batch_for(family)).last_hidden_state.square().sum().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert gradient is None or torch.allclose(found[1][name], gradient, rtol=1e-5, atol=1e-6), name


# ------------------------------------------------------------------------------------------------ every head


def text() -> dict[str, torch.Tensor]:
    given = batch(padded=True)
    given["input_ids"][:, 4] = 2  # each text has one end
    return given


HEADS = [("t5", AutoModel), ("t5", GENERATE), ("t5", T5EncoderModel), ("umt5", AutoModelForTokenClassification)]
for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
    HEADS.append(("t5_gated", auto))
for auto in (AutoModelForSequenceClassification, AutoModelForQuestionAnswering, AutoModelForCausalLM):
    HEADS += [("bart", auto), ("mbart", auto)]
HEADS += [(family, auto) for family in ("marian", "pegasus") for auto in (GENERATE, AutoModelForCausalLM)]


@pytest.mark.parametrize(("family", "auto"), HEADS)
def test_every_head(tmp_path, family, auto):
    """Found with the stacks there are, kept to the bit, saved and loaded, and unpatched."""

    def make():
        if auto is T5EncoderModel:
            torch.manual_seed(0)
            return T5EncoderModel(tiny_config(family)).double().eval()
        return tiny_host(family, auto)

    host, model, given = make(), make(), text()
    if auto in (AutoModel, GENERATE):
        given["decoder_input_ids"] = given["input_ids"]
    expected = host(**given)[0]
    resformer.patch(model, "denseformer")
    one = {AutoModelForCausalLM: ["decoder"], T5EncoderModel: ["encoder"], AutoModelForTokenClassification: ["encoder"]}
    assert list(stacks_of(model)) == one.get(auto, ["encoder", "decoder"])
    assert torch.equal(model(**given)[0], expected)
    randomize(model)
    found = model(**given)[0]
    assert relative(found, expected) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = resformer.from_pretrained(tmp_path, auto, attn_implementation="eager")
    assert type(loaded) is type(host)
    assert relative(loaded(**given)[0], found) < 1e-12
    assert torch.equal(resformer.unpatch(model)(**given)[0], expected)


@pytest.mark.parametrize("scheme", ["deepnorm", "sub_ln", "hyper_connections"])
@pytest.mark.parametrize(("family", "part"), [("t5", T5EncoderModel), ("bart", AutoModelForCausalLM)])
def test_a_part_of_a_checkpoint_computes_what_it_does_in_the_whole(tmp_path, family, part, scheme):
    """Constants that depend on the depths of both stacks stay."""
    model = patched(family, scheme, GENERATE)
    model.save_pretrained(tmp_path)
    loaded = resformer.from_pretrained(tmp_path, part, attn_implementation="eager")
    given = batch(padded=True)
    if part is T5EncoderModel:
        own, whole = loaded.encoder, model.encoder
    else:
        own, whole = loaded.model.decoder, model.model.decoder
        own.embed_tokens.weight.data = whole.embed_tokens.weight.data  # not found by transformers
    assert relative(own(**given)[0], whole(**given)[0]) < 1e-12


def test_a_part_that_was_not_patched_says_so(tmp_path):
    model = resformer.patch(tiny_host("t5", GENERATE), "highway", layers={"decoder": range(2)})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only the decoder is patched, which a T5EncoderModel has not"):
        resformer.from_pretrained(tmp_path, T5EncoderModel)


@pytest.mark.parametrize("crosses", [False, True])
@pytest.mark.parametrize("family", ["bart", "marian", "mbart", "pegasus"])
def test_a_decoder_without_its_encoder(family, crosses):
    host, model = (tiny_host(family, AutoModelForCausalLM, add_cross_attention=crosses) for _ in range(2))
    resformer.patch(model, "identity")
    states = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = batch(padded=True) | ({"encoder_hidden_states": states} if crosses else {})
    expected, found = (m(**given, output_hidden_states=True, output_attentions=True) for m in (host, model))
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))
    visits = []
    for name, module in model.named_modules():
        if isinstance(module, Scheme):
            module.step = lambda s, f, n, name=name, step=module.step: visits.append(name) or step(s, f, n)
    model(**given)
    assert len(visits) == len(set(visits)) == M * (3 if crosses else 2)


# ------------------------------------------------------------------------------------------------ what goes on around

AROUND = [(family, "hyper_connections") for family in SEQ2SEQ]
AROUND += [("t5", "denseformer"), ("bart", "sub_ln"), ("t5", "value_residual"), ("bart", "ode")]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("check", [name for name in MECHANICS if name != "hidden_states"])
@pytest.mark.parametrize(("family", "name"), AROUND)
def test_mechanics(family, name, check):
    if check == "round_trip" and family in ("marian", "pegasus"):
        pytest.skip("transformers loads their fixed positions as if they were trained; see test_every_head")
    MECHANICS[check](family, name, {})


@pytest.mark.parametrize("name", ["hyper_connections", "deepnorm", "sub_ln", "resi_dual", "ode", "post_ln"])
@pytest.mark.parametrize("family", ["t5", "bart", "mbart"])
def test_unpatching_gives_every_bit_back(family, name):
    host, given = tiny_host(family, GENERATE), batch_for(family, padded=True)
    model = patched(family, name, GENERATE).train()
    model(**batch_for(family, labels=True), use_cache=False).loss.backward()
    resformer.unpatch(model).eval()
    assert list(model.state_dict()) == list(host.state_dict())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in host.parameters()]
    expected, found = (m(**given, output_hidden_states=True, output_attentions=True) for m in (host, model))
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.cross_attentions, expected.cross_attentions, strict=True))
    assert not any("show_states" in str(module._forward_hooks) for module in model.modules())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["rezero", "hyper_connections", "value_residual"])
@pytest.mark.parametrize(("family", "targets"), [("t5", ["q", "v"]), ("bart", ["q_proj", "v_proj"])])
def test_lora_on_queries_and_values(family, targets, name):
    peft = pytest.importorskip("peft")
    given = batch_for(family, padded=True)
    settings = {"task_type": "SEQ_2_SEQ_LM", "target_modules": targets, "modules_to_save": ["resformer"]}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        model = patched(family, name, GENERATE)
        before = model(**given).logits.detach()
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
        torch.testing.assert_close(adapted(**given).logits, before, rtol=1e-12, atol=1e-12)
        adapted.train()(**batch_for(family, labels=True), use_cache=False).loss.backward()
        trained = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
        assert {key.split(".lora_")[0].rpartition(".")[2] for key in trained if "lora" in key} == set(targets)
        assert any("cross" in key or "EncDec" in key or "encoder_attn" in key for key in trained)
        assert all(p.grad is not None for p in trained.values()), [k for k, p in trained.items() if p.grad is None]
        with torch.no_grad():
            for p in trained.values():
                p.add_(0.1 * torch.randn_like(p))
        after = adapted.eval()(**given).logits.detach()
        assert relative(after, before) > 1e-3
        assert relative(adapted.merge_and_unload()(**given).logits, after) <= 1e-5  # norms are in single precision


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(("family", "name"), [("t5", "hyper_connections"), ("bart", "admin"), ("t5", "pro_res")])
def test_one_step_of_the_trainer(tmp_path, family, name):
    """The scheme learns; values from data are taken and schedules move by themselves; it generates to evaluate."""
    model = resformer.patch(tiny_host(family, GENERATE, dtype=torch.float32), name, init="paper")
    before = copy.deepcopy(model.state_dict())
    given = batch_for(family, padded=True, labels=True)
    data = [{key: value[i] for key, value in given.items()} for i in range(2)]
    args = Seq2SeqTrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, learning_rate=0.1, report_to=[], use_cpu=True,
        predict_with_generate=True, generation_max_length=6, disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    moved = [key for key, value in model.state_dict().items() if "resformer" in key and not value.equal(before[key])]
    assert {part for key in moved for part in key.split(".")} >= {"encoder", "decoder"}
    assert math.isfinite(trainer.evaluate()["eval_loss"])


FOLDED = [
    (family, name) for family in ("t5", "t5_gated", "umt5", "bart", "mbart") for name in ("rezero", "layer_scale")
]


@pytest.mark.parametrize(("family", "name"), FOLDED)
def test_folding_is_exact(tmp_path, family, name):
    model = resformer.patch(tiny_host(family, GENERATE), name)
    randomize(model)
    given = batch_for(family, padded=True)
    expected = model(**given).logits
    resformer.fold(model)
    assert not any(isinstance(module, Residual) for module in model.modules())
    assert relative(model(**given).logits, expected) < 1e-6  # norms are in single precision
    model.save_pretrained(tmp_path)
    plain = GENERATE.from_pretrained(tmp_path, attn_implementation="eager")
    assert relative(plain(**given).logits, expected) < 1e-6


NO_SUM = [("t5", "highway"), ("bart", "hyper_connections"), ("mbart", "post_ln")]
NO_SUM += [("bart", "deepnorm"), ("marian", "deepnorm")]  # cross-attention may be left out, and no norm opens Marian


@pytest.mark.parametrize(("family", "name"), NO_SUM)
def test_what_is_no_sum_is_not_folded(family, name):
    model, given = patched(family, name, GENERATE), batch_for(family)
    expected = model(**given).logits
    with pytest.raises(ValueError, match=f"scheme '{name}' cannot be folded"):
        resformer.fold(model)
    assert torch.equal(model(**given).logits, expected)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_what_is_for_one_stack_is_refused(family):
    model, given = patched(family, "rezero", GENERATE), batch_for(family, labels=True)
    with pytest.raises(ValueError, match="models of one stack"):
        resformer.grow(model, 4)
    with pytest.raises(ValueError, match="models of one stack"):
        gradient_norms(model, given)
    with pytest.raises(ValueError, match="one stack"):
        token_cosine(model, given)


@pytest.mark.parametrize("name", ["hyper_connections", "deepnorm", "sub_ln"])
@pytest.mark.parametrize("family", ["t5_gated", "bart"])
def test_described_within_eighty_columns(family, name):
    lines = str(resformer.describe(patched(family, name, GENERATE))).splitlines()
    assert max(map(len, lines)) <= 80
    found = " ".join(" ".join(lines).split())
    assert "3 + 2 layers" in found
    assert "encoder layers" in found
    assert "sites: attn, cross, ffn" in found


def test_layers_of_several_dtypes_are_refused_where_they_do_not_serve():
    """As transformers loads T5 in float16: its last projections stay in float32."""
    model = tiny_host("t5", dtype=torch.float16)
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"several kinds \(torch.float16, torch.float32.*load it in one"):
        resformer.patch(model, "highway")
    assert not is_patched(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    resformer.patch(model, "rezero")


def test_weights_of_several_kinds_are_refused_when_loaded_as_well(tmp_path):
    resformer.patch(tiny_host("t5", dtype=torch.float32), "sub_ln", init="paper").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"several kinds \(torch.float16, torch.float32.*load it in one"):
        resformer.from_pretrained(tmp_path, AutoModel, dtype=torch.float16)
    resformer.from_pretrained(tmp_path, AutoModel, dtype=torch.bfloat16)


def test_streams_take_the_wider_of_several_kinds_as_a_sum_does(tmp_path):
    model = resformer.patch(tiny_host("t5", dtype=torch.float32), "hyper_connections")
    model.save_pretrained(tmp_path)
    half = resformer.from_pretrained(tmp_path, AutoModel, dtype=torch.float16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.float16, torch.float32}
    given = batch_for("t5")
    with torch.no_grad():
        found, expected = half(**given)[0], model.eval()(**given)[0]
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
