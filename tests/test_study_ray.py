"""The Ray executor, on clusters of this machine: what is left after workers, the driver and a node were killed.

Run with `pip install ray` and then `python -m pytest -n 0 -m slow tests/test_study_ray.py`; a cluster takes about a
gigabyte of memory and some seconds to start.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_study_execute import TUNED, alive, behave, content, go, until

from resformer.study.ray_pool import share
from resformer.study.results import open_study, read_result
from resformer.study.worker import Slot


def node(alive: bool = True, **resources: float) -> dict:
    """As `ray.nodes()` tells of one."""
    return {"Alive": alive, "Resources": {**resources, "memory": 1e9}}


def test_what_a_run_gets_of_a_cluster():
    small, large = node(CPU=4.0), node(CPU=16.0)
    assert share([small, large, node(alive=False, CPU=64.0)], None) == (Slot(1), 0, 20)
    assert share([small, large], 5) == (Slot(4), 0, 5)
    assert share([small, large], 2) == (Slot(4), 0, 2), "it has to fit on the smaller node"
    assert share([small, large], 100) == (Slot(1), 0, 20)
    assert share([node(CPU=16.0, GPU=4.0), node(CPU=6.0, GPU=1.0), large], None) == (Slot(4), 1, 5)
    assert share([node(CPU=16.0, GPU=4.0)], 2) == (Slot(4), 1, 2)
    assert share([], None) == (Slot(1), 0, 1)


def test_ray_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("resformer.study.ray_pool.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install resformer\[ray\]"):
        go(tmp_path / "out", executor="ray")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, tuple]:
    """What the study gives where nothing happens."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    go(output, TUNED)
    return content(output)


@pytest.fixture
def output(tmp_path):
    """A study whose runs do not end before `behave(output, 2)`."""
    pytest.importorskip("ray")
    open_study(tmp_path / "out", TUNED)
    behave(tmp_path / "out", 2, "hang")
    return tmp_path / "out"


def script(code: str) -> subprocess.Popen:
    """Python in a session of its own, where no test forbids a machine to speak to itself by its address."""
    found = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]  # by Ray's workers as well
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(found)},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def driver(output: Path, address: str | None = None) -> Iterator[subprocess.Popen]:
    """The study, which is not left behind where a test fails."""
    process = script(
        "import test_study_execute as t\n"
        f"print(t.go(t.Path({str(output)!r}), t.TUNED, workers=2, executor='ray', address={address!r}))"
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


@contextmanager
def cluster() -> Iterator[tuple[str, list[int]]]:
    """The address of a cluster of two nodes with a core each, and the processes that are its nodes."""
    code = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.head_node, cluster.add_node(num_cpus=1)]
cluster.wait_for_nodes()
print(cluster.address, *[node.all_processes["raylet"][0].process.pid for node in nodes], flush=True)
sys.stdin.read()
cluster.shutdown()
"""
    with script(code) as process:
        address, *pids = process.stdout.readline().split()
        try:
            yield address, [int(pid) for pid in pids]
        finally:
            process.communicate(timeout=60)


def at_work(output: Path) -> dict[str, int]:
    """The runs that are begun and have no result, with the last process that began each."""
    found = {path.parent: path.read_text().split() for path in output.glob("runs/*/attempts")}
    return {path.name: int(words[-2]) for path, words in found.items() if words and not read_result(path).finished}


def of_node(raylet: int, pid: int) -> bool:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == raylet


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(output, undisturbed):
    with driver(output) as process:
        until(lambda: len(at_work(output)) == 2)
        name, pid = next(iter(at_work(output).items()))
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid))
        behave(output, 2)
        said = process.communicate(timeout=200)[0]
    assert "Tally(finished=10, skipped=0, elsewhere=0, waiting=0, failed={})" in said
    assert len((output / "runs" / name / "attempts").read_text().splitlines()) == 2
    assert content(output) == undisturbed


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_process_and_is_continued(output, undisturbed):
    with driver(output) as process:
        until(lambda: len(at_work(output)) == 2)
        pids = list(at_work(output).values())
        process.kill()
    until(lambda: not any(map(alive, pids)))
    behave(output, 2)
    with driver(output) as process:
        said = process.communicate(timeout=200)[0]
    assert "Tally(finished=10, skipped=0, elsewhere=0, waiting=0, failed={})" in said
    assert content(output) == undisturbed


@pytest.mark.slow
def test_a_node_that_is_killed_has_its_runs_done_by_the_others(output, undisturbed):
    with cluster() as (address, (_, second)), driver(output, address) as process:
        until(lambda: len(at_work(output)) == 2)
        (lost,) = [name for name, pid in at_work(output).items() if of_node(second, pid)]
        os.kill(second, signal.SIGKILL)
        until(lambda: not alive(int((output / "runs" / lost / "attempts").read_text().split()[0])))
        behave(output, 2)
        said = process.communicate(timeout=200)[0]
    assert "Tally(finished=10, skipped=0, elsewhere=0, waiting=0, failed={})" in said
    assert len((output / "runs" / lost / "attempts").read_text().splitlines()) == 2
    assert content(output) == undisturbed


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_its_cluster_to_the_next(output, undisturbed):
    with cluster() as (address, _):
        with driver(output, address) as process:
            until(lambda: len(at_work(output)) == 2)
            process.kill()
        behave(output, 2)
        with driver(output, address) as process:  # at once: what it finds at work is ending
            said = process.communicate(timeout=200)[0]
    assert "elsewhere=0, waiting=0, failed={})" in said
    assert content(output) == undisturbed


@pytest.mark.slow
def test_memory_that_does_not_hold_a_batch_halves_it(output):
    behave(output, 2, "hold 9")
    with driver(output) as process:
        said = process.communicate(timeout=200)[0]
    assert "Tally(finished=10, skipped=0, elsewhere=0, waiting=0, failed={})" in said
    for path in output.glob("runs/*"):
        begun = [line.split() for line in (path / "attempts").read_text().splitlines()]
        assert [micro for _, micro in begun] == ["None", "16", "8"]
        assert len({pid for pid, _ in begun}) == 3
        assert read_result(path).micro_batch_size == 8


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_named(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        go(tmp_path / "out", TUNED, executor="ray", address="127.0.0.1:1")
