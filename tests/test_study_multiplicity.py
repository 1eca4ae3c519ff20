"""Adjusted p-values against cases computed by hand."""

from collections.abc import Callable

import numpy as np
import pytest

from resformer.study.multiplicity import benjamini_hochberg, holm


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 is 0.02, 0.03, 0.06, 0.04; the last may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_benjamini_hochberg_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4/1, 4/2, 4/3, 4/4 is 0.02, 0.02, 0.04, 0.04.
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])


def test_a_test_that_was_not_made_counts_in_the_family() -> None:
    assert holm([0.01, None, None]) == [pytest.approx(0.03), None, None]
    assert benjamini_hochberg([None, 0.01, None]) == [None, pytest.approx(0.03), None]


def test_holm_keeps_the_chance_of_any_false_finding() -> None:
    families = np.random.default_rng(0).uniform(size=(4000, 8))
    any_found = sum(min(p for p in holm(list(family)) if p is not None) < 0.05 for family in families)
    assert any_found / len(families) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_families_at_their_limits(adjust: Callable[..., list[float | None]]) -> None:
    assert adjust([]) == []
    assert adjust([None]) == [None]
    assert adjust([0.02]) == [0.02]
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="allowed are 0 to 1"):
            adjust([0.5, wrong])
