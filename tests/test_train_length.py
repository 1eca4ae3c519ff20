"""When a run ends: by its steps, by the clock, by patience."""

import pytest
from training_runs import log, stopped, train

from resformer.train import sitting


@pytest.fixture
def clock(monkeypatch):
    """Each step takes a second, and nothing else takes time."""
    now = [0.0]
    original = sitting.windows

    def windows(*args, on_step, **kwargs):
        def ticking(step):
            on_step(step)
            now[0] += 1.0

        return original(*args, on_step=ticking, **kwargs)

    monkeypatch.setattr(sitting, "windows", windows)
    monkeypatch.setattr(sitting.time, "perf_counter", lambda: now[0])


def test_patience(tmp_path):
    result = train(tmp_path / "run", steps=100, learning_rate=1e-9, evaluate_every=2, patience=3, save_every=None)
    assert result["cost"]["steps"] == 8  # the first evaluation is the best, and three are not better
    assert result["best"]["step"] == 2

    def is_over(*scores, patience=2):
        return sitting._patience_is_over([{"score": score} for score in scores], patience)

    assert is_over(0.9, 0.5, 0.6, 0.5), "better than the one before is not better than the best"
    assert not is_over(0.5, 0.9, 0.6)
    assert not is_over(0.9, 0.5)
    assert not is_over(0.9, 0.5, 0.6, 0.5, patience=None)
    with pytest.raises(ValueError, match="give evaluate_every as well"):
        train(tmp_path / "other", patience=3, evaluate_every=None)


def test_the_seconds_are_those_of_all_sittings(tmp_path, monkeypatch, clock):
    """Of a run of so many steps, and of one that they end."""
    for name, changes in (("steps", {}), ("seconds", {"steps": None, "seconds": 20.0})):
        assert stopped(tmp_path / name, monkeypatch, after=8, **changes)["cost"]["seconds"] == 8.0
        cost = train(tmp_path / name, **changes)["cost"]
        assert (cost["seconds"], cost["steps"]) == (20.0, 20)


def test_a_run_by_the_clock(tmp_path, clock):
    """The schedule follows the time, between looks by the pace until then: as a run of so many steps would."""
    changes = {"save_every": None, "evaluate_every": None, "warmup": 0.0}
    result = train(tmp_path / "run", steps=None, seconds=60.0, **changes)
    assert (result["cost"]["seconds"], result["cost"]["steps"]) == (60.0, 60)
    train(tmp_path / "counted", steps=60, **changes)
    rates, counted = ([line["learning_rate"] for line in log(tmp_path / name)] for name in ("run", "counted"))
    assert rates == pytest.approx(counted, abs=1e-6), "a run of ten thousand small steps"


def test_looks_are_seldom_and_no_further_apart_than_patience(tmp_path, monkeypatch, clock):
    """Every 25 steps, and by the pace of ten slow ones; the first ones are nearer, since the pace is not yet known."""
    looks = []
    take = sitting.Sitting.take
    monkeypatch.setattr(
        sitting.Sitting, "take", lambda self, window: (looks.append(window[-1].step), take(self, window))[1]
    )
    changes = {"steps": 60, "save_every": None, "evaluate_every": None}
    train(tmp_path / "slow", **changes)
    assert looks == [1, 2, 4, 8, 16, 25, 35, 45, 50, 60]
    looks.clear()
    monkeypatch.setattr(sitting, "PATIENCE", 1000.0)
    train(tmp_path / "quick", **changes)
    assert looks == [1, 2, 4, 8, 16, 25, 50, 60]
