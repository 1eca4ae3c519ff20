"""The folder of a run: what is refused, deleted, or cannot be written there."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from training_fakes import tiny_data
from training_runs import assert_same, stopped, train, weights, whole_run

from resformer.train import sitting


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory)


def test_overwriting_leaves_what_is_not_of_the_run(tmp_path):
    train(tmp_path / "run", steps=2)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train(tmp_path / "run", steps=3, overwrite=True)["cost"]["steps"] == 3
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("last", range(5))
def test_a_deletion_that_is_cut_off_leaves_nothing_that_looks_finished(tmp_path, monkeypatch, whole, last):
    """What is left is of a run that is known, and may be gone on with."""
    output, deleted = tmp_path / "run", []
    shutil.copytree(whole, output)
    with monkeypatch.context() as patched:
        for where, name in ((shutil, "rmtree"), (Path, "unlink")):
            original = getattr(where, name)

            def cut(path, *args, original=original, **kwargs):
                if len(deleted) == last:
                    raise OSError(errno.EIO, "Input/output error")
                deleted.append(path.name)
                original(path, *args, **kwargs)

            patched.setattr(where, name, cut)
        with pytest.raises(OSError, match="Input/output error"):
            train(output, overwrite=True)
    assert not (last and (output / "result.json").exists()), deleted
    assert (output / "config.json").exists()
    if last:
        train(output)
        assert_same(output, whole)


def test_what_is_refused_deletes_nothing(tmp_path, monkeypatch, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for changes, message in (
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"scheme_lr_multiplier": 0.0}, "scheme_lr_multiplier is 0.0"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be a whole number below"),
        ({"resume": str(tmp_path / "step-000000001")}, "overwrite begins again, and resume="),
        ({"resume": "nonsense"}, "'nonsense' is no checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            train(whole, overwrite=True, **changes)
    monkeypatch.setattr("transformers.BertPreTrainedModel.supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no gradient checkpointing"):
        train(whole, overwrite=True, gradient_checkpointing=True)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_another_configuration_is_refused_with_what_differs(tmp_path, monkeypatch):
    output = tmp_path / "run"
    stopped(output, monkeypatch)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    message = r"(?s)another configuration:\n  learning_rate: 0.003 there, 0.001 here\nGive the same to go on"
    with pytest.raises(ValueError, match=message):
        train(output, learning_rate=1e-3)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert train(output, learning_rate=1e-3, overwrite=True)["status"] == "ok"


def test_changed_data_are_another_configuration(tmp_path, monkeypatch):
    stopped(tmp_path / "run", monkeypatch)
    with pytest.raises(ValueError, match=r"another configuration:\n  data_sha256: "):
        train(tmp_path / "run", data=tiny_data(seed=1))


@pytest.mark.parametrize("hidden", [False, True])
def test_on_a_full_disk_training_goes_on(tmp_path, monkeypatch, whole, hidden):
    """Also where torch tells of it as of an error of its own."""

    def full(found, file):
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if hidden:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1")  # noqa: B904
            raise

    output = tmp_path / "run"
    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="no checkpoint after step 3: No space left on device"):
        result = train(output)
    assert len(result["notes"]) == 6
    assert list((output / "checkpoints").iterdir()) == []
    assert_same(output, whole)


def test_a_log_that_cannot_be_written_is_noted(tmp_path, monkeypatch, whole):
    original = sitting.append

    def full(path, entries):
        if path.name == "evaluations.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, entries)

    monkeypatch.setattr(sitting, "append", full)
    with pytest.warns(UserWarning, match="nothing in evaluations.jsonl up to step 7: No space left on device"):
        result = train(tmp_path / "run")
    assert len(result["notes"]) == 3
    assert weights(tmp_path / "run") == weights(whole)
