"""Running a study: what happens when runs raise, die, are stopped, or are wanted twice.

The runs are fakes that cost nothing; how they behave is told by a file in the study's folder, named by depth.
"""

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from resformer.files import write_json_atomically
from resformer.study.execute import execute, retry
from resformer.study.plan import TUNING_SEED, Condition, Facts, Run, Study
from resformer.study.pool import slots
from resformer.study.pretraining import Encoder, Pretraining
from resformer.study.progress import Progress, duration
from resformer.study.results import HALVED, Result, open_study, read_result, read_results, read_study
from resformer.study.selection import chosen
from resformer.study.settings import Settings
from resformer.study.worker import Slot, attempt

RESOLVED = Facts(data={"sentiment": "0" * 64})
ONE_RATE = Study(
    ("plain", "pre_ln"), (2, 8), ("sentiment",), 1, (1e-3,), controls=False, settings=Settings(steps=8), facts=RESOLVED
)
RATES = (1e-4, 1e-3, 1e-2)
TUNED = replace(ONE_RATE, learning_rates=RATES, depths=(2,), seeds=2)


LOCKS = []


def fake(run: Run | Encoder, directory: Path, micro_batch_size: int | None) -> None:
    """Do what was asked for runs of this depth, note that it was done, and leave a result."""
    LOCKS.append(multiprocessing.RLock())  # as tqdm makes one: a semaphore that has to be given back
    with open(directory / "attempts", "a") as begun:
        begun.write(f"{os.getpid()} {micro_batch_size}\n")
    asked = directory.parents[1] / f"fake-{run.config['depth']}"
    behaviour = asked.read_text() if asked.exists() else ""
    if behaviour == "raise":
        raise ArithmeticError("no good")
    if behaviour == "raise when tuning" and run.config.get("tuning"):
        raise ArithmeticError("no good")
    if isinstance(run, Encoder):
        if behaviour == "raise when pre-training":
            raise ArithmeticError("no good")
        (directory / "model").mkdir(exist_ok=True)
    elif run.encoder:
        assert (directory.parent / run.encoder / "model").is_dir(), "it starts from an encoder"
    if behaviour == "die" or (behaviour == "die once" and len(attempts(directory.parents[1], run)) == 1):
        os.write(1, b"last words\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "nothing":
        return
    while behaviour == "hang" and asked.read_text() == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as in training, which would save first
        time.sleep(0.02)
    if behaviour.startswith("hold"):  # no more than so many examples, or it says so in these words
        most, _, words = behaviour.removeprefix("hold ").partition(" ")
        if (micro_batch_size or run.config["batch_size"]) > int(most):
            raise RuntimeError(words) if words else MemoryError
    write_json_atomically(directory / "result.json", result(run, micro_batch_size))


def result(run: Run | Encoder, micro_batch_size: int | None = None) -> dict:
    """The same for a run whenever it is carried out; the best learning rate is 1e-3."""
    score = run.config["depth"] / 100 + (0.5 if run.config["learning_rate"] == 1e-3 else 0) + run.seed % 10 / 1000
    given = {"threads": os.environ.get("OMP_NUM_THREADS")}
    return {
        "version": 1,
        "config": {**run.config, "device": "this"},  # more than the run's own, as fine-tuning writes
        "settings": {"micro_batch_size": micro_batch_size},
        "status": "ok",
        "score": score,
        "train_loss": 1 - score,
        "metrics": {"loss": 1 - score},
        "loss_curve": [[25, 1 - score]],
        "flags": ["at_chance"],
        "provenance": given,
    }


def behave(output: Path, depth: int, behaviour: str = "") -> None:
    (output / f"fake-{depth}").write_text(behaviour)


def directory(output: Path, run: Run) -> Path:
    return output / "runs" / run.id


def attempts(output: Path, run: Run) -> list[tuple[int, str]]:
    """The process and the micro-batch of each time that the run was begun."""
    path = directory(output, run) / "attempts"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines]


def go(output: Path, study: Study = ONE_RATE, **options):
    return execute(study, output, **{"workers": 1, "function": fake, **options})


def reported(study: Study, output: Path) -> list[Run]:
    return study.runs(chosen(study, lambda run: read_result(directory(output, run))))


RUNS = ONE_RATE.runs({})
DEEP = [run for run in RUNS if run.condition.depth == 8]


@pytest.fixture
def output(tmp_path):
    """A study of which no run has been carried out; behaviours can be put in its folder."""
    open_study(tmp_path / "out", ONE_RATE)
    return tmp_path / "out"


def until(condition, seconds: float = 180) -> None:
    """Wait for something that is bound to happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def content(output: Path) -> dict[str, tuple]:
    """What the results of a study say, by run."""
    return {one.directory.name: (one.status, one.score, one.loss_curve) for one in read_results(output)}


def test_all_runs_are_done_once_and_by_few_processes(tmp_path, capsys):
    tally = go(tmp_path / "out", workers=2)
    assert (tally.finished, tally.skipped, tally.elsewhere, tally.waiting, tally.failed) == (4, 0, 0, 0, {})
    assert {(r.config["scheme"], r.config["depth"], r.score) for r in read_results(tmp_path / "out")} == {
        ("plain", 2, 0.52), ("plain", 8, 0.58), ("pre_ln", 2, 0.52), ("pre_ln", 8, 0.58),
    }  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    assert all(r.provenance["threads"] == str(max(1, cores // 2)) for r in read_results(tmp_path / "out"))
    pids = [attempts(tmp_path / "out", run) for run in RUNS]
    assert all(len(each) == 1 for each in pids)
    assert len({each[0][0] for each in pids}) <= 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines if "depth" in line] == ["1/4", "2/4", "3/4", "4/4"]
    assert lines[0] == "0/4 cells, 0/4 runs"
    assert lines[1].startswith("1/4  0.580 ")
    assert lines[2].startswith("1/4 cells, 1/4 runs, ")
    assert all(len(line) <= 80 for line in lines)


def test_starting_again_runs_only_what_is_new(output):
    assert go(output).finished == 4
    tally = go(output)
    assert (tally.finished, tally.skipped) == (0, 4)
    tally = go(output, replace(ONE_RATE, depths=(2, 8, 4), seeds=2))
    assert (tally.finished, tally.skipped) == (8, 4)
    assert all(len(attempts(output, run)) == 1 for run in RUNS)
    # Another study with some of the same runs: it has them already.
    tally = go(output, replace(ONE_RATE, schemes=("plain", "rezero"), baseline="plain", depths=(8,)))
    assert (tally.finished, tally.skipped) == (1, 1)
    assert len(read_study(output)) == len(list(output.glob("study-*.toml"))) == 3


def test_learning_rates_are_chosen_first_and_then_run_with(tmp_path):
    output = tmp_path / "out"
    tally = go(output, TUNED)
    assert (tally.finished, tally.waiting) == (2 * 3 + 2 * 2, 0)
    runs = reported(TUNED, output)
    assert [(run.seed, run.learning_rate) for run in runs] == [(0, 1e-3), (0, 1e-3), (1, 1e-3), (1, 1e-3)]
    results = {one.directory.name: one for one in read_results(output)}
    assert len(results) == 10
    tuning = [one.config for one in results.values() if one.config["tuning"]]
    assert sorted((one["scheme"], one["learning_rate"]) for one in tuning) == [
        (scheme, rate) for scheme in ("plain", "pre_ln") for rate in RATES
    ]
    assert {one["seed"] for one in tuning} == {TUNING_SEED}
    assert all(not results[run.id].config["tuning"] for run in runs)
    # One process for both stages.
    assert len({pid for path in output.glob("runs/*/attempts") for pid in path.read_text().split()[::2]}) == 1
    # A grid that grows runs what it adds; what is chosen stays what it is.
    tally = go(output, replace(TUNED, learning_rates=(*RATES, 0.1)))
    assert (tally.finished, tally.skipped) == (2, 10)


def test_runs_wait_for_a_learning_rate_that_could_not_be_chosen(output):
    behave(output, 2, "raise when tuning")
    study = replace(TUNED, schemes=("plain",), baseline=None, learning_rates=RATES[:2], depths=(2, 4))
    tally = go(output, study)
    assert (tally.finished, tally.waiting, len(tally.failed)) == (2 + 2, 2, 2)
    behave(output, 2)
    # What failed, and what waited for that; not what is missing otherwise.
    open_study(output, replace(study, depths=(2, 4, 8)))
    tally = retry(output, workers=1, function=fake)
    assert (tally.finished, tally.skipped, tally.waiting, tally.failed) == (2 + 2, 4, 0, {})
    assert {one.config["depth"] for one in read_results(output)} == {2, 4}


def test_encoders_come_first_and_their_runs_wait_for_them(output):
    study = replace(TUNED, schemes=("plain",), baseline=None, learning_rates=RATES[:2], depths=(2, 4))
    study = replace(study, pretraining=Pretraining(("text",)))
    behave(output, 2, "raise when pre-training")
    tally = go(output, study)  # of depth 4 an encoder, two runs that choose, two that are reported on
    assert (tally.finished, tally.skipped, tally.waiting, len(tally.failed)) == (1 + 2 + 2, 0, 2 + 2, 1)
    behave(output, 2)
    tally = retry(output, workers=1, function=fake)
    assert (tally.finished, tally.skipped, tally.waiting, tally.failed) == (1 + 2 + 2, 4, 0, {})
    # Where the models are missing, as after a merge, encoders are made again, but only those that runs still need.
    for path in output.glob("runs/*/model"):
        path.rmdir()
    assert go(output, study).finished == 0
    behave(output, 2, "raise when pre-training")
    tally = go(output, replace(study, depths=(4,), seeds=3))
    assert (tally.finished, tally.failed) == (1 + 1, {})


def test_a_run_that_raises_leaves_its_error_and_is_tried_again(output, capsys):
    behave(output, 8, "raise")
    tally = go(output)
    assert tally.finished == 2
    assert tally.failed == {run.id: "ArithmeticError: no good" for run in DEEP}
    said = capsys.readouterr().err
    for run in DEEP:
        found = read_result(directory(output, run))
        assert (found.status, found.config) == ("failed", run.config)
        assert "in fake" in found.traceback
        assert f"see {run.id}/error.json" in said
    # The next run gets a process that no exception has been through.
    assert len({pid for run in RUNS for pid, _ in attempts(output, run)}) == 3
    behave(output, 8)
    tally = go(output)
    assert (tally.finished, tally.skipped, tally.failed) == (2, 2, {})
    assert not list(output.glob("runs/*/error.json"))


def test_a_run_whose_worker_is_killed_is_begun_again_in_another(output, capsys):
    behave(output, 8, "die once")
    tally = go(output)
    assert (tally.finished, tally.failed) == (4, {})
    for run in DEEP:
        assert len({pid for pid, _ in attempts(output, run)}) == 2
        log = (directory(output, run) / "log.txt").read_text()
        died = "the process of this run died (SIGKILL, often since memory ran out: try fewer workers)"
        assert log == f"last words\n{died}; it is begun again, in a fresh process\n"
    assert capsys.readouterr().err.count("its process died, again: p") == 2
    undisturbed = {run.id: ("ok", result(run)["score"], result(run)["loss_curve"]) for run in RUNS}
    assert content(output) == undisturbed


def test_a_run_whose_worker_is_killed_again_has_failed(output):
    study = replace(ONE_RATE, schemes=("plain",), baseline=None)
    behave(output, 8, "die")
    tally = go(output, study)
    assert (tally.finished, len(tally.failed)) == (1, 1)
    error = json.loads((directory(output, DEEP[0]) / "error.json").read_text())
    assert error["config"] == DEEP[0].config
    assert re.search(r"died \(SIGKILL.*\), 2 times in a row", error["error"])
    assert error["traceback"].count("last words\n") == len(attempts(output, DEEP[0])) == 2


def test_a_run_without_a_result_has_failed(output):
    behave(output, 8, "nothing")
    assert set(go(output).failed.values()) == {"RuntimeError: the run ended without a result: no result.json"}


def test_memory_that_does_not_hold_a_batch_halves_it_and_marks_the_run(output, capsys):
    behave(output, 8, "hold 9")
    tally = go(output, workers=2)
    assert (tally.finished, tally.failed) == (4, {})
    for run in DEEP:
        begun = attempts(output, run)
        assert [micro for _, micro in begun] == ["None", "16", "8"]
        assert len({pid for pid, _ in begun}) == 3, "each time in a fresh process"
        found = read_result(directory(output, run))
        assert (found.micro_batch_size, found.flags) == (8, ["at_chance", HALVED])
    assert all(read_result(directory(output, run)).flags == ["at_chance"] for run in RUNS if run not in DEEP)
    assert capsys.readouterr().err.count("out of memory, again with half the micro-batch: pl") == 2


@pytest.mark.parametrize(
    ("words", "micro", "outcome"),
    [
        ("", None, "memory"),
        ("", 2, "memory"),
        ("", 1, "failed"),  # not one example
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes", None, "memory"),
        ("CUDA error: out of memory", None, "memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None, "memory"),
        ("The size of tensor a (3) must match the size of tensor b (4)", None, "failed"),
    ],
)
def test_what_counts_as_memory_that_ran_out(output, words, micro, outcome):
    behave(output, 8, f"hold 0 {words}")
    assert attempt(fake, DEEP[0], directory(output, DEEP[0]), micro) == outcome
    assert (directory(output, DEEP[0]) / "error.json").exists() == (outcome == "failed")


def test_cuda_memory_that_ran_out_counts_whatever_it_says(output):
    from torch import OutOfMemoryError

    def function(run: Run, directory: Path, micro_batch_size: int | None) -> None:
        raise OutOfMemoryError("no words")

    assert attempt(function, RUNS[0], directory(output, RUNS[0])) == "memory"


def test_a_result_that_hides_its_micro_batch_is_not_kept(output):
    run = RUNS[0]
    assert attempt(lambda run, path, micro: fake(run, path, None), run, directory(output, run), 4) == "failed"
    assert "settings.micro_batch_size None, not 4" in read_result(directory(output, run)).error


def test_a_real_run_is_known_by_its_result_and_says_in_what_parts_it_was_computed(tmp_path):
    settings = Settings(width=8, max_length=8, train_size=64, batch_size=16, steps=2)
    run = Run(Condition("rezero", 1, "sentiment"), 0, 1e-3, tuning=True, settings=settings)
    from resformer.study.run import run as carry_out

    assert attempt(carry_out, run, tmp_path / run.id, 4) == "finished"
    found = read_result(tmp_path / run.id)
    assert (found.status, found.micro_batch_size, found.problem) == ("ok", 4, None)
    assert HALVED in found.flags


def damage(path: Path, kind: str, other: Run) -> None:
    text = path.read_text()
    changed = {"cut off": text[:40], "of another version": text.replace('"version": 1', '"version": 7')}
    path.write_text(changed.get(kind, json.dumps(result(other))))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("cut off", "cannot be read"),
        ("of another version", "has version 7, this resformer reads 1"),
        ("of another run", f"is of another run, {RUNS[1].id}"),
    ],
)
def test_a_result_that_does_not_count_is_moved_aside_and_the_run_done_again(output, kind, says):
    place = directory(output, RUNS[0])
    assert attempt(fake, RUNS[0], place) == "finished"
    for number in (1, 2):
        assert attempt(fake, RUNS[0], place) == "elsewhere"
        damage(place / "result.json", kind, RUNS[1])
        (wrong,) = read_results(output)
        assert (wrong.status, says in wrong.problem) == ("unfinished", True)
        wrong_text = (place / "result.json").read_text()
        assert attempt(fake, RUNS[0], place) == "finished"
        assert read_result(place).finished
        assert (place / f"rejected-{number}.json").read_text() == wrong_text


def test_a_result_that_does_not_count_is_named(output, capsys):
    put = directory(output, RUNS[0])
    put.mkdir(parents=True)
    (put / "result.json").write_text("{")
    assert go(output).finished == 4
    said = " ".join(capsys.readouterr().err.split())
    assert f"run {RUNS[0].id}: result.json cannot be read" in said
    assert "it is moved to rejected-N.json, and run again" in said


def test_shards_are_disjoint_and_complete(tmp_path):
    study = replace(TUNED, schemes=("plain", "pre_ln", "post_ln"), depths=(1, 2))
    for i, conditions in enumerate([2, 2, 2]):  # each with three rates and two seeds
        tally = go(tmp_path / f"out-{i}", study, shard=(i, 3))  # a folder of its own: it needs no other
        assert (tally.finished, tally.skipped, tally.waiting) == (conditions * (3 + 2), 0, 0)
    names = [path.name for i in range(3) for path in (tmp_path / f"out-{i}" / "runs").iterdir()]
    assert len(names) == len(set(names)) == 6 * 5
    found = [one for i in range(3) for one in read_results(tmp_path / f"out-{i}") if not one.config["tuning"]]
    cells = [(one.config["scheme"], one.config["depth"], one.config["seed"]) for one in found]
    assert sorted(cells) == sorted((s, d, n) for s in study.schemes for d in study.depths for n in (0, 1))


def background(output: Path) -> subprocess.Popen:
    """The same study, in a session of its own, until it is signalled."""
    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have taken away\n"
        "import test_study_execute as t\n"
        f"t.go(t.Path({str(output)!r}), workers=2)"
    )
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_a_stopped_study_leaves_no_process_and_is_continued(tmp_path, output, how):
    behave(output, 2, "hang")
    with background(output) as process:
        hanging = [run for run in RUNS if run.condition.depth == 2]
        until(lambda: all(attempts(output, run) for run in hanging))
        if how == "ctrl-c":
            # While another process is at them, runs are left alone.
            tally = go(output)
            assert (tally.finished, tally.skipped, tally.elsewhere, tally.failed) == (0, 2, 2, {})
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        else:
            process.kill()
        error = process.communicate(timeout=60)[1]
    until(lambda: not any(alive(pid) for run in hanging for pid, _ in attempts(output, run)))
    if how == "ctrl-c":
        assert error.count("Traceback") == 1
        assert error.rstrip().endswith("KeyboardInterrupt"), "and no semaphore was left behind"
    statuses = {(r.config["depth"], r.status) for r in read_results(output)}
    assert statuses == {(8, "ok"), (2, "unfinished")}
    behave(output, 2)
    tally = go(output)
    assert (tally.finished, tally.skipped) == (2, 2)
    go(tmp_path / "undisturbed")
    assert content(output) == content(tmp_path / "undisturbed")


def test_workers_that_cannot_start_are_an_error(tmp_path, capfd):
    with pytest.raises(ChildProcessError, match="no worker process could start"):
        go(tmp_path / "out", workers=2, function="resformer.no_such_module:run")
    assert "No module named 'resformer.no_such_module'" in capfd.readouterr().err


MORTAL = """
import os, signal
from pathlib import Path
from test_study_execute import fake as run

starts = Path(os.environ["STARTS"])
with starts.open("a") as file:
    file.write(".")
if len(starts.read_text()) == int(os.environ["DEADLY"]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("deadly", "finished"), [(1, 4), (2, 3)])  # the first process; the one in place of a dead one
def test_a_process_that_dies_while_it_starts_does_not_end_the_study(output, tmp_path, monkeypatch, deadly, finished):
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("STARTS", str(tmp_path / "starts"))
    monkeypatch.setenv("DEADLY", str(deadly))
    if deadly == 2:
        behave(output, 2, "die once")
    tally = go(output, function="mortal:run")
    assert (tally.finished, len(tally.failed)) == (finished, 4 - finished)
    assert all("SIGKILL" in error for error in tally.failed.values())


def test_retry_looks_for_the_data_first(tmp_path, monkeypatch):
    study = replace(ONE_RATE, settings=replace(ONE_RATE.settings, data="mine"))
    open_study(tmp_path / "out", study)
    behave(tmp_path / "out", 8, "raise")
    assert len(go(tmp_path / "out", study).failed) == 2
    behave(tmp_path / "out", 8)
    with pytest.raises(ValueError, match=r"the data of the study, 'mine', are not in .*; say where: --data FOLDER"):
        retry(tmp_path / "out", function=fake)
    (tmp_path / "moved").mkdir()
    assert retry(tmp_path / "out", function=fake, data=str(tmp_path / "moved")).finished == 2


def test_a_lost_study_json_loses_no_run(output):
    go(output)
    (output / "study.json").write_text('{"version": 1, "studies": [{"study": {"schemes": ["foo"]}}]}')
    with pytest.raises(
        ValueError, match=r"remove study\.json, and start `resformer compare` into the same folder again"
    ):
        go(output)
    (output / "study.json").write_text('{"version": 1, "studies": []}')
    with pytest.raises(ValueError, match="lists no studies; remove it, and start `resformer compare`"):
        go(output)
    (output / "study.json").unlink()
    assert go(output).skipped == 4


def test_unknown_names_are_refused_before_anything_is_written(tmp_path):
    study = Study(("plain", "rezro"), (2,), ("sentiment", "sentimant"))
    with pytest.raises(ValueError, match=r"unknown scheme 'rezro'\. Did you mean 'rezero'\?") as caught:
        execute(study, tmp_path / "out", function=fake)
    assert "unknown task 'sentimant'. Did you mean 'sentiment'" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"shard": (2, 2)}, "shard must be"),
        ({"shard": (0, 0)}, "shard must be"),
        ({"executor": "rya"}, "unknown executor 'rya'. Did you mean 'ray'"),
        ({"address": "auto"}, "address 'auto' is of a Ray cluster; give it with executor 'ray'"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        go(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    for use in (go, retry):
        with pytest.raises(ValueError, match="holds no study"):
            use(tmp_path)


def test_cores_are_divided_and_devices_given_out_in_turn(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert slots(None) == [Slot(1, None)] * 8
    assert slots(3) == [Slot(2, None)] * 3
    assert slots(100)[0] == Slot(1, None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots(None) == [Slot(4, "0"), Slot(4, "1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [slot.device for slot in slots(4)] == ["3", "GPU-5", "3", "GPU-5"]


def shown(screen: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_a_terminal_sees_one_bar_and_only_the_failures():
    screen = io.StringIO()
    with Progress(RUNS, RUNS[:1], Console(file=screen, force_terminal=True, width=80)) as progress:
        assert progress.standing() == "1/4 cells, 1/4 runs"
        for run in RUNS[1:]:
            progress.start(run)
        assert progress.standing() == "1/4 cells, 1/4 runs, 3 running"
        for run, outcome in zip(RUNS[1:], ["failed", "finished", "finished"], strict=True):
            result = Result(Path(run.id), run.config, "ok", score=0.5, error="ValueError: [no]\nmore " + "x" * 99)
            progress.advance(run, outcome, result)
    assert "3/4 cells, 3/4 runs, 1 failed" in shown(screen)
    assert "ValueError: [no] more xxx" in shown(screen)
    assert f"see {RUNS[1].id}/error.json" in shown(screen)
    assert shown(screen).count("depth") == 1


def test_the_time_left_follows_the_work(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    runs = [Run(Condition("plain", depth, task), 0, None) for depth, task in ((8, "a"), (8, "a"), (4, "a"), (8, "b"))]
    progress = Progress(runs, console=Console(file=io.StringIO()))
    assert progress.remaining() == ""
    progress.start(runs[0])
    clock["now"] = 60.0
    progress.advance(runs[0], "finished", Result(Path("x"), {}, "ok", 0.5))
    assert progress.remaining() == "2 min left"  # 8 + 4 + 8 layers in turn, at 7.5 s each: 150 s
    progress.start(runs[3])
    clock["now"] = 90.0
    progress.advance(runs[3], "finished", Result(Path("x"), {}, "ok", 0.5))
    assert progress.remaining() == "2 min left"  # b is another task: 12 layers of a
    progress.start(runs[1])
    progress.start(runs[2])
    clock["now"] = 110.0
    assert progress.remaining() == "42 s left"  # 90 - 20 - 20 s of one process, of which there were 130 / 110


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (100, "2 min"), (7300, "2 h 2 min")])
def test_durations_are_read_easily(seconds, text):
    assert duration(seconds) == text
