"""Layer Jacobians against the whole matrix, row by row."""

import pytest
import torch
from diagnosed import given, subject

from resformer.diagnostics.layer_jacobian import layer_jacobian


@pytest.mark.parametrize(("family", "scheme"), [("bert", None), ("gpt2", None), ("gpt2", "hyper_connections")])
def test_against_the_whole_jacobian(family, scheme):
    model = subject(family, scheme, layers=2)
    inputs = {name: value[:1, :3] if value.ndim > 1 else value[:1] for name, value in given(family).items()}
    measured = layer_jacobian(model, inputs, probes=500)
    layers = model.base_model.encoder.layer if family == "bert" else model.base_model.h
    kept = {}

    def leaving(module, args, output):
        stream = output[1:] if isinstance(output, tuple) else (output,)
        kept["x"] = [tensor.detach().requires_grad_() for tensor in stream]
        return (output[0], *kept["x"]) if isinstance(output, tuple) else kept["x"][0]

    layers[0].register_forward_hook(leaving)
    if scheme is None:
        layers[1].register_forward_hook(lambda _, args, out: kept.update(y=out))
    else:  # the stream before the readout
        ffn = layers[1].resformer.ffn
        step = ffn.step
        ffn.step = lambda *args: kept.update(y=step(*args)[0]) or (kept["y"],)
    model(**inputs)
    y = kept["y"].flatten()
    rows = [torch.autograd.grad(one, kept["x"], retain_graph=True)[0].flatten() for one in y]
    jacobian, n = torch.stack(rows), len(y)
    row = measured.rows[1]
    assert row["distance"] == pytest.approx(float((jacobian - torch.eye(n)).norm()) / n**0.5, rel=0.05)
    assert row["gain"] == pytest.approx(float(jacobian.norm()) / n**0.5, rel=0.05)
    assert row["diagonal"] == pytest.approx(float(jacobian.trace()) / n, rel=0.1)


def test_closed_branches_leave_the_shortcut():
    measured = layer_jacobian(subject("gpt2", "scaled", shortcut=0.8, branch=1e-9, layers=4), given("gpt2"))
    assert measured.column("gain") == pytest.approx([0.64] * 4, rel=1e-6)
    assert measured.column("diagonal") == pytest.approx([0.64] * 4, rel=1e-6)
    assert measured.column("distance") == pytest.approx([0.36] * 4, rel=1e-6)
    assert measured.facts["effective_depth"] == pytest.approx(4)


def test_a_layer_that_does_nothing_is_not_counted():
    model = subject("gpt2", layers=3)
    for part in (model.transformer.h[1].attn.c_proj, model.transformer.h[1].mlp.c_proj):
        part.weight.data.zero_()
    measured = layer_jacobian(model, given("gpt2"))
    assert measured.rows[1]["distance"] == 0
    assert measured.facts["effective_depth"] < 2 + 1e-9


def test_a_history_that_grows_has_no_identity():
    measured = layer_jacobian(subject("gpt2", "attn_residual"), given("gpt2"))
    assert measured.column("distance") == [None] * 3
    assert measured.facts == {}
    with pytest.raises(ValueError, match="probes must be a whole number of at least 1, got True"):
        layer_jacobian(subject("gpt2"), given("gpt2"), probes=True)
