"""The folder of a study as a user sees and mends it: its status, and folders merged."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from test_study_execute import ONE_RATE, RATES, TUNED, behave, content, directory, fake, go, reported, result

from resformer.cli import main
from resformer.files import write_json_atomically
from resformer.study.merge import merge
from resformer.study.plan import Run, Study
from resformer.study.pretraining import Pretraining
from resformer.study.results import open_study, read_result, read_results, read_study
from resformer.study.status import status
from resformer.study.worker import attempt

LONG = replace(TUNED, schemes=("plain", "pre_ln", "exclusive_gate:bias=-1.5,placement=pre"), depths=(2, 8))


def put(output, run: Run, **changes) -> None:
    """The result of a run, without training."""
    directory(output, run).mkdir(parents=True, exist_ok=True)
    write_json_atomically(directory(output, run) / "result.json", {**result(run), **changes})


def filled(output, study: Study, runs: int | None = None):
    """A folder with the tuning of a study, and so many of its runs."""
    open_study(output, study, "resformer compare")
    for condition in study.conditions():
        for run in study.tuning(condition):
            put(output, run)
    for run in reported(study, output)[:runs]:
        put(output, run)
    return output


def lines(output, capsys) -> list[str]:
    Console(width=80).print(status(output))
    return capsys.readouterr().out.splitlines()


def test_status_counts_cell_by_cell_within_80_columns(tmp_path, capsys):
    output = filled(tmp_path / "out", LONG, runs=7)
    runs = reported(LONG, output)
    error = {"config": runs[7].config, "error": "ValueError: no", "traceback": ""}
    directory(output, runs[7]).mkdir()
    write_json_atomically(directory(output, runs[7]) / "error.json", error)
    (tuned,) = LONG.tuning(LONG.conditions()[-1])[:1]
    shutil.rmtree(directory(output, tuned))
    shown = lines(output, capsys)
    assert all(len(line) <= 80 for line in shown)
    assert shown[0].split() == ["depth", "task", "scheme", "tuning", "lr", "done", "running", "failed", "missing"]
    rows = {tuple(line.split()[:3]): line.split()[3:] for line in shown[1:] if "sentiment" in line}
    assert rows["8", "sentiment", "plain"] == ["3/3", "0.001", "2/2"]
    assert rows["8", "sentiment", "pre_ln"] == ["3/3", "0.001", "1/2", "1"]  # failed
    assert rows["2", "sentiment", "plain"] == ["3/3", "0.001", "1/2", "1"]  # missing
    ends = [next(line for line in shown if line.split()[:3] == [d, "sentiment", s]).rstrip()
            for d, s in (("8", "pre_ln"), ("2", "plain"))]  # fmt: skip
    assert [len(line) for line in ends] == [shown[0].index(name) + len(name) for name in ("failed", "missing")]
    assert "2/3" in " ".join(shown)
    assert "1 of 6 cells and 23 of 30 runs done (with tuning), 1 failed, 6 missing" in shown
    assert "`resformer study retry` runs the failures again" in shown


def test_status_has_the_encoders_that_the_study_pretrains(tmp_path, capsys):
    study = replace(LONG, schemes=("plain", "pre_ln"), pretraining=Pretraining(("text",), seeds=2))
    output = tmp_path / "out"
    open_study(output, study)
    good, *bad = study.encoders()[:3]
    put(output, good)
    for encoder in bad:
        directory(output, encoder).mkdir(parents=True)
        write_json_atomically(directory(output, encoder) / "error.json", {"config": {}, "error": "ValueError: no text"})
    shown = lines(output, capsys)
    assert all(len(line) <= 80 for line in shown)
    rows = [line.split() for line in shown[1:5]]
    assert rows == [
        ["8", "pre-training", "plain", "1/2", "1"], ["8", "pre-training", "pre_ln", "0/2", "1", "1"],
        ["2", "pre-training", "plain", "0/2", "1", "1"], ["2", "pre-training", "pre_ln", "0/2", "2"],
    ]  # fmt: skip
    said = " ".join(" ".join(shown).split())
    assert "0 of 4 cells and 1 of 28 runs done (with tuning and pre-training), 2 failed, 25" in said
    assert f"failed: {bad[0].id} (pre_ln, depth 8, pre-training, seed 0) and 1 more: ValueError: no text" in said


def test_status_marks_a_rate_at_the_end_of_the_grid(tmp_path, capsys):
    output = filled(tmp_path / "out", replace(TUNED, learning_rates=RATES[:2]))
    shown = lines(output, capsys)
    assert "0.001*" in shown[1]
    assert "* at the end of the grid: a better learning rate may lie beyond" in shown


def watching(run: Run, directory, micro_batch_size) -> None:
    Console(width=80).print(status(directory.parents[1]))
    fake(run, directory, micro_batch_size)


def test_status_tells_what_is_running_and_what_does_not_count(tmp_path, capsys):
    output = tmp_path / "out"
    open_study(output, ONE_RATE)
    run, other = ONE_RATE.runs({})[:2]
    put(output, other)
    (directory(output, other) / "result.json").write_text("{")
    assert attempt(watching, run, directory(output, run)) == "finished"
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:3] == ["8", "sentiment", "plain"]]
    assert row.split() == ["8", "sentiment", "plain", "0/1", "1"]
    shown = " ".join(lines(output, capsys))
    assert "1 of 4 cells and 1 of 4 runs done" in shown
    assert f"run {other.id}: result.json cannot be read" in shown


def test_a_study_that_grew_is_one_and_another_is_shown_for_itself(tmp_path, capsys):
    output = filled(tmp_path / "out", ONE_RATE)
    open_study(output, replace(ONE_RATE, depths=(2, 8, 16), seeds=2))
    assert sum(line.startswith("depth") for line in lines(output, capsys)) == 1
    open_study(output, replace(ONE_RATE, learning_rates=(1e-4,)))
    shown = lines(output, capsys)
    assert [line for line in shown if "study of" in line] == [
        "study of 6 cells x 2 seeds",
        "study of 4 cells x 1 seeds",
    ]


def test_status_from_the_command_line_needs_no_torch(tmp_path):
    output = filled(tmp_path / "out", ONE_RATE)
    code = (
        "import sys; from resformer.cli import main\n"
        f"try: main(['study', 'status', {str(output)!r}])\n"
        "finally: print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "4 of 4 cells and 4 of 4 runs done" in ran.stdout, ran.stderr
    assert ran.stdout.endswith("False\n")


def test_shards_of_machines_without_a_shared_disk_are_merged(tmp_path, capsys):
    study = replace(TUNED, depths=(2, 8))
    for i in (0, 1):
        go(tmp_path / f"part-{i}", study, shard=(i, 2), command=f"compare --shard {i}/2")
    main_output = tmp_path / "merged"
    with pytest.raises(SystemExit, match="0"):
        main(["study", "merge", str(main_output), str(tmp_path / "part-0"), str(tmp_path / "part-1")])
    assert capsys.readouterr().out == "20 runs copied, 0 found twice with the same result\n"
    assert content(main_output) == content(filled(tmp_path / "whole", study))
    assert len(list(main_output.glob("study-*.toml"))) == 1
    assert [entry["command"] for entry in read_study(main_output)] == ["compare --shard 0/2", "compare --shard 1/2"]
    assert all((path / "log.txt").exists() and (path / "config.json").exists() for path in main_output.glob("runs/*"))
    assert go(main_output, study).skipped == 20
    again = merge(main_output, [tmp_path / "part-0"])
    assert (again.copied, again.same) == (0, 10)


def test_results_alone_as_committed_are_read_and_merged(tmp_path):
    output = filled(tmp_path / "out", TUNED)
    assert {path.name for path in output.glob("runs/*/*")} == {"result.json"}
    assert len(read_results(output)) == 10
    (output / "study.json").rename(tmp_path / "study.json")
    with pytest.raises(ValueError, match=r"has a study\.json; give one folder that does"):
        merge(tmp_path / "new", [output])
    assert not (tmp_path / "new").exists()
    open_study(tmp_path / "new", TUNED)
    assert merge(tmp_path / "new", [output]).copied == 10
    assert go(tmp_path / "new", TUNED).skipped == 10


def test_conflicts_are_all_listed_and_nothing_is_changed(tmp_path):
    one, other = filled(tmp_path / "one", ONE_RATE), filled(tmp_path / "other", replace(ONE_RATE, seeds=2))
    first, second, third, _ = ONE_RATE.runs({})
    put(other, first, score=0.25)
    put(other, second, loss_curve=[[25, 0.125]])
    put(other, third, provenance={"platform": "another"}, cost={"seconds": 9.0})  # which is no difference
    before = {path: path.read_bytes() for path in one.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="different results of the same runs; nothing was merged") as caught:
        merge(one, [other])
    said = str(caught.value).splitlines()[1:]
    assert len(said) == 2
    assert f"runs/{first.id}: score 0.58 and 0.25" in said[0]
    assert f"runs/{second.id}: different loss curves" in said[1]
    assert {path: path.read_bytes() for path in one.rglob("*") if path.is_file()} == before


def test_retry_from_the_command_line(tmp_path, capsys):
    output = filled(tmp_path / "out", ONE_RATE)
    with pytest.raises(SystemExit, match="0"):
        main(["study", "retry", str(output)])
    assert capsys.readouterr().out == "runs: 0 finished, 4 there before, 0 failed\n"


def test_what_failed_or_does_not_count_is_not_merged(tmp_path):
    output = tmp_path / "out"
    open_study(output, ONE_RATE)
    behave(output, 2, "raise")
    go(output)
    failed = [run for run in ONE_RATE.runs({}) if run.condition.depth == 2]
    good, foreign = [run for run in ONE_RATE.runs({}) if run.condition.depth == 8]
    (directory(output, foreign) / "result.json").write_text(json.dumps(result(good)))
    target = tmp_path / "target"
    open_study(target, ONE_RATE)
    put(target, good)
    (directory(target, good) / "result.json").write_text("{")
    merged = merge(target, [output])
    assert (merged.copied, merged.same) == (1, 0)
    assert merged.passed_over == (f"{directory(output, foreign)}: result.json is of another run, {good.id}",)
    assert not any(directory(target, run).exists() for run in [*failed, foreign])
    assert read_result(directory(target, good)).finished
    assert (directory(target, good) / "rejected-1.json").read_text() == "{"


def test_folders_that_hold_no_study_are_refused(tmp_path):
    one = filled(tmp_path / "one", ONE_RATE)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("important")
    for output, source in ((one, tmp_path / "thesis"), (tmp_path / "thesis", one), (one, tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"holds no study|does not exist"):
            merge(output, [source])
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    content = json.loads((one / "study.json").read_text())
    content["studies"][0]["study"]["colour"] = "red"
    (one / "study.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="another version of resformer"):
        merge(tmp_path / "new", [one])
    assert not (tmp_path / "new").exists()
