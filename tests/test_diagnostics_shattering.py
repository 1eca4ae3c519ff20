"""Gradient correlation and autocorrelation against hand-computed cases."""

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import resformer
from resformer.diagnostics.shattering import (
    Line,
    autocorrelation,
    brown_noise,
    gradient_correlation,
    input_gradients,
    layer_correlations,
    line_gradient,
    white_noise,
)
from resformer.diagnostics.small_nets import perceptrons
from resformer.testing.hosts import batch, tiny_host


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


def test_correlations_of_a_model_by_layer():
    model = tiny_host("bert", AutoModelForSequenceClassification, layers=3).train()
    given = batch(padded=True, labels=True)
    found = layer_correlations(model, given, samples=2)
    assert len(found) == 4
    # the last layer of a post-LN host is what is pooled: the direction is everybody's
    mask = given["attention_mask"].double()
    shares = mask / mask.sum(1, keepdim=True)
    assert found[-1] == pytest.approx(gradient_correlation(shares))
    assert found[0] < found[-1]
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert layer_correlations(model, given, samples=2) == found


def test_correlations_need_sentences_and_one_tensor():
    model = tiny_host("bert", AutoModelForSequenceClassification, layers=2)
    one = {name: value[:1] for name, value in batch().items()}
    with pytest.raises(ValueError, match="two of them or more, got 1"):
        layer_correlations(model, one)
    resformer.patch(model, "hyper_connections")
    with pytest.raises(ValueError, match="has a stream of more"):
        layer_correlations(model, batch())
    with pytest.raises(ValueError, match="is not one of them"):
        layer_correlations(tiny_host("t5"), batch())
