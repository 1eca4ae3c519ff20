"""Small networks under the lemmas' conditions, and populations of them, against the same by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from resformer.diagnostics.population import Population
from resformer.diagnostics.small_nets import BatchNorm, MeanAttention, Rectified, perceptrons, transformer


def test_batch_norm_has_constant_statistics():
    torch.manual_seed(0)
    x = (3 * torch.randn(64, 5, dtype=torch.float64) + 2).requires_grad_()
    y = BatchNorm(5)(x)
    assert torch.allclose(y.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(y.var(0, correction=0), torch.ones(5, dtype=torch.float64), atol=1e-4)
    (gradient,) = torch.autograd.grad(y[0].sum(), x)
    assert torch.allclose(gradient[0], (x.detach().var(0, correction=0) + 1e-5).rsqrt())
    assert not gradient[1:].any(), "other inputs of the batch have no share"


def test_mean_attention_is_attention_without_scores():
    torch.manual_seed(0)
    attention, x = MeanAttention(8), torch.randn(2, 5, 8)
    zero = torch.zeros(2, 5, 8)
    expected = attention.o(scaled_dot_product_attention(zero, zero, attention.v(x)))
    torch.testing.assert_close(attention(x), expected)


def test_rectified_keeps_the_variance():
    torch.manual_seed(0)
    x = torch.randn(256, 512)
    assert Rectified(512)(x).var().item() == pytest.approx(1.0, abs=0.03)
    assert Rectified(512, gain=0.25)(x).var().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(("scheme", "joined"), [("plain", 0.0), ("identity", 1.0)])
def test_perceptrons_by_hand(scheme, joined):
    torch.manual_seed(0)
    net, x = perceptrons(3, 6, scheme, placement="pre"), torch.randn(4, 6)
    y, norm = x, nn.LayerNorm(6)
    for layer in net.sublayers:
        y = joined * y + norm(y).relu() @ layer.linear.weight.T
    torch.testing.assert_close(net(x), norm(y))


def test_deepnorm_scales_the_weights_it_says():
    torch.manual_seed(0)
    plain = transformer(4, 16, "post_ln")
    torch.manual_seed(0)
    scaled = transformer(4, 16, "deepnorm")
    for before, after in zip(plain.sublayers.parameters(), scaled.sublayers.parameters(), strict=True):
        torch.testing.assert_close(after, before * (8 * 4) ** -0.25)


def test_a_member_of_a_population_trains_as_it_would_alone():
    inputs = torch.randn(3, 20, 4, 5, generator=torch.Generator().manual_seed(0))
    build = lambda: perceptrons(2, 5, "rezero")
    nets = Population(build, [5, 6, 7])
    losses = nets.fit(lambda p, step: p(inputs[:, step]).pow(4).mean((1, 2)), 20, 1e-2, clip=0.05)
    torch.manual_seed(6)
    alone = build()
    optimizer = torch.optim.Adam(alone.parameters(), lr=1e-2)
    for step in range(20):
        loss = alone(inputs[1, step]).pow(4).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
        optimizer.step()
        assert losses[step, 1] == pytest.approx(loss.item(), rel=1e-4)
    member = nets.trained()[1]
    torch.testing.assert_close(member(inputs[1, 0]), alone(inputs[1, 0]), rtol=1e-3, atol=1e-5)
    assert not math.isclose(losses[-1, 0].item(), losses[-1, 1].item())


def test_a_population_leaves_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    Population(lambda: nn.Linear(2, 2), range(3))
    assert torch.rand(1) == expected
