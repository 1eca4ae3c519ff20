"""What the gates of resformer/schemes/gated.py start from, and the traps that a loop over tokens does not show."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import resformer
from resformer import ResidualStack, families, schemes
from resformer.schemes import Place
from resformer.schemes.base import Branch
from resformer.testing.hosts import attentions, batch, randomize, tiny_host

ENCODERS = [name for name, family in families().items() if [stack.name for stack in family.stacks] == ["encoder"]]


def make(name: str, init: str = "paper", width: int = 64, **options):
    torch.manual_seed(0)
    return schemes()[name](Place("ffn", 1, 8, 0, 4, width), init=init, **options)


# ------------------------------------------------------------------------------------------------ initial values


def test_gru_gate_starts_nearly_closed():
    scheme = make("gru_gate")
    assert scheme.shift.tolist() == [2.0] * 64
    assert make("gru_gate", bias=0.5).shift.tolist() == [0.5] * 64
    bound = math.sqrt(6 / (64 + 64))  # Xavier-uniform, each of the six by its own sizes
    for matrix in (*scheme.branch_weight, *scheme.stream_weight):
        assert 0.95 * bound < matrix.abs().max() <= bound
    matrices = torch.stack([*scheme.branch_weight, *scheme.stream_weight])
    assert len({tuple(m.flatten().tolist()) for m in matrices}) == 6, "each drawn anew"
    x = torch.randn(1000, 64)
    moved = scheme.write(x, torch.zeros_like(x), nn.Identity()) - x
    assert moved.norm() < 0.35 * x.norm(), "σ(-2) = 0.12 of the stream is replaced"


def test_gru_gate_keeps_no_host():
    for family in ("bert", "gpt2"):
        with pytest.raises(ValueError, match=r"'gru_gate' cannot keep .* any host.*init='paper'"):
            resformer.patch(tiny_host(family), "gru_gate")


def test_sparse_gate_opens_all_or_half():
    kept = make("sparse_gate", "preserve")
    assert not kept.gate.weight.any()
    assert kept.gate.shift.tolist() == [1.0] * 64
    x = torch.randn(500, 64)
    for threshold in (0.01, 0.2, 0.5, 0.8, 0.99):
        assert (make("sparse_gate", "preserve", threshold=threshold).gate(x) > threshold).all()
        open_gates = (make("sparse_gate", threshold=threshold).gate(x) > threshold).float().mean()
        assert 0.45 < open_gates < 0.55


@pytest.mark.parametrize("init", ["paper", "preserve"])
def test_sparse_gate_learns_by_the_straight_through_gradient(init):
    """Forward a step, which is flat; backward the slope of σ(W x + b), for open and for closed gates."""
    scheme = make("sparse_gate", init, width=3).double()
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    out = scheme.write(x, y, nn.Identity())
    p = scheme.gate(x).detach()
    m = (p > 0.5).double()
    assert torch.equal(out, x + m * y if init == "preserve" else torch.where(p > 0.5, y, x)), "m is 0 or 1, exactly"
    out.sum().backward()
    slope = p * (1 - p) * (y if init == "preserve" else y - x)
    torch.testing.assert_close(scheme.gate.shift.grad, slope.sum(0))
    torch.testing.assert_close(scheme.gate.weight.grad, slope.T @ x)
    assert scheme.gate.shift.grad.all()


def test_se_gate_starts_at_one_or_about_half():
    kept, paper = make("se_gate", "preserve"), make("se_gate")
    assert kept.squeeze.shape == (8, 64)
    assert make("se_gate", reduction=2).squeeze.shape == (32, 64)
    assert make("se_gate", width=768).squeeze.shape == (48, 768)
    assert not kept.excite.any()
    assert not kept.excite_shift.any()
    x, y = torch.randn(2, 3, 5, 64)
    out = kept.step(x, Branch(lambda _: y), nn.Identity())
    assert torch.equal(out, x + y)
    s = (paper.step(x, Branch(lambda _: y), nn.Identity()) - x) / y
    assert 0.2 < s.median() < 0.8
    assert "2 s ⊙ F" in kept.formula()
    assert "2 s" not in paper.formula()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gru_gate", {"bias": math.inf}),
        ("gru_gate", {"bias": None}),
        ("sparse_gate", {"threshold": 1.0}),
        ("sparse_gate", {"threshold": 0}),
        ("sparse_gate", {"threshold": "half"}),
        ("se_gate", {"reduction": 0}),
        ("se_gate", {"reduction": 16.0}),
    ],
)
def test_bad_options(name, options):
    (option, value), *_ = options.items()
    with pytest.raises(ValueError, match=rf"'{option}' must .*got {value!r}"):
        make(name, **options)


# ------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize(("family", "attention"), [(name, kind) for name in ENCODERS for kind in attentions(name)])
def test_padding_does_not_reach_the_text_of_se_gate(family, attention):
    """With other tokens as padding, with more of it, and with none: the mean sees the text alone."""
    model = resformer.patch(tiny_host(family, layers=3, attention=attention), "se_gate", init="paper")
    randomize(model)
    given = batch(padded=True)
    found = model(**given).last_hidden_state[1, :-2]
    torch.testing.assert_close(found, model(given["input_ids"][1:, :-2]).last_hidden_state[0], rtol=1e-9, atol=1e-9)
    other = {key: value.clone() for key, value in given.items()}
    other["input_ids"][1, -2:] = 7
    torch.testing.assert_close(model(**other).last_hidden_state[1, :-2], found, rtol=1e-9, atol=1e-9)
    if (family, attention) != ("modernbert", "eager"):  # which by itself makes NaN of padding far from the text
        more = {key: nn.functional.pad(value, (0, 2)) for key, value in given.items()}
        torch.testing.assert_close(model(**more).last_hidden_state[1, :-4], found, rtol=1e-9, atol=1e-9)
    unmasked = model(given["input_ids"][1:]).last_hidden_state[0, :-2]
    assert (unmasked - found).abs().max() > 1e-3, "the padding would matter"


@pytest.mark.parametrize("form", ["2-D", "boolean", "added", "one row"])
def test_masks_of_all_forms_name_the_text(form):
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 1 + [True] * 4])
    window = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1
    seen = real[:, None, None, :] & window
    lowest = torch.finfo(torch.float32).min
    mask = {
        "2-D": real.long(),
        "boolean": seen,
        "added": torch.zeros(seen.shape).masked_fill(~seen, lowest),
        "one row": torch.zeros(3, 1, 1, 5).masked_fill(~real[:, None, None], lowest),
    }[form]
    assert torch.equal(Branch(lambda x: x, mask).real(), real)
    assert Branch(lambda x: x).real() is None


def test_a_mask_that_does_not_name_the_padding_is_refused():
    with pytest.raises(ValueError, match=r"object does not tell.*sdpa"):
        Branch(lambda x: x, object()).real()


def test_a_text_of_padding_alone_is_finite():
    stack = ResidualStack([nn.Linear(8, 8)], 8, "se_gate")
    real = torch.tensor([[True, True], [False, False]])
    assert stack(torch.randn(2, 2, 8), real).isfinite().all()


def test_se_gate_in_half_precision_with_a_long_text():
    """The sum over the text would overflow; the mean does not."""
    scheme = make("se_gate", "preserve").half()
    y = torch.full((1, 4096, 64), 100.0, dtype=torch.float16)
    for mask in (None, torch.ones(1, 4096, dtype=torch.bool)):
        assert scheme.step(y, Branch(lambda _: y, mask), nn.Identity()).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 4, 5, 8)])
def test_se_gate_does_not_mix_examples(shape):
    stack = ResidualStack([nn.Linear(8, 8)], 8, "se_gate").double()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(stack(x)[:1], stack(x[:1]))


# ------------------------------------------------------------------------------------------------ decoders


@pytest.mark.parametrize(("family", "changes"), [("gpt2", {}), ("bert", {"is_decoder": True})])
def test_se_gate_is_refused_in_decoders(family, changes):
    model = tiny_host(family, AutoModelForCausalLM, **changes)
    keys = list(copy.deepcopy(model).state_dict())
    for init in ("preserve", "paper"):
        with pytest.raises(
            ValueError, match=r"serves encoder stacks, and this is a decoder; `resformer schemes se_gate` says why"
        ):
            resformer.patch(model, "se_gate", init=init)
    assert list(model.state_dict()) == keys
