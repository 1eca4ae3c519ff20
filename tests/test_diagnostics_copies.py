"""What is measured on copies: rounding, and the first steps of training."""

import copy

import pytest
import torch
from diagnosed import given, subject

from resformer.diagnostics.observe import NotFiniteError
from resformer.diagnostics.precision import precision
from resformer.diagnostics.update_size import update_size


def states_of(model, inputs):
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return [state[inputs["attention_mask"] > 0].double() for state in states]


def test_rounding_against_the_hidden_states_of_a_copy():
    model, inputs = subject("bert").float(), given("bert")
    rows = [row for row in precision(model, inputs).rows if row["site"] in ("attn", "end")]
    exact, rounded = states_of(model, inputs), states_of(copy.deepcopy(model).bfloat16(), inputs)
    assert len(rows) == len(exact) == 4
    for row, x, y in zip(rows, exact, rounded, strict=True):
        assert row["state"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-6)
        assert row["error"] == pytest.approx(float((y - x).square().mean().sqrt()), rel=1e-6)


@pytest.mark.parametrize(("family", "scheme"), [("gpt2", None), ("gpt2", "hyper_connections"), ("bert", "denseformer")])
def test_error_follows_the_precision(family, scheme):
    model, inputs = subject(family, scheme), given(family)
    finals = [precision(model, inputs, dtype=one).facts["final"] for one in (torch.float32, torch.bfloat16)]
    assert 1e-9 < finals[0] < 1e-5
    assert 1e-4 < finals[1] < 0.2
    assert precision(model.bfloat16(), inputs).facts["final"] < 0.2  # against the same weights in fp32


def test_embeddings_that_are_given_are_rounded_too():
    model, inputs = subject("bert").float(), given("bert")
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach().double()
    found = precision(model, inputs)
    assert found.column("state") == pytest.approx(precision(model, given("bert")).column("state"), rel=1e-3)


def test_an_overflow_in_half_precision():
    model = subject("gpt2").float()
    model.transformer.h[1].mlp.c_proj.weight.data *= 1e6
    with pytest.raises(NotFiniteError, match="site 'ffn' of layer 1"):
        precision(model, given("gpt2"), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype must be one of torch.bfloat16, .*, got torch.int8"):
        precision(model, given("gpt2"), dtype=torch.int8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_updates_against_training_by_hand(optimizer):
    model, inputs = subject("bert"), given("bert")
    measured = update_size(model, inputs, steps=2, learning_rate=1e-3, optimizer=optimizer)
    other = copy.deepcopy(model).eval()
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in other.parameters()}
    start = states_of(other, inputs)
    for step in (1, 2):
        other.zero_grad()
        other(**inputs).loss.backward()
        with torch.no_grad():
            for p, (m, v) in moments.items():
                m.mul_(0.9).add_(0.1 * p.grad)
                v.mul_(0.999).add_(0.001 * p.grad**2)
                adam = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                p -= 1e-3 * (p.grad if optimizer == "sgd" else adam)
        for layer, (now, before) in enumerate(zip(states_of(other, inputs), start, strict=True)):
            row = next(row for row in measured.rows if (row["step"], row["layer"]) == (step, layer))
            change = float((now - before).square().mean().sqrt())
            assert row["change"] == pytest.approx(change, rel=1e-6)
            assert row["relative"] == pytest.approx(change / float(before.square().mean().sqrt()), rel=1e-6)
    assert measured.facts["last"] == measured.rows[3]["relative"]


@pytest.mark.parametrize(("family", "scheme"), [("gpt2", "hyper_connections"), ("gpt2", "denseformer")])
def test_the_loss_falls_with_the_steps(family, scheme):
    measured = update_size(subject(family, scheme), given(family), steps=3, learning_rate=1e-3)
    losses = [float(loss) for loss in measured.facts["losses"].split()]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4


def test_wrong_arguments():
    model, inputs = subject("gpt2"), given("gpt2")
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        update_size(model, inputs, steps=0)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0, got 0"):
        update_size(model, inputs, learning_rate=0)
    with pytest.raises(ValueError, match="unknown optimizer 'sdg'"):
        update_size(model, inputs, optimizer="sdg")
    with pytest.raises(ValueError, match="all are frozen"):
        update_size(model.requires_grad_(False), inputs)
