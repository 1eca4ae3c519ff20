"""What a study will take: counted and timed, with nothing written."""

import pytest
from rich.console import Console
from study_folders import ended, study, write_study

from resformer.study.forecast import forecast, power
from resformer.study.plan import arm
from resformer.study.settings import Settings


def small(**changes):
    settings = Settings(width=8, heads=2, steps=4, batch_size=2, max_length=16, train_size=40)
    return study(("pre_ln", "rezero"), (1, 2, 3), 2, settings=settings, **changes)


def test_runs_are_counted_and_timed(tmp_path):
    said = []
    found = forecast(small(learning_rates=(1e-3, 3e-3)), tmp_path / "out", workers=2, say=said.append)
    assert [(stage.name, stage.planned, stage.there) for stage in found.stages] == [
        ("learning rates", 12, 0),
        ("reported", 12, 0),
    ]
    assert len(said) == 4, "two schemes at the least and at the greatest depth"
    assert all(stage.seconds > 0 for stage in found.stages)
    for scheme in ("pre_ln", "rezero"):
        low, middle, high = (found.seconds[scheme, depth] for depth in (1, 2, 3))
        assert middle == pytest.approx((low + high) / 2)
    assert not (tmp_path / "out").exists()
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    printed = console.export_text()
    assert "6 cells" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "2 seeds no difference is tested" in " ".join(printed.split())


def test_what_is_there_is_not_run_again_and_tells_the_time(tmp_path):
    one = small(learning_rates=(1e-3,))
    first = one.runs({})[:6]  # of the first seed

    def outcome(run):
        return ended(run, 0.7) | {"cost": {"seconds": 1000.0 * run.condition.depth}} if run in first else None

    found = forecast(one, write_study(tmp_path / "out", one, outcome=outcome), workers=1)
    (stage,) = found.stages
    assert (stage.planned, stage.there, stage.perhaps) == (12, 6, 0)
    besides = stage.seconds - 2 * 1000 * (1 + 2 + 3)  # data, building, diagnostics, evaluation of six runs
    assert 0 < besides < 1000
    assert found.seconds["rezero", 3] > 3000.0


def test_runs_at_a_rate_that_may_be_chosen_are_counted_apart(tmp_path):
    before, grown = (small(learning_rates=rates) for rates in ((1e-3, 3e-3), (1e-3, 3e-3, 1e-2)))
    output = write_study(tmp_path / "out", before, outcome=lambda run: ended(run, 0.7))
    tuning, reported = forecast(grown, output, workers=1).stages
    assert (tuning.planned, tuning.there, tuning.perhaps) == (18, 12, 0)
    assert (reported.planned, reported.there, reported.perhaps) == (12, 0, 12)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(forecast(grown, output, workers=1))
    printed = " ".join(console.export_text().split())
    assert "reported 12 0 to 12 0 to 12" in printed
    assert "At most about" in printed


def test_a_piece_is_foretold_for_itself(tmp_path):
    one = small(learning_rates=(1e-3, 3e-3))
    output = write_study(tmp_path / "out", one, outcome=lambda run: ended(run, 0.7))
    found = [forecast(one, output, workers=1, shard=(i, 4)) for i in range(4)]
    assert [[stage.planned for stage in piece.stages] for piece in found] == [[2, 2], [4, 4], [4, 4], [2, 2]]
    assert set(found[3].seconds) == {(arm(vars(condition)), condition.depth) for condition in one.piece(3, 4)}
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found[0])
    assert "Of piece 0 of 4, which has 1 of them:" in console.export_text()


@pytest.mark.parametrize("content", ["a file", "a folder"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path, content):
    output = tmp_path / "out"
    if content == "a folder":
        output.mkdir()
        (output / "thesis.tex").write_text("")
    else:
        output.write_text("")
    with pytest.raises(ValueError, match="choose a new or empty folder"):
        forecast(small(), output, workers=1)


def test_how_little_can_be_detected():
    """`detectable` of a standard deviation of 1, alone and at the first step of Holm."""
    one = study(("pre_ln", "rezero", "highway"), (1, 2, 3), 3, tasks=("sentiment", "agreement"))
    assert power(one) == (
        "3 pairs: a difference is detected (power 0.8) from 3.3 of its standard deviations on; with Holm over "
        "12 comparisons from 11."
    )
    assert power(study(("pre_ln", "rezero"), (1,), 10)).endswith("from 1 of its standard deviations on.")
