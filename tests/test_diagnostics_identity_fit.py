"""Learning the identity: where the error is known beforehand, and what growing does to it."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import resformer
from resformer.diagnostics.growing import growing, grown_against_fresh
from resformer.diagnostics.identity_fit import final, identity_errors, identity_fit


def test_a_closed_residual_is_the_identity_already():
    assert [row[0] for row in identity_errors("rezero", 3, steps=2, seeds=[0, 1])] == [0.0, 0.0]


def test_the_error_of_one_block_at_the_start():
    """E|W_2 ReLU(W_1 x) - x|² / E|x|²: 1 for the target and 2 D/(D + 2D) · 2D · 2/(D + 2D) / 2 for the block."""
    found = identity_errors("plain", 1, width=64, steps=1, seeds=range(4))
    block = (2 / 192) * 64 * (2 / 192) * 128 / 2
    assert sum(row[0] for row in found) / 4 == pytest.approx(1 + block, rel=0.05)


def test_residual_blocks_learn_it_and_plain_ones_do_not():
    measured = identity_fit(("plain", "depth_scaled"), (4,), steps=150, seeds=[0, 1])
    # over 10 seeds 0.043 ± 0.003 and 0.637 ± 0.021
    assert measured.facts["final, depth_scaled, L=4"] < 0.06 < 0.55 < measured.facts["final, plain, L=4"]
    errors = identity_errors("depth_scaled", 4, steps=150, seeds=[0, 1])
    rows = [row for row in measured.rows if row["scheme"] == "depth_scaled"]
    assert [row["step"] for row in rows] == [10, 30, 50, 70, 90, 110, 130, 150]
    assert rows[0]["error"] == pytest.approx(sum(sum(row[:10]) for row in errors) / 20)
    assert rows[-1]["error"] == pytest.approx(sum(map(final, errors)) / 2) == measured.facts["final, depth_scaled, L=4"]
    assert measured.plot().endswith("</svg>\n")


def test_bad_input():
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        identity_fit(steps=0)
    with pytest.raises(ValueError, match="at least one seed"):
        identity_fit(seeds=[])
    with pytest.raises(ValueError, match="at least one scheme"):
        identity_fit([])
    with pytest.raises(ValueError, match="unknown scheme 'plan'"):
        identity_fit(["plan"])
    with pytest.raises(ValueError, match="at least one seed"):
        growing(seeds=[])


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


def test_growing_as_a_table():
    before = torch.get_rng_state()
    measured = growing(shallow=1, deep=2, steps=(2, 1), seeds=[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert measured.column("net") == ["grown"] * 3 + ["fresh"] * 3
    assert measured.column("step") == [0, 1, 2] * 2
    assert measured.facts["jump"] == 0.0
    assert measured.facts["fresh"] == pytest.approx(sum(row["loss"] for row in measured.rows[3:]) / 3)
