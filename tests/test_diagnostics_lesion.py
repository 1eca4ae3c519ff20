"""Lesions against models that were changed by hand."""

import copy

import pytest
import torch
from diagnosed import given, subject
from scipy.stats import kendalltau
from torch import nn
from transformers import AutoModelForCausalLM

from resformer.diagnostics.lesion import lesion, tau
from resformer.testing.hosts import tiny_host

LAYERS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}
LAST = {
    "bert": {"attn": "attention.output.dense", "ffn": "output.dense"},
    "gpt2": {"attn": "attn.c_proj", "ffn": "mlp.c_proj"},
}


def loss(model, inputs):
    with torch.no_grad():
        return float(model(**inputs).loss)


def closed(model, path):
    """A copy whose projections there give nothing."""
    other = copy.deepcopy(model)
    for one in path:
        for p in other.get_submodule(one).parameters():
            p.data.zero_()
    return other


def with_layers(model, family, numbers):
    """A copy with these layers, in this order."""
    other = copy.deepcopy(model)
    parent, _, name = LAYERS[family].rpartition(".")
    layers = other.get_submodule(LAYERS[family])
    setattr(other.get_submodule(parent), name, nn.ModuleList(layers[i] for i in numbers))
    other.config.num_hidden_layers, other.config.use_cache = len(numbers), False
    return other


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_deletions(family):
    model, inputs = subject(family, layers=4), given(family)
    measured = lesion(model, inputs, draws=2)
    whole = loss(model, inputs)
    assert measured.facts["loss"] == pytest.approx(whole, rel=1e-12)
    for row in measured.rows:
        if row["site"] in ("attn", "ffn", "block"):
            sites = LAST[family].values() if row["site"] == "block" else [LAST[family][row["site"]]]
            other = closed(model, [f"{LAYERS[family]}.{row['layer']}.{site}" for site in sites])
            assert row["branch"] == pytest.approx(loss(other, inputs) - whole, rel=1e-9, abs=1e-12)
        if row["site"] == "block":
            others = [i for i in range(4) if i != row["layer"]]
            expected = loss(with_layers(model, family, others), inputs) - whole
            assert row["connection"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        if row["site"] == "random":
            others = [i for i in range(4) if str(i) not in row["which"].split()]
            assert len(others) == 4 - row["deleted"]
            expected = loss(with_layers(model, family, others), inputs) - whole
            assert row["change"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        if row["site"] == "permuted":
            order = [int(i) for i in row["which"].split()]
            expected = loss(with_layers(model, family, order), inputs) - whole
            assert row["change"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert row["tau"] == pytest.approx(kendalltau(range(4), order).statistic)
    kinds = [row["site"] for row in measured.rows]
    assert [kinds.count(kind) for kind in ("attn", "ffn", "block", "random", "permuted")] == [4, 4, 4, 4, 4]
    means = [row["change"] for row in measured.rows if row.get("deleted") == 2]
    assert measured.facts["random"]["2"] == pytest.approx(sum(means) / 2)


def test_norm_and_branch_of_a_post_ln_site():
    """Without its norm the state goes on as it came; a norm that passes its input on does the same by hand."""
    model, inputs = subject("bert"), given("bert")
    row = next(row for row in lesion(model, inputs, draws=0).rows if (row["layer"], row["site"]) == (1, "ffn"))
    other = closed(model, ["bert.encoder.layer.1.output.dense"])
    other.bert.encoder.layer[1].output.LayerNorm = nn.Identity()
    assert row["connection"] == pytest.approx(loss(other, inputs) - loss(model, inputs), rel=1e-9)
    assert row["connection"] != pytest.approx(row["branch"])


def test_several_streams_and_a_history():
    """Deleting a branch of a patched model is having its last projection give nothing."""
    for family, scheme in (("gpt2", "hyper_connections"), ("bert", "denseformer"), ("gpt2", "attn_residual")):
        model, inputs = subject(family, scheme), given(family)
        measured = lesion(model, inputs, draws=1)
        row = next(row for row in measured.rows if (row["layer"], row["site"]) == (1, "ffn"))
        other = closed(model, [f"{LAYERS[family]}.1.{LAST[family]['ffn']}"])
        assert row["branch"] == pytest.approx(loss(other, inputs) - loss(model, inputs), rel=1e-9)
        assert "carries a stream" in measured.facts["permuted"]
        assert (row["connection"] is None) == (scheme != "hyper_connections")  # a history is longer after a site


def test_shared_layers_are_all_the_same_one():
    rows = lesion(subject("albert", layers=4), given("albert"), branches=False, draws=0).rows
    assert [row["connection"] for row in rows] == pytest.approx([rows[0]["connection"]] * 4)
    assert {row["site"] for row in rows} == {"block"}


def test_an_encoder_decoder_keeps_its_first_layer_in_place():
    measured = lesion(subject("t5", layers=4), given("t5"), draws=2)
    orders = [row["which"].split() for row in measured.rows if row["site"] == "permuted"]
    assert orders
    assert all(order[0] == "0" for order in orders)  # it alone has the table of positions


def test_several_batches_are_weighted_by_their_labels():
    model, one = subject("gpt2"), given("gpt2")
    two = {name: value[:1] for name, value in one.items()}
    expected = (2 * loss(model, one) + loss(model, two)) / 3
    assert lesion(model, [one, two], draws=0).facts["loss"] == pytest.approx(expected, rel=1e-12)
    assert lesion(model, one, draws=1, seed=3).to_csv() == lesion(model, one, draws=1, seed=3).to_csv()


def test_of_the_labels_of_a_causal_model_the_first_does_not_count():
    causal = tiny_host("gpt2", AutoModelForCausalLM)
    one = given("gpt2")
    two = {name: value[:1] for name, value in one.items()}
    for batch in (one, two):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    two["labels"] = two["labels"].clone()
    two["labels"][:, 2:] = -100  # of two labels nothing predicts the first
    number = int((one["labels"][:, 1:] != -100).sum())
    expected = (number * loss(causal, one) + loss(causal, two)) / (number + 1)
    assert lesion(causal, [one, two], draws=0).facts["loss"] == pytest.approx(expected, rel=1e-12)


def test_layers_below_a_lesion_are_not_run_again():
    model, calls = subject("gpt2", layers=4), [0] * 4
    for number, layer in enumerate(model.transformer.h):

        def entering(module, args, number=number):
            calls[number] += 1

        layer.mlp.register_forward_pre_hook(entering)
    one = lesion(model, given("gpt2"), branches=False, draws=0)
    assert calls == [2, 3, 4, 5]  # for the whole, and for each lesion at or below
    assert lesion(model, [given("gpt2")] * 2, branches=False, draws=0).to_csv() == one.to_csv()  # runs all of them
    assert calls == [12, 13, 14, 15]


def test_tau():
    assert tau([0, 1, 2]) == 1
    assert tau([2, 1, 0]) == -1
    assert tau([1, 0, 2]) == pytest.approx(1 / 3)


def test_wrong_arguments():
    model = subject("gpt2")
    with pytest.raises(ValueError, match="no batch was given"):
        lesion(model, [])
    with pytest.raises(ValueError, match="draws must be a whole number, 0 for none, got -1"):
        lesion(model, given("gpt2"), draws=-1)
