"""Paths by length: counts, routes and what follows from them, against closed forms."""

import itertools
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import resformer
from resformer.diagnostics.paths import PathGradients, log_path_counts, path_gradients, routed, sampled
from resformer.diagnostics.small_nets import perceptrons
from resformer.stack import ResidualStack
from resformer.testing.hosts import batch, tiny_host


def test_counts_are_binomial_also_where_they_overflow():
    assert [math.exp(one) for one in log_path_counts(6)] == pytest.approx([1, 6, 15, 20, 15, 6, 1])
    counts = log_path_counts(1000)
    assert counts[500] == pytest.approx(math.log(math.comb(1000, 500)), rel=1e-12)
    assert sum(math.exp(one - 1000 * math.log(2)) for one in counts) == pytest.approx(1.0)
    assert all(map(math.isfinite, log_path_counts(5000)))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        log_path_counts(0)


@pytest.mark.parametrize("n", [12, 1000])
@pytest.mark.parametrize("r", [0.25, 1.0])
def test_equal_decay_has_a_closed_form(n, r):
    """With |g_k| = r^k the weighted length is binomial with p = r / (1 + r)."""
    lengths = tuple(range(0, n + 1, 4))
    found = PathGradients(n, lengths, tuple((max(r**k, 5e-324),) for k in lengths))
    if r**n > 0:
        assert found.decay() == pytest.approx(r)
        assert found.effective_length() == pytest.approx(n * r / (1 + r))
    assert sum(found.contributions()) == pytest.approx(1.0)
    if r == 1:
        assert found.effective_paths() > 0.95


def test_few_paths_count_where_gradients_decay_fast():
    found = PathGradients(54, tuple(range(55)), tuple((0.3**k,) for k in range(55)))
    assert found.effective_length() == pytest.approx(54 * 0.3 / 1.3)
    assert found.effective_paths() < 0.05


def test_scaled_identities_decay_by_their_scale():
    stack = ResidualStack([lambda x: 0.5 * x] * 6, 4, "identity", placement="none")
    x = torch.randn(3, 4, requires_grad=True)
    found = sampled(list(stack.schemes), lambda: torch.autograd.grad(stack(x).sum(), x)[0])
    assert found.means == pytest.approx([12**0.5 * 0.5**k for k in range(7)], rel=1e-5)
    assert found.decay() == pytest.approx(0.5, rel=1e-5)
    assert found.effective_length() == pytest.approx(2.0, rel=1e-5)


def test_all_paths_together_are_the_gradient():
    """Of a net that is not linear: the sum over 2^n routes is what autograd gives without any."""
    torch.manual_seed(0)
    net = perceptrons(4, 8, "identity", placement="pre").double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    gradient = lambda: torch.autograd.grad(net(x).square().sum(), x)[0]
    whole, out = gradient(), net(x)
    total = torch.zeros_like(x)
    for through in itertools.product([False, True], repeat=4):
        with routed(list(net.schemes), through):
            torch.testing.assert_close(net(x), out, rtol=0, atol=0)
            total += gradient()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient(), whole, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_paths_of_a_model_leave_it_alone(family):
    model = tiny_host(family, AutoModelForSequenceClassification, layers=2).train()
    given = batch(labels=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = path_gradients(model, given, samples=2)
    assert found.sites == 4
    assert found.lengths == (0, 1, 2, 3, 4)
    assert all(mean > 0 for mean in found.means)
    assert [len(one) for one in found.norms] == [1, 2, 2, 2, 1]
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not hasattr(model.config, "resformer"), "an unpatched model stays unpatched"
    patched = resformer.patch(model, "identity")
    again = path_gradients(patched, given, samples=2)
    assert again.means == pytest.approx(found.means, rel=1e-4)


def test_what_has_no_paths():
    given = batch(labels=True)
    model = tiny_host("bert", AutoModelForSequenceClassification, layers=2)
    with pytest.raises(ValueError, match=r"lie in \[0, 4\] with 4 residual sites, got \[9\]"):
        path_gradients(model, given, lengths=[9])
    with pytest.raises(ValueError, match="samples must be a whole number"):
        path_gradients(model, given, samples=0)
    with pytest.raises(ValueError, match="gives no loss for this batch"):
        path_gradients(model, {name: value for name, value in given.items() if name != "labels"})
    for scheme in ("denseformer", "ode"):
        stack = ResidualStack([torch.relu] * 2, 4, scheme)
        with pytest.raises(ValueError, match=f"scheme '{scheme}' joins them otherwise"):
            sampled(list(stack.schemes), lambda: None)
    with pytest.raises(ValueError, match="at least 1 with a gradient"):
        PathGradients(2, (0, 1), ((1.0,), (1.0,))).decay()
    with pytest.raises(ValueError, match="does not depend on the stack's input"):
        PathGradients(2, (0, 1), ((0.0,), (0.0,))).contributions()
