"""Coefficients by layer, against the schemes' parameters and equations."""

import pytest
import torch
from diagnosed import given, subject

import resformer
from resformer.diagnostics.gates import gates, sum_error
from resformer.schemes.streams import sinkhorn


def rows(measured, name):
    return [row for row in measured.rows if row["coefficient"] == name]


def test_parameters_by_name():
    model = subject("gpt2", "layer_scale")
    found = rows(gates(model, given("gpt2")), "a")
    assert [(row["layer"], row["site"]) for row in found] == [(i, site) for i in range(3) for site in ("attn", "ffn")]
    a = model.transformer.h[1].resformer.ffn.a.detach()
    assert found[3]["mean"] == pytest.approx(float(a.mean()))
    assert found[3]["spread"] == pytest.approx(float(a.std(unbiased=False)))
    assert (found[3]["low"], found[3]["high"]) == (float(a.min()), float(a.max()))


def test_gates_over_data_are_of_the_text():
    model, inputs = subject("gpt2", "highway"), given("gpt2")
    found = rows(gates(model, inputs), "T")
    gate, seen = model.transformer.h[2].resformer.attn.transform, {}
    gate.register_forward_hook(lambda _, args, out: seen.update(x=args[0]))
    with torch.no_grad():
        model(**inputs)
        t = torch.sigmoid(seen["x"] @ gate.weight.T + gate.shift)[inputs["attention_mask"] > 0]
    assert found[4]["mean"] == pytest.approx(float(t.mean()))
    assert found[4]["low"] == pytest.approx(float(t.min()))
    carry = rows(gates(model, inputs), "C")
    assert carry[4]["mean"] == pytest.approx(1 - float(t.mean()))


# what each scheme shows, and its value at init="paper" where that is known
SHOWN = {
    "exclusive_gate": {"g": torch.tensor(-6.0).sigmoid()},
    "shortcut_gate": {"g": torch.tensor(-6.0).sigmoid()},
    "gru_gate": {"r": None, "z": None},
    "sparse_gate": {"m": None},
    "se_gate": {"s": None},
    "gpas": {"silu": 0.0},
    "attn_residual": {"a": None},
    "laurel": {"α": 1.0, "β": 1.0},
    "depth_lstm": {"i": None, "f": None, "o": None},
    "frac_connections": {"Y": 0.25, "mixture": 0.25, "b": 1.0},
    "hyper_connections": {"m": 0.25, "mixture": 0.25, "w": 1.0},
    "mhc": {"p": None, "w": 1.0, "mixture": 0.25},
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_schemes_show(name):
    family = "bert" if name == "se_gate" else "gpt2"
    model = resformer.patch(subject(family), name, init="paper")
    measured = gates(model, given(family))
    for letter, expected in SHOWN[name].items():
        found = rows(measured, letter)
        assert found
        if expected is not None:
            assert [row["mean"] for row in found] == pytest.approx([float(expected)] * len(found), rel=1e-4)


def test_mixtures_and_their_product():
    model, inputs = subject("gpt2", "hyper_connections"), given("gpt2")
    measured = gates(model, inputs)
    product = torch.eye(4, dtype=torch.float64)
    for layer in model.transformer.h:
        for scheme in (layer.resformer.attn, layer.resformer.ffn):
            product = scheme.mix.detach().T @ product
    gain = max(product.abs().sum(0).max(), product.abs().sum(1).max())
    assert measured.facts["mix_gain"] == pytest.approx(float(gain))
    mix = model.transformer.h[0].resformer.attn.mix.detach()
    error = max(float((mix.sum(0) - 1).abs().max()), float((mix.sum(1) - 1).abs().max()))
    assert rows(measured, "mixture")[0]["error"] == pytest.approx(error)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_mixtures_of_padding_do_not_count(family):
    model, inputs = subject(family, "hyper_connections", dynamic=True), given(family)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, -2:] = 0
    if family == "t5":
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = gates(model, inputs)
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -2:] = (other["input_ids"][0, -2:] + 1) % 7
    again = gates(model, other)
    gains = [name for name in found.facts if "mix_gain" in name]
    assert len(gains) == (2 if family == "t5" else 1)
    assert [again.facts[name] for name in gains] == pytest.approx([found.facts[name] for name in gains], rel=1e-9)
    for one, two in zip(rows(found, "mixture"), rows(again, "mixture"), strict=True):
        assert one["error"] == pytest.approx(two["error"], rel=1e-9)


def test_sinkhorn_error():
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sum_error(sinkhorn(logits, 1)) > 1e-3
    assert sum_error(sinkhorn(logits, 200)) < 1e-9
    model = resformer.patch(subject("gpt2"), "mhc", init="paper")
    measured = gates(model, given("gpt2"))
    assert max(row["error"] for row in rows(measured, "mixture")) < 1e-6
    assert measured.facts["mix_gain"] == pytest.approx(1, rel=1e-6)


def test_streams_that_are_copies_and_streams_that_part():
    copies = resformer.patch(subject("gpt2"), "hyper_connections")
    for row in rows(gates(copies, given("gpt2")), "streams"):
        assert row["used"] == pytest.approx(4)
        assert row["alike"] == pytest.approx(1)
    model, inputs, seen = subject("gpt2", "hyper_connections"), given("gpt2"), {}
    row = rows(gates(model, inputs), "streams")[-1]
    scheme = model.transformer.h[2].resformer.ffn
    step = scheme.step
    scheme.step = lambda *args: seen.setdefault("h", step(*args))
    with torch.no_grad():
        model(**inputs)
    h = seen["h"][0][inputs["attention_mask"] > 0]  # (N S D)
    p = h.square().sum((0, 2)) / h.square().sum()
    assert row["used"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
    cosines = [torch.cosine_similarity(h[:, i], h[:, j], dim=-1).mean() for i in range(4) for j in range(4) if i != j]
    assert row["alike"] == pytest.approx(float(sum(cosines) / len(cosines)))


def test_a_model_without_coefficients():
    measured = gates(subject("bert"), given("bert"))
    assert measured.rows == []
    assert measured.facts == {"coefficients": 0}
    assert measured.plot().startswith("<?xml")
    assert measured.shown()
