"""What the claims measure with, on networks for which the answer is known."""

import math

import pytest
import torch
from torch import nn

from resformer.diagnostics.small_nets import perceptrons, transformer
from resformer.theory.claim import find_claim
from resformer.theory.claims import (
    decomposition,
    ensemble,
    explosion,
    half_gate,
    last_layer,
    rank,
    reordering,
    shattering,
    shortcut_product,
    update_growth,
    vanishing,
    variance_growth,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


OPEN = {"branch": 0.0, "placement": "none"}  # the shortcut alone: x


def test_shattering_of_the_identity():
    assert shattering.correlation(3, "scaled", OPEN) == pytest.approx(1.0)


def test_squares_of_the_identity():
    assert explosion.square(3, OPEN) == pytest.approx(1.0)
    assert explosion.square(3, OPEN | {"shortcut": 2.0}) == pytest.approx(4.0**3)


def test_gain_of_the_skip_path():
    assert shortcut_product.gain(0.8, 0.0) == pytest.approx(0.8)


def test_gradients_that_pass_unchanged():
    norms, gradients = vanishing.backward(perceptrons(4, vanishing.WIDTH, "scaled", placement="pre", branch=0.0))
    assert norms == pytest.approx([norms[0]] * 4)
    assert gradients.norm().item() == pytest.approx(norms[0], rel=0.2), "of other inputs, and of the same size"


def test_a_stream_to_which_nothing_is_added():
    net = transformer(3, variance_growth.WIDTH, "pre_ln")
    for weight in net.sublayers.parameters():
        nn.init.zeros_(weight)
    squares = variance_growth.growth(net)
    assert squares == pytest.approx([squares[0]] * 3)
    assert squares[0] == pytest.approx(1.0, rel=0.1)


def test_gradients_of_single_tokens():
    linear, x = nn.Linear(3, 2, bias=False), torch.randn(5, 3)
    out = linear(x)
    delta = torch.randn(5, 2)
    found = last_layer.token_norms(x, delta)
    for token in range(5):
        (own,) = torch.autograd.grad((out[token] * delta[token]).sum(), linear.weight, retain_graph=True)
        assert found[token].item() == pytest.approx(own.norm().item())


def test_the_stream_before_the_last_norm():
    assert last_layer.gradients(1, "post_ln")[2] == pytest.approx(1.5, abs=0.3)
    token, whole, square = last_layer.gradients(2, "pre_ln")
    assert min(token, whole) > 0
    assert 1 + 2 / 2 < square < 1 + 3 * 2 / 2


def test_how_far_the_output_moves():
    net, x = nn.Linear(3, 2, bias=False), torch.randn(7, 3)
    before, step = net.weight.clone(), torch.randn(2, 3)
    found = update_growth.moved(net, x, net(x), [net.weight], [step])
    assert found == pytest.approx((x @ step.T).square().mean().item(), rel=1e-5)
    assert torch.equal(net.weight, before)


def test_a_bend_tells_a_logarithm_from_powers():
    """And the tolerances of the laws lie between: a root and a constant hold to none of them."""
    laws = {law.quantity: law for law in find_claim("update_growth").laws}
    straight = laws["pre-LN, random change: bend from a + b ln L"]
    for power, expected in ((0.5, 1 / 3), (1.0, 0.6)):
        found = update_growth.bend([depth**power for depth in update_growth.DEPTHS])
        assert found == pytest.approx(expected)
        assert not straight.holds(found)
    assert update_growth.bend([2 + 3 * math.log(depth) for depth in update_growth.DEPTHS]) == pytest.approx(0.0)
    linear = laws["feed-forwards in post-LN, random: exponent"]
    assert not any(linear.holds(power) for power in (0.0, 0.5, 1.5))


def test_rank_of_a_rotation():
    turn = torch.linalg.qr(torch.randn(rank.WIDTH, rank.WIDTH))[0]
    assert rank.jacobian_rank(lambda x: x @ turn) == pytest.approx(rank.WIDTH, rel=1e-4)


def test_the_sum_of_what_is_added():
    net = transformer(2, decomposition.WIDTH, "pre_ln")
    x, branches, out = decomposition.trace(net)
    assert len(branches) == 4
    assert decomposition.error(out, [x, *branches]) < 1e-6
    assert decomposition.error(out, [x, *branches[1:]]) > 0.1, "a term that is missing shows"


def test_equal_nets_are_equal_and_others_are_not():
    words = torch.randint(half_gate.WORDS, (2, 5))
    states = half_gate.states(0, words, 1, "identity", "post")
    assert torch.equal(states, half_gate.states(0, words, 1, "identity", "post"))
    assert (states - half_gate.states(0, words, 1, "scaled", "post", shortcut=0.5)).abs().max() > 0.1


def test_lesions_of_a_net_whose_blocks_do_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = perceptrons(ensemble.DEPTH, 4, "scaled", branch=0.0, placement="none")

        def forward(self, x):
            return self.stack(x)[:, 0]

    x = torch.randn(50, 4)
    found = ensemble.lesions(Net(), x, (x[:, 0] > 0).float(), 0)
    assert found == [1.0] * (ensemble.DEPTH + 1)


def test_blocks_change_places_with_their_norms():
    net, x = perceptrons(3, 4, "identity", placement="pre"), torch.randn(5, 4)
    other = perceptrons(3, 4, "identity", placement="pre")
    for norms in net.norms:
        nn.init.normal_(norms["pre"].weight)
    for place, block in enumerate((2, 0, 1)):
        other.sublayers[place].load_state_dict(net.sublayers[block].state_dict())
        other.norms[place].load_state_dict(net.norms[block].state_dict())
    before = net(x)
    with reordering.reordered(net, (2, 0, 1)):
        torch.testing.assert_close(net(x), other(x))
    assert torch.equal(net(x), before)


def test_orders_at_graded_distances():
    found = reordering.orders()
    assert all(sorted(order) == list(range(ensemble.DEPTH)) for order in found)
    assert sorted({reordering.apart(order) for order in found}) == [2, 4, 8, 16]


def test_units_that_cannot_be_told_apart():
    assert rank.asymmetry("plain") == pytest.approx(0.0, abs=1e-5)
    assert rank.asymmetry("identity") > 0.01
