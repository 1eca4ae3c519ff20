"""What every measurement must leave as it was, and say of models and batches that it cannot measure."""

import pytest
import torch
from diagnosed import SUBJECTS, assert_same, fingerprint, given, subject
from transformers import AutoModel, AutoModelForSequenceClassification

import resformer
from resformer.diagnostics.measures import MEASURES
from resformer.diagnostics.observe import NotFiniteError, loss_of, observed, watching
from resformer.sites import connections, within_reach
from resformer.testing.hosts import batch, stands, tiny_host

FEW: dict[str, dict] = {"lesion": {"draws": 1}, "paths": {"samples": 1, "lengths": [0, 1]}, "update_size": {"steps": 1}}


@pytest.mark.parametrize(("family", "scheme"), SUBJECTS)
@pytest.mark.parametrize("name", MEASURES)
def test_the_model_is_left_as_it_was(name, family, scheme):
    model = subject(family, scheme, layers=2).train()
    frozen = next(model.parameters()).requires_grad_(False)
    next(iter(model.children())).eval()
    before = fingerprint(model)
    MEASURES[name](model, given(family))
    assert_same(fingerprint(model), before)
    assert not frozen.requires_grad


@pytest.mark.slow  # scripts/test.sh -m slow -k every_family: an encoder, a decoder and both together are above
@pytest.mark.parametrize("scheme", [None, "identity", "pre_ln", "hyper_connections", "denseformer"])
@pytest.mark.parametrize("family", resformer.families())
def test_every_family_can_be_measured(family, scheme):
    if scheme is not None and not stands(scheme, family):
        pytest.skip(f"{scheme} is refused there")
    model, inputs = subject(family, scheme, layers=2), given(family)
    before = fingerprint(model)
    for name, measure in MEASURES.items():
        measured = measure(model, inputs, **FEW.get(name, {}))
        assert measured.rows or name == "gates"  # which has none of schemes without coefficients
        assert measured.to_json()
    assert_same(fingerprint(model), before)


@pytest.mark.parametrize(("family", "scheme"), SUBJECTS)
def test_what_is_seen_is_what_the_model_computes(family, scheme):
    """Seen or not, the loss has the same bits; each connection is seen once, in order."""
    model, inputs = subject(family, scheme).eval(), given(family)
    with torch.no_grad():
        expected = loss_of(model, inputs)
    seen = []
    with observed(model, inputs) as host, watching(host, lambda one: seen.append(str(one.at))):
        assert torch.equal(loss_of(model, inputs), expected)
        assert sorted(seen) == sorted(map(str, connections(host)))


def test_a_part_that_is_patched_stays_patched():
    model = tiny_host("gpt2", AutoModelForSequenceClassification, layers=4)
    resformer.patch(model, "scaled", init="paper", branch=0.5, layers=range(1, 3))
    with within_reach(model) as host:
        assert [one.scheme.name for one in connections(host)] == ["identity"] * 2 + ["scaled"] * 4 + ["identity"] * 2
    assert [hasattr(layer, "resformer") for layer in model.transformer.h] == [False, True, True, False]
    resformer.unpatch(model)


def test_what_fails_leaves_the_model_as_it_was():
    model = subject("bert")
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    before = fingerprint(model)
    for measure in MEASURES.values():
        with pytest.raises(NotFiniteError, match="first in what the branch gives at site 'ffn' of layer 1") as error:
            measure(model, given("bert"))
        assert error.value.where == "site 'ffn' of layer 1 of the encoder"
    after = fingerprint(model)
    before["weights"] = after["weights"] = {}
    assert_same(after, before)


def test_nan_that_enters():
    model = subject("gpt2", "hyper_connections")
    model.transformer.wpe.weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="first in what enters the decoder at site 'attn' of layer 0"):
        MEASURES["signal_propagation"](model, given("gpt2"))


@pytest.mark.parametrize("name", MEASURES)
def test_wrong_batches(name):
    measure, model = MEASURES[name], subject("bert")
    with pytest.raises(ValueError, match=r"unknown key 'input_id'.*Did you mean 'input_ids'"):
        measure(model, {"input_id": torch.ones(1, 4, dtype=torch.long), "labels": torch.tensor([0])})
    with pytest.raises(ValueError, match="a batch maps the names"):
        measure(model, torch.ones(1, 4))
    with pytest.raises(ValueError, match="the batch is empty"):
        measure(model, {name: value[:0] for name, value in batch(labels=True).items()})


WRONG = [
    ({"input_ids": [[1, 2]]}, "'input_ids' of the batch is a list; give a tensor"),
    ({"input_ids": torch.tensor([1, 2])}, r"'input_ids' of the batch must be of \(texts, tokens\), got \(2,\)"),
    ({"attention_mask": torch.ones(2, 3)}, "'attention_mask' of the batch must be of the 2 texts and"),
    ({"attention_mask": torch.tensor([[1] * 9, [0] * 9])}, "'attention_mask' of the batch hides all tokens of text 1"),
    ({"labels": torch.tensor([0])}, r"'input_ids' of the batch is of 2 texts, 'labels' has the shape \(1,\)"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_values_in_a_batch(wrong, message):
    with pytest.raises(ValueError, match=message):
        MEASURES["gradient_flow"](subject("bert"), given("bert") | wrong)


@pytest.mark.parametrize("name", ["gradient_flow", "lesion", "paths", "update_size"])
def test_labels_that_leave_nothing_to_predict(name):
    inputs = given("gpt2")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with pytest.raises(ValueError, match="the labels leave nothing to predict: they are -100 throughout"):
        MEASURES[name](subject("gpt2"), inputs)


def test_inference_mode_is_left_for_the_while():
    model, inputs = subject("bert", layers=2), given("bert")
    expected = {name: MEASURES[name](model, inputs).to_json() for name in MEASURES}
    with torch.inference_mode():
        for name, measure in MEASURES.items():
            assert measure(model, inputs).to_json() == expected[name]
        assert torch.is_inference_mode_enabled()
        made, other = {name: value.clone() for name, value in inputs.items()}, subject("bert", layers=2)
    with pytest.raises(ValueError, match=r"of the batch was made under torch\.inference_mode"):
        MEASURES["gradient_flow"](model, made)
    with pytest.raises(ValueError, match=r"weights of this .* were made under torch\.inference_mode"):
        MEASURES["gradient_flow"](other, inputs)


@pytest.mark.parametrize("name", MEASURES)
def test_too_few_layers_and_no_layers(name):
    shallow = tiny_host("bert", AutoModelForSequenceClassification, layers=1)
    with pytest.raises(ValueError, match=f"{name} is about depth and needs at least two layers"):
        MEASURES[name](shallow, batch(labels=True))

    class Net(torch.nn.Module):
        def forward(self, input_ids, labels=None):
            return input_ids

    with pytest.raises(ValueError, match="no family describes this Net"):
        MEASURES[name](Net(), {"input_ids": torch.ones(1, 4), "labels": torch.ones(1)})


@pytest.mark.parametrize("name", ["gradient_flow", "lesion", "paths", "update_size"])
def test_no_loss(name):
    with pytest.raises(ValueError, match="a BertModel has no loss; load it with a head"):
        MEASURES[name](tiny_host("bert", AutoModel), batch())
    with pytest.raises(ValueError, match="the batch has no 'labels', so there is no loss"):
        MEASURES[name](subject("bert"), batch())
