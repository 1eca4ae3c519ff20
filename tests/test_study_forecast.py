"""What a study will take: counted and timed, with nothing written."""

import pytest
from rich.console import Console
from study_folders import ended, put, study

from resformer.study.forecast import forecast
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


def test_what_is_there_is_not_run_again_and_tells_the_time(tmp_path):
    one = small(learning_rates=(1e-3,))
    for run in one.runs({})[:6]:  # of the first seed
        put(tmp_path, run, ended(run, 0.7) | {"cost": {"seconds": 10.0 * run.condition.depth}})
    found = forecast(one, tmp_path, workers=1)
    (stage,) = found.stages
    assert (stage.planned, stage.there, stage.seconds) == (12, 6, pytest.approx(2 * (10 + 20 + 30)))
    assert found.seconds["rezero", 3] == 30.0
