"""Gradient flow against gradients taken by hand from the unpatched model."""

import math

import pytest
import torch
from diagnosed import given, subject
from transformers import AutoModelForSequenceClassification

import resformer
from resformer.diagnostics.gradient_flow import gradient_flow, gradient_norms, verdict
from resformer.diagnostics.lines import Fit
from resformer.testing.hosts import batch, tiny_host

# family -> a layer's module that reads the stream at each site, its last projections, the prefix of its weights
PARTS = {
    "bert": (
        "bert.encoder.layer",
        {"attn": "attention.self", "ffn": "intermediate"},
        {"attn": "attention.output.dense", "ffn": "output.dense"},
        {"attn": ("attention.",), "ffn": ("intermediate.", "output.")},
    ),
    "gpt2": (
        "transformer.h",
        {"attn": "ln_1", "ffn": "ln_2"},
        {"attn": "attn.c_proj", "ffn": "mlp.c_proj"},
        {"attn": ("attn.", "ln_1."), "ffn": ("mlp.", "ln_2.")},
    ),
}


@pytest.mark.parametrize("family", PARTS)
def test_against_a_backward_pass_by_hand(family):
    model, inputs = subject(family), given(family)
    rows = {(row["layer"], row["site"]): row for row in gradient_flow(model, inputs).rows}
    path, readers, projections, prefixes = PARTS[family]
    layers = model.get_submodule(path)
    streams, inner, outer = {}, {}, {}
    for number, layer in enumerate(layers):
        for site in ("attn", "ffn"):

            def entering(module, args, kwargs, key=(number, site)):
                streams[key] = args[0] if args else kwargs["hidden_states"]
                streams[key].retain_grad()

            def leaving(module, args, output, key=(number, site)):
                inner[key], outer[key] = args[0].detach(), output
                output.retain_grad()

            layer.get_submodule(readers[site]).register_forward_pre_hook(entering, with_kwargs=True)
            layer.get_submodule(projections[site]).register_forward_hook(leaving)
    model(**inputs).loss.backward()
    for key, stream in streams.items():
        assert rows[key]["stream"] == pytest.approx(float(stream.grad.norm()), rel=1e-9)
        assert rows[key]["branch"] == pytest.approx(float(outer[key].grad.norm()), rel=1e-9)  # nothing stands between
        norms = []
        for text in range(2):
            for token in range(int(inputs["attention_mask"][text].sum())):
                norms.append(float(torch.outer(inner[key][text, token], outer[key].grad[text, token]).norm()))
        assert rows[key]["per_token"] == pytest.approx(sum(norms) / len(norms), rel=1e-9)
        number, site = key
        named = layers[number].named_parameters()
        mine = [p for name, p in named if name.startswith(prefixes[site])]
        squares = sum(float(p.grad.square().sum()) for p in mine)
        assert rows[key]["parameters"] == pytest.approx(math.sqrt(squares), rel=1e-9)
        size = math.sqrt(sum(float(p.detach().square().sum()) for p in mine))
        assert rows[key]["relative"] == pytest.approx(math.sqrt(squares) * size, rel=1e-9)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("bert", None),
        ("gpt2", "hyper_connections"),
        ("bert", "denseformer"),
        ("gpt2", "attn_residual"),
        ("gpt2", "ode"),
    ],
)
def test_the_stream_is_all_that_is_carried(family, scheme):
    """Where sites and layers meet it is what `gradient_norms` has, whose own test cuts the graph there."""
    model, inputs = subject(family, scheme), given(family)
    flow, norms = gradient_flow(model, inputs), gradient_norms(model, inputs)
    first = {}
    for row in flow.rows:
        first.setdefault(row["layer"], row["stream"])
    assert [first[layer] for layer in range(1, 4)] == pytest.approx(norms[1:], rel=1e-9)


def test_the_schemes_own_parameters():
    model, inputs = subject("gpt2", "hyper_connections"), given("gpt2")
    rows = gradient_flow(model, inputs).rows
    model(**inputs).loss.backward()
    own = model.transformer.h[1].resformer.ffn
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in own.parameters()))
    assert rows[3]["scheme"] == pytest.approx(expected, rel=1e-9)


def test_rate_and_verdict_follow_a_known_law():
    """With closed branches the gradient is multiplied by the shortcut at every site."""
    model = tiny_host("gpt2", AutoModelForSequenceClassification, layers=12)
    resformer.patch(model, "scaled", init="paper", placement="pre", shortcut=0.8, branch=1e-12)
    facts = gradient_flow(model, batch(labels=True)).facts
    assert facts["rate"] == pytest.approx(0.64, rel=1e-6)  # two sites a layer
    assert facts["verdict"] == "vanishing"
    resformer.unpatch(model)
    resformer.patch(model, "scaled", init="paper", placement="pre", shortcut=1.25, branch=1e-12)
    facts = gradient_flow(model, batch(labels=True)).facts
    assert facts["rate"] == pytest.approx(1.5625, rel=1e-6)
    assert facts["verdict"] == "exploding"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (Fit(0.0, 0.1, 0.0), "stable"),
        (Fit(1.0, 0.1, 0.9), "vanishing"),
        (Fit(-1.0, 0.1, 0.9), "exploding"),
        (Fit(-1.0, 0.6, 0.1), "stable"),
        (Fit(0.3, 0.01, 0.9), "stable"),
    ],
)
def test_verdict(line, expected):
    assert verdict(line, 10) == expected


def test_a_gradient_of_zero_and_one_far_below_single_precision():
    model = tiny_host("gpt2", AutoModelForSequenceClassification, layers=2, dtype=torch.float32)
    model.score.weight.data *= 1e-30
    flow = gradient_flow(model, batch(labels=True))
    assert 0 < flow.rows[0]["stream"] < 1e-28
    model.score.weight.data.zero_()
    assert gradient_flow(model, batch(labels=True)).facts["verdict"] == "zero"
