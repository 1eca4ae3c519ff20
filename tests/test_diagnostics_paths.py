"""Paths by length: counts, routes and what follows from them, against closed forms."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from diagnosed import given, subject

import resformer
from resformer.diagnostics.gradient_flow import gradient_flow
from resformer.diagnostics.paths import (
    PathGradients,
    draw_paths,
    log_path_counts,
    past_branch,
    paths,
    routed,
    through_branch,
)
from resformer.diagnostics.small_nets import perceptrons
from resformer.host import find_host
from resformer.stack import ResidualStack


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


def along(schemes, gradient):
    def norm_along(through):
        with routed(schemes, through):
            return float(gradient().double().norm())

    return norm_along


def test_scaled_identities_decay_by_their_scale():
    stack = ResidualStack([lambda x: 0.5 * x] * 6, 4, "identity", placement="none")
    x = torch.randn(3, 4, requires_grad=True)
    found = draw_paths(6, along(stack.schemes, lambda: torch.autograd.grad(stack(x).sum(), x)[0]))
    assert found.means == pytest.approx([12**0.5 * 0.5**k for k in range(7)], rel=1e-5)
    assert found.decay() == pytest.approx(0.5, rel=1e-5)
    assert found.effective_length() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*also scales initial weights")
@pytest.mark.parametrize("scheme", ["identity", "highway", "x0_mix", "hyper_connections", "denseformer", "ode"])
def test_all_paths_together_are_the_gradient(scheme):
    """Of a net that is not linear: the sum over 2^n routes is what autograd gives without any."""
    torch.manual_seed(0)
    net = perceptrons(4, 8, scheme).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    gradient = lambda: torch.autograd.grad(net(x).square().sum(), x)[0]
    whole, out = gradient(), net(x)
    total = torch.zeros_like(x)
    for through in itertools.product([False, True], repeat=4):
        with routed(net.schemes, through):
            torch.testing.assert_close(net(x), out, rtol=0, atol=0)
            total += gradient()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient(), whole, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_paths_of_a_model_by_hand(family):
    """Past all branches nothing but norms stands on the way; through all of them, no shortcut."""
    model, inputs = subject(family, layers=2), given(family)
    measured = paths(model, inputs, samples=2)
    assert measured.column("length") == [0, 1, 2, 3, 4]
    assert [10**one for one in measured.column("paths")] == pytest.approx([1, 4, 6, 4, 1])
    whole = gradient_flow(model, inputs).rows[0]["stream"]
    expected = {}
    for k, scheme in ((0, "scaled"), (4, "plain")):
        other = resformer.patch(copy.deepcopy(model), scheme, init="paper", placement="native")
        layers = find_host(other).layers
        for layer in layers:
            for site in ("attn", "ffn"):
                one = getattr(layer.resformer, site)
                one.step = partial((past_branch, through_branch)[k == 4], lambda s, b, n: n(s + b(s)))
        expected[k] = gradient_flow(other, inputs).rows[0]["stream"]
    assert measured.column("gradient")[0] == pytest.approx(expected[0], rel=1e-9)
    assert measured.column("gradient")[4] == pytest.approx(expected[4], rel=1e-9)
    assert whole != pytest.approx(expected[0], rel=1e-3)
    assert paths(model, inputs, samples=2).to_csv() == measured.to_csv()


def test_a_path_of_every_scheme_and_stack():
    """Where branches are closed the gradient comes past them; each stack has its own paths."""
    facts = paths(subject("t5", "rezero", layers=2), given("t5"), samples=1).facts
    assert (facts["encoder_sites"], facts["decoder_sites"]) == (6, 6)  # three layers of two sites, two of three
    closed = paths(resformer.patch(subject("gpt2"), "rezero", init="paper"), given("gpt2"), samples=1)
    assert closed.facts["decay"] == 0
    assert closed.facts["effective_length"] == 0
    model = subject("gpt2")
    model.score.weight.data.zero_()
    assert paths(model, given("gpt2"), lengths=[0, 2], samples=1).facts == {"sites": 6, "verdict": "zero"}


def test_what_has_no_paths():
    model = subject("bert", layers=2)
    with pytest.raises(ValueError, match=r"lie in \[0, 4\] with 4 residual sites, got \[9\]"):
        paths(model, given("bert"), lengths=[9])
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1, got 0"):
        paths(model, given("bert"), samples=0)
    with pytest.raises(ValueError, match="at least 1 with a gradient"):
        PathGradients(2, (0, 1), ((1.0,), (1.0,))).decay()
    with pytest.raises(ValueError, match="does not depend on the stack's input"):
        PathGradients(2, (0, 1), ((0.0,), (0.0,))).contributions()
