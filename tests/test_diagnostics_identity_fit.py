"""Learning the identity: where the error is known beforehand, and what growing does to it."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import resformer
from resformer.diagnostics.identity_fit import grown_against_fresh, identity_fit


def test_a_closed_residual_is_the_identity_already():
    found = identity_fit("rezero", 3, steps=2, seeds=[0, 1])
    assert [row[0] for row in found.errors] == [0.0, 0.0]


def test_the_error_of_one_block_at_the_start():
    """E|W_2 ReLU(W_1 x) - x|² / E|x|²: 1 for the target and 2 D/(D + 2D) · 2D · 2/(D + 2D) / 2 for the block."""
    found = identity_fit("plain", 1, width=64, steps=1, seeds=range(4))
    block = (2 / 192) * 64 * (2 / 192) * 128 / 2
    assert sum(row[0] for row in found.errors) / 4 == pytest.approx(1 + block, rel=0.05)


def test_residual_blocks_learn_it_and_plain_ones_do_not():
    plain, residual = (identity_fit(name, 4, steps=150, seeds=[0, 1]) for name in ("plain", "depth_scaled"))
    assert max(residual.final()) < 0.15 < 0.5 < min(plain.final())
    assert residual.errors == identity_fit("depth_scaled", 4, steps=150, seeds=[0, 1]).errors


def test_bad_input():
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        identity_fit("plain", 1, steps=0)
    with pytest.raises(ValueError, match="at least one seed"):
        identity_fit("plain", 1, seeds=[])
    with pytest.raises(ValueError, match="unknown scheme 'plan'"):
        identity_fit("plan", 1)


def test_growing_starts_where_the_shallow_net_ended():
    def build(layers):
        torch.manual_seed(0)
        return resformer.build_encoder(
            layers, 8, "pre_ln", vocab_size=10, heads=2, dropout=0.0, auto=AutoModelForSequenceClassification
        )

    def batches(step):
        words = torch.randint(10, (4, 5), generator=torch.Generator().manual_seed(step))
        return {"input_ids": words, "labels": words[:, 0] % 2}

    found = grown_against_fresh(build, batches, shallow=1, deep=3, steps=(3, 2))
    assert found.jump == 0.0
    assert [len(one) for one in (found.shallow, found.grown, found.fresh)] == [3, 2, 5]
    with pytest.raises(ValueError, match="depth must be a whole number of more than"):
        grown_against_fresh(build, batches, shallow=2, deep=2, steps=(1, 1))
