"""Reading back what a study left on disk, whatever happened to it."""

import json
import os
import re
from dataclasses import asdict

import pytest

from resformer.files import write_json_atomically
from resformer.study.plan import Condition, Run, Study
from resformer.study.pretraining import PRETRAINING, Encoder, Pretraining
from resformer.study.results import HALVED, add_entries, finished, open_study, read_results, read_study, run_id
from resformer.study.settings import Settings

STUDY = Study(("plain", "pre_ln"), (2, 8), ("sentiment",), 1, (1e-3,), controls=False)
RUNS = STUDY.runs({})
OK = {"version": 1, "status": "ok", "score": 0.75, "train_loss": 0.5, "flags": ["x"], "metrics": {"accuracy": 0.75},
      "loss_curve": [[25, 0.6]], "diagnostics": {"token_cosine": 0.9}, "cost": {"seconds": 1.0},
      "provenance": {"torch": "2"}}  # fmt: skip


@pytest.fixture
def output(tmp_path):
    """A study of four runs, none of which has been carried out."""
    open_study(tmp_path / "out", STUDY, "resformer compare")
    for run in RUNS:
        directory(tmp_path / "out", run).mkdir(parents=True)
        write_json_atomically(directory(tmp_path / "out", run) / "config.json", run.config)
    return tmp_path / "out"


def directory(output, run: Run):
    return output / "runs" / run.id


def put(output, run: Run, **changes):
    path = directory(output, run) / "result.json"
    write_json_atomically(path, {**OK, "config": run.config, **changes})
    return path


def test_runs_are_read_finished_diverged_failed_and_unfinished(output):
    ok, diverged, failed, unfinished = RUNS
    put(output, ok)
    put(output, diverged, status="diverged", score=None)
    error = {"config": failed.config, "error": "ValueError: no", "traceback": "Traceback ..."}
    write_json_atomically(directory(output, failed) / "error.json", error)
    found = {result.directory.name: result for result in read_results(output)}
    assert {name: result.status for name, result in found.items()} == {
        ok.id: "ok", diverged.id: "diverged", failed.id: "failed", unfinished.id: "unfinished",
    }  # fmt: skip
    assert all(found[run.id].config == run.config for run in RUNS)
    assert [found[run.id].finished for run in RUNS] == [True, True, False, False]
    payload = {name: getattr(found[ok.id], name) for name in OK if name != "version"}
    assert payload == {name: value for name, value in OK.items() if name != "version"}
    assert found[diverged.id].score is None
    assert (found[failed.id].error, found[failed.id].traceback) == ("ValueError: no", "Traceback ...")
    assert all(result.problem is None for result in found.values())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[]", "no JSON object"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "has version 2, this resformer reads 1"),
        (lambda text: text.replace('"ok"', '"fine"'), "has status 'fine'"),
        (lambda text: text.replace("0.75", "NaN"), "NaN is no JSON"),
        (lambda text: text.replace('"score": 0.75', '"score": null'), "has score None"),
        (lambda text: text.replace('"config"', '"konfig"'), "has no config"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "is of another run, "),
        (lambda text: text.replace('"depth": 8', '"depth": "deep"'), "is of another run, "),
        (lambda text: text.replace('"batch_size": 32', '"batch_size": -1'), "is of no run that this resformer knows"),
        (lambda text: re.sub(r'"flags": \[.*?\]', '"flags": "x"', text, flags=re.DOTALL), "has no flags"),
        (lambda text: b"\xff\xfe".decode("latin-1"), "cannot be read"),
    ],
)
def test_a_damaged_result_is_reported_and_never_counted(output, damage, says):
    run = RUNS[0]
    path = put(output, run)
    assert finished(path.parent)
    path.write_text(damage(path.read_text()), encoding="latin-1")
    assert not finished(path.parent)
    (result,) = [result for result in read_results(output) if result.directory == path.parent]
    assert (result.status, result.score, result.config) == ("unfinished", None, run.config)
    assert says in result.problem


def test_a_folder_without_a_configuration_is_left_out_with_a_warning(output):
    (output / "runs" / "stray").mkdir()
    (output / "runs" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="run stray: no readable config.json, left out"):
        assert len(read_results(output)) == 4


def test_a_result_speaks_for_itself_where_the_configuration_is_lost(output):
    run = RUNS[0]
    (put(output, run).parent / "config.json").write_text("{")
    assert [result.config for result in read_results(output) if result.finished] == [run.config]


@pytest.mark.parametrize(
    "run",
    [
        Run(Condition("plain", 2, "rte", "bert", 7), 3, 1e-3, True, "0" * 64, settings=Settings(width=32, epochs=2)),
        Run(Condition("plain", 2, "rte"), 3, 1e-3, settings=Settings(steps=9)),
        Run(Condition("plain", 2, "rte"), 3, 1e-3, encoder="0" * 12),
        Encoder(Condition("plain", 2, PRETRAINING, "bert", 5), 1, "0" * 64, Pretraining(("text",), steps=9)),
        Run(Condition("plain", 12, "rte"), 0, 1e-5, False, "0" * 64, "1" * 64, settings=Settings(model="folder")),
    ],
)
def test_a_configuration_tells_its_run_whatever_is_added(run):
    config = json.loads(
        json.dumps({"steps": 1234, **run.config, "data": "elsewhere", "device": "this", "data_sha256": "f" * 64})
    )
    assert run_id(config) == run.id
    assert run_id({**config, "seed": 9}) not in (run.id, None)
    assert run_id({key: value for key, value in config.items() if key != "scheme"}) is None


def test_a_batch_that_memory_did_not_hold_is_flagged(output):
    put(output, RUNS[0], settings={"micro_batch_size": 8})
    put(output, RUNS[1], settings={"micro_batch_size": None})
    one, other = sorted((r for r in read_results(output) if r.finished), key=lambda r: r.micro_batch_size is None)
    assert (one.micro_batch_size, one.flags) == (8, ["x", HALVED])
    assert (other.micro_batch_size, other.flags) == (None, ["x"])


def test_entries_are_united_in_the_order_they_were_started(tmp_path):
    entry = {"study": json.loads(json.dumps(asdict(STUDY))), "command": "compare", "provenance": {}}
    for command, started in (("b", "2026-02"), ("a", "2026-01"), ("b", "2026-03")):
        add_entries(tmp_path, [{**entry, "command": command, "started": started}])
    assert [(e["command"], e["started"]) for e in read_study(tmp_path)] == [("a", "2026-01"), ("b", "2026-02")]


def test_a_folder_accumulates_studies_and_their_commands(output):
    open_study(output, STUDY, "resformer compare")  # the same again: a continuation
    open_study(output, Study(("plain",), (32,), ("sentiment",), 1, (1e-3,)), "resformer compare --depths 32")
    entries = read_study(output)
    assert [entry["command"] for entry in entries] == ["resformer compare", "resformer compare --depths 32"]
    assert [entry["study"]["depths"] for entry in entries] == [[2, 8], [32]]
    assert entries[0]["study"]["settings"]["width"] == 128
    assert entries[0]["provenance"]["python"]
    assert entries[0]["started"].endswith("Z")


def test_a_folder_that_holds_something_else_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ValueError, match=r"holds no study \(no study.json\); choose a new or empty folder"):
        open_study(tmp_path, STUDY)
    with pytest.raises(ValueError, match="is a file; choose a new or empty folder"):
        open_study(tmp_path / "thesis.tex", STUDY)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("name", "says"), [("nowhere", "does not exist"), ("mine", "holds no study"), ("mine/thesis.tex", "is no folder")]
)
def test_who_only_reads_is_told_what_to_read(tmp_path, name, says):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("important")
    with pytest.raises(ValueError, match=f"{says}.*; give the folder of a study") as caught:
        read_results(tmp_path / name)
    assert "choose" not in str(caught.value)


@pytest.mark.parametrize("content", ["", '{"version": 9, "studies": []}', '{"version": 1}'])
def test_a_study_json_that_is_damaged_or_newer_is_not_written_over(output, content):
    (output / "study.json").write_text(content)
    for use in (read_results, lambda path: open_study(path, STUDY)):
        with pytest.raises(ValueError, match=r"study\.json"):
            use(output)
    assert (output / "study.json").read_text() == content


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json_atomically(path, {"a": 1})
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json_atomically(path, bad)
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]
