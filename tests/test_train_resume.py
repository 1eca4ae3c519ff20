"""A run that is interrupted goes on as if it had not been: killed, stopped, from a cut file, from an earlier step."""

import os
import signal

import pytest
import torch
from training_runs import assert_same, log, stopped, train, whole_run

from resformer.train import checkpoints, sitting
from resformer.train.folder import go_on_from


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory)


@pytest.mark.parametrize("at", ["before the rename", "in the file", "between"])
def test_killed_at_any_moment_it_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, whole, at):
    """Without a word of goodbye, in a child, in the middle of an epoch."""
    output = tmp_path / "run"
    child = os.fork()
    if child == 0:
        seen = [0]
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)

        def third(then, number=3):
            def called(*args, **kwargs):
                seen[0] += 1
                if seen[0] == number:
                    then(*args)
                return original(*args, **kwargs)

            return called

        if at == "before the rename":
            original = checkpoints.write_json_atomically
            checkpoints.write_json_atomically = third(lambda *args: die())
        elif at == "in the file":
            original = torch.save
            torch.save = third(lambda found, file: (file.write(b"half"), file.flush(), die()))
        else:
            original = sitting.append
            sitting.append = third(lambda *args: die(), number=6)  # after steps 1, 2, 3, 4, 6, and before 7 is written
        try:
            train(output)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (output / "result.json").exists()
    begun = checkpoints.newest(output / "checkpoints")[0]
    assert begun is not None
    assert 0 < checkpoints.step_of(begun) < 20
    result = train(output)
    assert result["notes"] == []
    assert_same(output, whole)
    assert len(list((output / "checkpoints").iterdir())) == 2, "older ones, and what was half written, are gone"


def test_interrupted_after_its_last_step_it_is_evaluated_once(tmp_path, monkeypatch):
    changes = {"steps": 6, "save_every": 3, "evaluate_every": 3}
    with monkeypatch.context() as patched:
        patched.setattr("resformer.train.finetune.finish", lambda *args, **kwargs: None)
        train(tmp_path / "run", **changes)
    train(tmp_path / "run", **changes)
    train(tmp_path / "whole", **changes)
    assert [line["step"] for line in log(tmp_path / "run", "evaluations.jsonl")] == [3, 6]
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_asked_to_stop_it_saves_and_goes_on(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    handler = signal.getsignal(signal.SIGTERM)
    result = stopped(output, monkeypatch)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert result["status"] == "stopped"
    assert result["score"] is None
    assert not (output / "result.json").exists()
    assert [line["step"] for line in log(output)] == list(range(1, 9))
    assert checkpoints.newest(output / "checkpoints")[0].name == "step-000000008"
    train(output)
    assert_same(output, whole)


def test_asked_to_stop_at_its_last_step_it_is_finished(tmp_path, monkeypatch, whole):
    assert stopped(tmp_path / "run", monkeypatch, after=20)["status"] == "ok"
    assert_same(tmp_path / "run", whole)


def test_a_cut_checkpoint_is_passed_over_with_a_word(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    stopped(output, monkeypatch)
    file = output / "checkpoints" / "step-000000008" / "training.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"passed over the checkpoint .*step-000000008: training.pt has .* bytes"):
        result = train(output)
    assert "step-000000008" in result["notes"][0]
    assert_same(output, whole)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"bytes": "many"}'])
def test_a_damaged_marker_is_as_none(tmp_path, monkeypatch, content):
    stopped(tmp_path / "run", monkeypatch)
    (tmp_path / "run" / "checkpoints" / "step-000000008" / "COMPLETE").write_text(content)
    found, broken = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert found.name == "step-000000006"
    assert "not written to its end" in broken[0]


def test_a_named_checkpoint_is_gone_on_from_or_refused(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    stopped(output, monkeypatch)
    chosen = output / "checkpoints" / "step-000000006"
    file = chosen / "training.pt"
    content = file.read_bytes()
    file.write_bytes(content[:100])
    for folder in (output, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"step-000000006' cannot be used: training.pt has 100 bytes"):
            train(folder, resume=str(chosen))
    assert not (tmp_path / "new").exists()
    file.write_bytes(content)
    train(output, resume=str(chosen))
    assert_same(output, whole)
    with pytest.raises(ValueError, match="is no checkpoint; their folders are called"):
        train(tmp_path / "other", resume=str(output))
    with pytest.raises(ValueError, match="no such folder"):
        train(tmp_path / "other", resume=str(output / "checkpoints" / "step-000000099"))


def test_a_checkpoint_elsewhere_brings_its_log_and_its_configuration(tmp_path, monkeypatch, whole):
    stopped(tmp_path / "run", monkeypatch)
    chosen = str(tmp_path / "run" / "checkpoints" / "step-000000008")
    with pytest.raises(ValueError, match=r"(?s)is of another configuration:\n  batch_size: 8 there, 4 here"):
        train(tmp_path / "other", resume=chosen, batch_size=4)
    assert not (tmp_path / "other").exists()
    train(tmp_path / "other", resume=chosen)
    assert_same(tmp_path / "other", whole)


def test_going_back_leaves_no_checkpoint_of_what_was_given_up(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    stopped(output, monkeypatch, after=17)
    stopped(output, monkeypatch, after=4, resume="never")
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000000003", "step-000000004"]
    train(output)
    assert_same(output, whole)


def test_going_back_cuts_the_looks_at_layers(tmp_path, monkeypatch):
    output = tmp_path / "run"
    stopped(output, monkeypatch, after=16, watch_every=4)
    assert [look["step"] for look in log(output, "layers.jsonl")] == [4, 8, 12, 16]
    train(output, watch_every=4, resume=str(output / "checkpoints" / "step-000000015"))
    assert [look["step"] for look in log(output, "layers.jsonl")] == [4, 8, 12, 16, 20]


def test_what_a_sitting_goes_on_from_stays(tmp_path):
    for step in (3, 6, 9):
        (tmp_path / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
    go_on_from(tmp_path, 6, {"train.jsonl": [{"step": 6}]})
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]
    assert log(tmp_path) == [{"step": 6}]


def test_a_run_that_was_over_by_patience_is_over_when_it_goes_on(tmp_path, monkeypatch):
    changes = {"steps": 100, "learning_rate": 1e-9, "evaluate_every": 2, "patience": 3, "save_every": 4}
    with monkeypatch.context() as patched:
        patched.setattr("resformer.train.finetune.finish", lambda *args, **kwargs: None)
        train(tmp_path / "run", **changes)
    assert train(tmp_path / "run", **changes)["cost"]["steps"] == 8
    assert len(log(tmp_path / "run")) == 8


@pytest.mark.parametrize("scheme", ["pro_res:warmup=7", "admin"])
def test_a_scheme_that_follows_the_steps_goes_on_with_them(tmp_path, monkeypatch, scheme):
    whole = train(tmp_path / "whole", scheme=scheme, dropout=0.1)
    stopped(tmp_path / "run", monkeypatch, after=11, scheme=scheme)
    train(tmp_path / "run", scheme=scheme)
    assert whole["status"] == "ok"
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_never_starts_from_the_beginning(tmp_path, monkeypatch, whole):
    output = tmp_path / "run"
    stopped(output, monkeypatch)
    train(output, resume="never")
    assert_same(output, whole)
