"""Running a study: what has no result yet, by the executor that was asked for.

Nothing is remembered but the run directories: a run is finished exactly when its result.json is there, so a study
that was stopped, at any moment and in any way, is continued by starting it again. For Linux and macOS.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from resformer.errors import unknown
from resformer.study.plan import Condition, Run, Study
from resformer.study.pool import Pool, check_workers
from resformer.study.pretraining import Encoder
from resformer.study.progress import Progress
from resformer.study.ray_pool import RayPool
from resformer.study.results import Result, open_study, read_result, read_study
from resformer.study.selection import chosen
from resformer.study.settings import Settings
from resformer.study.worker import Function, Unit, done

EXECUTORS = ("local", "ray")
RUN = "resformer.study.run:run"


@dataclass(frozen=True)
class Tally:
    """What became of the runs that were asked for, those that choose learning rates included."""

    finished: int  # now
    skipped: int  # finished before
    elsewhere: int  # being run by another process in the same folder
    waiting: int = 0  # for an encoder or a learning rate: its runs failed, or are elsewhere
    failed: dict[str, str] = field(default_factory=dict)  # id of the run -> its error


def execute(
    study: Study,
    output: Path,
    *,
    executor: str = "local",
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    command: str | None = None,
    file: str | None = None,
    function: Function | str = RUN,
    say: Callable[[str], None] | None = None,
    address: str | None = None,
) -> Tally:
    """Carry out the runs of `study` that have no result yet in `output`, and say what became of them: first the
    encoders that others start from, then the runs that choose learning rates, then those that are reported on.

    executor  "local", processes of this machine, or "ray": then `output` is on a disk that all nodes share
    workers   how many runs at a time; None: one per GPU, or per core where there is none
    shard     (i, n): piece i of n, whole conditions with all their runs; 0 <= i < n. The n shards are disjoint and
              complete, and none needs another
    command   how the user asked for this, recorded in study.json
    file      the text of the study file, kept beside study.json; None: one that asks for `study` is written
    function  called as `function(run, directory, micro_batch_size)` in a worker process; it leaves a valid result.json
              in the directory, and raises if it cannot. Given itself (a function of a module) or as "module:name"
    say       is told where the data of each task were found
    address   of a Ray cluster; None: a Ray is started for this study

    A run that raises, or whose process dies twice, leaves error.json; the others go on, and it is tried again at the
    next start. One whose memory does not hold its batch is run at once in smaller parts of it, which its result says.
    What runs print goes to log.txt in their directories. On Ctrl-C the workers are ended, with what they have not
    finished, and `KeyboardInterrupt` is raised.

    A study without facts is resolved first (see `resolve`). Raises `ValueError` before any work if it names what does
    not exist, or `output` holds something else; `ChildProcessError` if no worker process can start.
    """
    pool = executing(executor, workers, address, function)
    i, n = shard or (0, 1)
    if not 0 <= i < n:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard!r}; the first of four is (0, 4)")
    if not study.facts.data:
        from resformer.study.resolve import resolve  # only now: it brings torch, which takes seconds

        study = resolve(study, say)
    output = Path(output).absolute()
    open_study(output, study, command, file)
    part = study.piece(i, n)
    with contextlib.closing(pool):
        return _carry_out([(study, part)], output, pool, lambda run, result: not result.finished)


def retry(
    output: Path,
    *,
    executor: str = "local",
    workers: int | None = None,
    data: str | None = None,
    function: Function | str = RUN,
    address: str | None = None,
) -> Tally:
    """Run the failures of the studies in a folder again, and the runs that waited for them; the rest as in `execute`.

    data: where the tasks lie now, if not where the study says. Raises `ValueError` if the folder holds no study, and
    where its data are not there.
    """
    pool = executing(executor, workers, address, function)
    output = Path(output).absolute()
    parts = [(study, study.conditions()) for study in (_at(study, data) for study in studies(output))]
    look = _look(output)
    tuned = [run for study, part in parts for condition in part for run in study.tuning(condition)]
    broken = {encoder.id for study, _ in parts for encoder in study.encoders() if look(encoder).status == "failed"}
    held_up = {_kind(run) for run in tuned if look(run).status == "failed" or run.encoder in broken}

    def wanted(run: Run, result: Result) -> bool:
        waited = run.encoder in broken or (not run.tuning and _kind(run) in held_up)
        return result.status == "failed" or (not result.finished and waited)

    with contextlib.closing(pool):
        return _carry_out(parts, output, pool, wanted)


def studies(output: Path) -> list[Study]:
    """Those that were run into a folder, oldest first, each once. Raises `ValueError` if it holds none."""
    found = [Study.read(entry["study"]) for entry in read_study(output)]
    return [study for position, study in enumerate(found) if study not in found[:position]]


def _at(study: Study, data: str | None) -> Study:
    """The study with the folder of its data, which is not part of what runs are called."""
    data = data or study.settings.data
    if data is not None and not Path(data).is_dir():
        raise ValueError(f"the data of the study, {data!r}, are not in {str(Path.cwd())!r}; say where: --data FOLDER")
    return replace(study, settings=replace(study.settings, data=data))


def executing(
    executor: str, workers: int | None = None, address: str | None = None, function: Function | str = RUN
) -> Pool | RayPool:
    """What carries out runs, with nothing started yet. Raises `ValueError` for an executor that cannot be had."""
    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    check_workers(workers)
    if executor == "ray":
        return RayPool(function, workers, address)
    if address is not None:
        raise ValueError(f"address {address!r} is of a Ray cluster; give it with executor 'ray'")
    return Pool(function, workers)


def _look(output: Path) -> Callable[[Unit], Result]:
    return lambda run: read_result(output / "runs" / run.id)


def _carry_out(
    parts: Sequence[tuple[Study, Sequence[Condition]]],
    output: Path,
    pool: Pool | RayPool,
    wanted: Callable[[Run, Result], bool],
) -> Tally:
    """The runs of some conditions of each study that are `wanted`, which is said of none that is finished."""
    look = _look(output)

    def place(run: Unit) -> Path:
        return output / "runs" / run.id

    def tuning() -> list[Run]:
        return _each_once(run for study, part in parts for condition in part for run in study.tuning(condition))

    def reported() -> list[Run]:
        return _each_once(
            run for study, part in parts for run in study.runs(chosen(study, look)) if run.condition in part
        )

    def ready(run: Run) -> bool:
        start = encoders.get(run.encoder or "")
        return run.learning_rate is not None and (start is None or done(start, place(start)))

    encoders = {encoder.id: encoder for study, _ in parts for encoder in study.encoders()}
    before = {run: look(run) for run in tuning() + reported()}
    skipped: list[Unit] = [run for run, result in before.items() if result.finished]
    asked: list[Unit] = [run for run, result in before.items() if wanted(run, result)]
    needed = {run.encoder for run in asked if isinstance(run, Run)}
    first = [encoder for name, encoder in encoders.items() if name in needed and not done(encoder, place(encoder))]
    ended: Counter[str] = Counter()
    failed, elsewhere = {}, list[Unit]()
    with Progress([*first, *skipped, *asked], skipped) as progress:
        stages: tuple[Callable[[], Sequence[Unit]], ...] = (lambda: first, tuning, reported)
        for stage in stages:
            todo: list[Unit] = []
            for run in stage():
                if run not in before and isinstance(run, Run) and look(run).finished:
                    skipped.append(run)  # at a rate that was chosen just now
                    progress.skip(run)
                elif isinstance(run, Encoder) or (ready(run) and wanted(run, look(run))):
                    todo.append(run)
                    if problem := look(run).problem:
                        progress.say(f"run {run.id}: {problem}; it is moved to rejected-N.json, and run again")
            for run, event in pool.carry_out([(run, place(run)) for run in todo]):
                if event == "started":
                    progress.start(run)
                    continue
                result = look(run)
                if event == "elsewhere" and result.finished:  # by the other process, since this one looked
                    event = "skipped"
                    skipped.append(run)
                progress.advance(run, event, result)
                ended[event] += 1
                if event == "elsewhere":
                    elsewhere.append(run)
                if event == "failed":
                    failed[run.id] = str(result.error)
    waiting = sum(not ready(run) and wanted(run, look(run)) for run in tuning() + reported())
    by_now = sum(look(run).finished for run in elsewhere)  # the other process went on meanwhile
    return Tally(ended["finished"], len(skipped) + by_now, len(elsewhere) - by_now, waiting, failed)


def _kind(run: Run) -> tuple[Condition, Settings, bool]:
    """What a run has in common with those that choose its learning rate, and with no run of another study."""
    return run.condition, run.settings, run.encoder is None


def _each_once(runs: Iterable[Run]) -> list[Run]:
    """Without repetitions, which two studies of one folder have in common."""
    return list({run.id: run for run in runs}.values())
