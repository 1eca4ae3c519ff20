"""Schemes with several streams: what the papers fix, and the traps of their implementations."""

import math

import pytest
import torch
from reference.streams import sinkhorn as reference_sinkhorn
from torch import nn
from transformers import AutoModelForSequenceClassification

import resformer
from resformer import ResidualStack, families, schemes
from resformer.schemes import Place
from resformer.schemes.base import Branch
from resformer.schemes.streams import sinkhorn
from resformer.testing.hosts import batch, tiny_host

THREE = ["bert", "gpt2", "modernbert"]


def place(**changes) -> Place:
    return Place(**({"name": "ffn", "index": 2, "sites": 6, "layer": 1, "layers": 3, "width": 8} | changes))


def inner(**changes) -> Place:
    return place(opens=False, closes=False, **changes)


def patched(family: str, name: str, init: str, **options):
    return resformer.patch(tiny_host(family, layers=3), name, init=init, **options)


def sites(model, name: str) -> list:
    return [module for module in model.modules() if type(module) is schemes()[name]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mhc", {"num_streams": 1}, "at least 2, got 1"),
        ("mhc", {"num_streams": 2.0}, "num_streams"),
        ("mhc", {"iterations": 0}, "iterations"),
        ("frac_connections", {"num_fractions": 3}, "divide the width 8, got 3"),
        ("frac_connections", {"num_fractions": 0}, "num_fractions"),
        ("frac_connections", {"dynamic": 1}, "dynamic"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        schemes()[name](place(), **options)


# ------------------------------------------------------------------------------------------------ mhc


def test_sinkhorn_is_doubly_stochastic():
    logits = torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sinkhorn(logits, 20)
    ones = torch.ones(5, 4, dtype=torch.float64)
    torch.testing.assert_close(found.sum(-1), ones, rtol=0, atol=1e-14)  # rows come last, and are exact
    torch.testing.assert_close(found.sum(-2), ones, rtol=0, atol=1e-4)
    assert (found >= 0).all()
    for few in (1, 20):
        expected = torch.tensor([reference_sinkhorn(one, few) for one in logits.tolist()], dtype=torch.float64)
        torch.testing.assert_close(sinkhorn(logits, few), expected, rtol=1e-12, atol=1e-14)
    assert sinkhorn(300 * logits.float(), 20).isfinite().all(), "the exponential of such logits overflows"


def test_mhc_mixes_rows_not_columns():
    """Doubly stochastic matrices hide a transposed one: sums agree and it trains. Here streams move to others."""
    scheme = schemes()["mhc"](inner(width=2), init="paper", num_streams=3).double()
    forward = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]])  # stream 0 takes 1, 1 takes 2, 2 takes 0
    with torch.no_grad():
        scheme.shift[6:] = (60.0 * forward - 30).flatten()
    h = torch.arange(6.0, dtype=torch.float64).reshape(1, 3, 2)
    (found,) = scheme.step((h,), Branch(torch.zeros_like), lambda x: x)
    torch.testing.assert_close(found, h[:, [1, 2, 0]], rtol=1e-12, atol=1e-12)


def test_mhc_starts_as_the_paper():
    scheme = schemes()["mhc"](inner(index=6), init="paper")
    read, write, mix = scheme.shift.split([4, 4, 16])
    assert read.tolist() == [-3, -3, 3, -3]
    assert write.tolist() == [0] * 4
    assert torch.equal(mix.reshape(4, 4), 6 * torch.eye(4) - 3)
    assert not scheme.weight.any()
    assert scheme.scale.tolist() == pytest.approx([0.01] * 3)
    assert scheme.weight.shape == (4 * 8, 4 + 4 + 16)
    assert schemes()["mhc"](place(opens=True, closes=False)).weight.shape == (4 * 8, 4 + 4)
    mixed = sinkhorn(mix.reshape(4, 4), 20)
    assert mixed.diagonal().tolist() == pytest.approx([math.e**6 / (math.e**6 + 3)] * 4)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_mhc_preserves_with_streams_that_differ(n):
    """Reads sum to 1, writes have the mean 1 and differ by stream."""
    scheme = schemes()["mhc"](inner(), num_streams=n).double()
    h = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, n, 8)
    (found,) = scheme.step((h,), Branch(lambda x: (torch.testing.assert_close(x, h[:, 0]), x)[1]), lambda x: x)
    torch.testing.assert_close(found.mean(-2), 2 * h[:, 0], rtol=1e-14, atol=1e-14)
    assert not torch.allclose(found[:, 0], found[:, 1])


@pytest.mark.parametrize("init", ["preserve", "paper"])
@pytest.mark.parametrize("family", ["gpt2", "modernbert"])
def test_every_parameter_of_mhc_learns_and_not_by_rounding(family, init):
    """With equal streams the mixing has no gradient for ever; that of the first and last site never has one."""
    model = tiny_host(family, AutoModelForSequenceClassification, layers=3)
    resformer.patch(model, "mhc", init=init).train()
    ours = {n: p for n, p in model.named_parameters() if ".resformer." in n}
    largest: dict[str, float] = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        model(**batch(labels=True, seed=step)).loss.backward()
        for n, p in ours.items():
            for number, part in enumerate(p.grad.split(_sizes(p), -1)):
                key = f"{n}[{number}]"
                largest[key] = max(largest.get(key, 0.0), float(part.abs().max()))
        optimizer.step()
        optimizer.zero_grad()
    assert len(largest) == 3 * (2 * 2 + 4 * 3)
    assert {key: value for key, value in largest.items() if value < 1e-9} == {}


def _sizes(p: torch.Tensor) -> list[int]:
    """Read, write and mixing parts of a parameter of mhc with four streams."""
    return {8: [4, 4], 24: [4, 4, 16], 2: [1, 1], 3: [1, 1, 1]}[p.shape[-1]]


# ------------------------------------------------------------------------------------------------ hyper-connections


@pytest.mark.parametrize("family", THREE)
def test_output_projections_of_hyper_connections_are_scaled(family):
    """Zhu et al. 2024, section 4: the streams are summed at the end; o and down keep the standard deviation."""
    host, model = tiny_host(family), resformer.patch(tiny_host(family), "hyper_connections", init="paper")
    points = {site.name: site.points for site in families()[family].stacks[0].sites}
    ends = (points["attn"]["o"].path, points["ffn"]["down"].path)
    own = model.state_dict()
    for name, value in host.state_dict().items():
        scaled = name.endswith(tuple(f"{end}.weight" for end in ends))
        torch.testing.assert_close(own[name], value / 2 if scaled else value, rtol=1e-12, atol=0)
    kept = resformer.patch(tiny_host(family), "hyper_connections").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in host.state_dict().items())


# ------------------------------------------------------------------------------------------------ frac-connections


def test_frac_connections_start_as_the_residual_and_mix_fractions():
    for init in ("paper", "preserve"):
        scheme = schemes()["frac_connections"](place(), init=init, dynamic=True)
        assert torch.equal(scheme.read_mix, torch.eye(4))
        assert torch.equal(scheme.mix, torch.eye(4))
        assert scheme.write_mix.tolist() == [1] * 4
        assert not scheme.mix_weight.any()
        assert not scheme.write_weight.any()
        assert scheme.mix_scale.item() == scheme.write_scale.item() == pytest.approx(0.01)
    scheme = schemes()["frac_connections"](place(width=4), num_fractions=2)
    with torch.no_grad():
        scheme.mix[0, 1] = 5.0  # fraction 1 takes 5 times fraction 0, and not the other way
        scheme.read_mix[0, 1] = 7.0
    seen = []
    found = scheme.step(
        torch.tensor([[1.0, 2, 10, 20]]), Branch(lambda x: seen.append(x) or torch.zeros_like(x)), lambda x: x
    )
    assert found.tolist() == [[1, 2, 15, 30]]
    assert seen[0].tolist() == [[1, 2, 17, 34]]


# ------------------------------------------------------------------------------------------------ reversible


@pytest.mark.parametrize(("depth", "layer_size"), [(6, 2), (5, 1), (6, 3)])
def test_reversible_gives_its_input_back(depth, layer_size):
    torch.manual_seed(0)
    sublayers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)]
    stack = ResidualStack(sublayers, 8, "reversible", layer_size=layer_size).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    other = x + torch.randn(2, 3, 8, dtype=torch.float64)  # two streams that differ
    branches = [Branch(lambda v, f=f, n=n: f(n["pre"](v))) for f, n in zip(stack.sublayers, stack.norms, strict=True)]
    s = (x, other)
    for scheme, branch in zip(stack.schemes, branches, strict=True):
        s = scheme.step(s, branch, lambda v: v)
    assert not torch.allclose(s[0], x)
    for scheme, branch in zip(reversed(stack.schemes), reversed(branches), strict=True):
        s = scheme.invert(s, branch)
    for found, expected in zip(s, (x, other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_reversible_writes_the_streams_in_turn():
    scheme = schemes()["reversible"](place())
    x = torch.ones(1, 8)
    s = scheme.start(x)
    s = scheme.step(s, Branch(lambda v: 10 * v), lambda v: v)  # attention: y_1 = x_1 + F(x_2)
    assert torch.equal(scheme.finish(s, lambda v: v), (11 * x + x) / 2)
    s = scheme.step(s, Branch(lambda v: 100 * v), lambda v: v)  # feed-forward: y_2 = x_2 + G(y_1)
    assert torch.equal(scheme.finish(s, lambda v: v), (11 * x + 1101 * x) / 2)


@pytest.mark.parametrize("family", THREE)
def test_reversible_keeps_no_host(family):
    with pytest.raises(ValueError, match="init='paper'"):
        patched(family, "reversible", "preserve")
