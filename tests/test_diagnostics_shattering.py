"""Gradient correlation and autocorrelation against hand-computed cases."""

import math

import pytest
import torch
from diagnosed import given, subject

from resformer.diagnostics.shattered_nets import (
    NETS,
    Line,
    autocorrelation,
    brown_noise,
    line_gradient,
    net_correlation,
    shattered_nets,
    white_noise,
)
from resformer.diagnostics.shattering import gradient_correlation, input_gradients, shattering
from resformer.diagnostics.small_nets import perceptrons
from resformer.host import find_host
from resformer.testing.hosts import WIDTH


def test_correlation_is_the_mean_cosine_over_pairs():
    gradients = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    # pairs: 1 and 0 and -1, 0 and -1, 0
    assert gradient_correlation(gradients) == pytest.approx(-1 / 6)
    assert gradient_correlation(torch.ones(4, 2, 3)) == pytest.approx(1.0)


def test_inputs_without_a_gradient_are_left_out():
    gradients = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert gradient_correlation(gradients) == pytest.approx(0.5**0.5)
    assert math.isnan(gradient_correlation(gradients[:2]))


def test_input_gradients_of_a_quadratic():
    x = torch.randn(3, 4)
    net = torch.nn.Linear(4, 4)
    torch.testing.assert_close(input_gradients(lambda v: v.square().sum(1), x), 2 * x)
    input_gradients(net, x)
    assert net.weight.grad is None
    assert not x.requires_grad


def test_autocorrelation_against_a_slow_loop():
    signals = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    rows = signals.double().tolist()
    middle = sum(map(sum, rows)) / 12

    def covariance(lag: int) -> float:
        pairs = [(row[i] - middle) * (row[i + lag] - middle) for row in rows for i in range(6 - lag)]
        return sum(pairs) / len(pairs)

    expected = [covariance(lag) / covariance(0) for lag in range(4)]
    assert autocorrelation(signals, 3).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"lags must lie in \[0, 5\] for 6 points, got 6"):
        autocorrelation(signals, 6)


def test_white_and_brown_noise():
    generator = torch.Generator().manual_seed(0)
    white, brown = white_noise(50, 200, generator), brown_noise(50, 200, generator)
    assert abs(autocorrelation(white, 5)[5]) < 0.03
    assert autocorrelation(brown, 5)[5] > 0.9
    torch.testing.assert_close(brown[:, 1:].diff()[0], brown[0, 1:].diff())
    assert brown.diff().var() == pytest.approx(1.0, abs=0.05)


def test_the_derivative_along_the_line():
    torch.manual_seed(0)
    # norms of single points, so that one point does not move the others
    net = Line(perceptrons(2, 16, "identity", placement="pre"), 16).double()
    net.norm = torch.nn.Identity()
    net.weight, net.shift, net.readout = net.weight.double(), net.shift.double(), net.readout.double()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    slopes = (net(x + 1e-6) - net(x - 1e-6)) / 2e-6
    torch.testing.assert_close(input_gradients(net, x), slopes.detach(), rtol=1e-5, atol=1e-5)
    assert line_gradient(Line(perceptrons(2, 16, "plain"), 16), 32).shape == (32,)


@pytest.mark.parametrize(("family", "scheme"), [("bert", None), ("gpt2", "hyper_connections"), ("t5", None)])
def test_correlations_of_a_model_by_hand(family, scheme):
    """Every text's gradient alone, of texts that are run alone."""
    model, inputs = subject(family, scheme, layers=2), given(family)
    measured = shattering(model, inputs, samples=1, seed=3)
    rows = [row for row in measured.rows if row["stack"] == measured.rows[-1]["stack"]]
    v = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(3)).double()[0]
    layers = model.decoder.block if family == "t5" else find_host(model).layers
    kept = {}

    def entering(module, args, output):
        stream = output[1:] if scheme else (output[0] if isinstance(output, tuple) else output,)
        kept["x"] = stream
        for tensor in stream:
            tensor.retain_grad()

    layers[0].register_forward_hook(entering)
    layers[1].register_forward_hook(lambda _, args, out: kept.update(end=out[0] if isinstance(out, tuple) else out))
    model(**inputs)
    mask = inputs["labels"] != -100 if family == "t5" else inputs["attention_mask"] > 0
    gradients = []
    for text in range(2):
        (kept["end"][text, mask[text]].mean(0) @ v).backward(retain_graph=True)
        own = [tensor.grad[text] * mask[text].view(-1, *[1] * (tensor.ndim - 2)) for tensor in kept["x"]]
        gradients.append(torch.cat([g.flatten() for g in own]).tolist())
        for tensor in kept["x"]:
            tensor.grad = None
    sizes = [math.hypot(*g) for g in gradients]
    expected = sum(a * b for a, b in zip(*gradients, strict=True)) / sizes[0] / sizes[1]
    row = next(row for row in rows if row["layer"] == 1)
    assert row["correlation"] == pytest.approx(expected, rel=1e-9)
    lengths = mask.sum(1).tolist()
    shares = math.sqrt(min(lengths) / max(lengths))  # at the top all tokens of a text have the same
    assert rows[-1]["correlation"] == pytest.approx(shares)


def test_correlations_need_two_texts():
    one = {name: value[:1] for name, value in given("bert").items()}
    with pytest.raises(ValueError, match="two of them or more, got 1"):
        shattering(subject("bert"), one)
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1, got 0"):
        shattering(subject("bert"), given("bert"), samples=0)


def test_without_norms_the_first_layers_follow_the_law():
    """2^-L for plain nets, (3/4)^L for residual ones."""
    measured = shattered_nets({"plain": NETS["plain"], "residual": NETS["residual"]}, (1,), seeds=range(3))
    assert measured.column("correlation") == pytest.approx([1 / 2, 3 / 4], abs=0.03)
    assert None not in measured.column("line")


def test_small_nets_by_name():
    nets = {"plain": ("plain", "batch"), "own": ("scaled:branch=0.1", "layer")}
    before = torch.get_rng_state()
    measured = shattered_nets(nets, (1, 2), width=32, seeds=[5])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    expected = net_correlation(2, 32, "scaled", 128, norm=torch.nn.LayerNorm, placement="pre", branch=0.1)
    assert measured.column("correlation")[3] == expected
    assert measured.column("line")[2:] == [None, None]
    assert measured.facts["rate, plain"] == pytest.approx(
        measured.rows[1]["correlation"] / measured.rows[0]["correlation"]
    )
    assert measured.plot().endswith("</svg>\n")
    with pytest.raises(ValueError, match="unknown norm 'bach'"):
        shattered_nets({"plain": ("plain", "bach")})
    with pytest.raises(ValueError, match="at least one seed and one depth"):
        shattered_nets(seeds=[])
