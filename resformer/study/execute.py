"""Running a study on one machine: a pool of long-lived worker processes, each run in a directory of its own.

Nothing is remembered but the run directories: a run is finished exactly when its result.json is there, so a
study that was stopped, at any moment and in any way, is continued by starting it again. For Linux and macOS.
"""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from resformer.errors import unknown
from resformer.files import write_json_atomically
from resformer.spelling import parse_scheme
from resformer.study.plan import Run, Study
from resformer.study.progress import Progress
from resformer.study.results import open_study, read_result
from resformer.study.worker import Function, Slot, serve

SHORTEST = 8  # tokens that an example may be cut to: fewer leave nothing of it


@dataclass(frozen=True)
class Tally:
    """What became of the runs that were asked for."""

    finished: int  # now
    skipped: int  # finished before
    elsewhere: int  # being run by another process in the same folder
    failed: dict[str, str] = field(default_factory=dict)  # id of the run -> its error


def execute(
    study: Study,
    output: Path,
    *,
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    command: str | None = None,
    function: Function | str = "resformer.study.run:run",
    say: Callable[[str], None] | None = None,
) -> Tally:
    """Carry out the runs of `study` that have no result yet in `output`, and say what became of them.

    workers   how many runs at a time; None: one per CUDA device, or per core where there is none
    shard     (i, n): only every n-th run, from run i; 0 <= i < n. The n shards are disjoint and complete
    command   how the user asked for this, recorded in study.json
    function  called as `function(run, directory)` in a worker process; it leaves a valid result.json in the
              directory, and raises if it cannot. Given itself (a function of a module) or as "module:name"
    say       is told where the data of each task were found

    A run that raises, or whose process dies, leaves error.json; the others go on, and it is tried again at
    the next start. What runs print goes to log.txt in their directories. On Ctrl-C the workers are ended,
    with what they have not finished, and `KeyboardInterrupt` is raised.

    Raises `ValueError` before any work if the study names what does not exist, or `output` holds something
    else; `RuntimeError` if no worker process can start.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers!r}")
    i, n = shard or (0, 1)
    if not 0 <= i < n:
        raise ValueError(f"shard must be (i, n) with 0 <= i < n, got {shard!r}; the first of four is (0, 4)")
    check(study, say)
    output = Path(output).absolute()
    open_study(output, study, command)
    runs = study.runs()[i::n]
    directories = {run: output / "runs" / run.id for run in runs}
    before = {run: read_result(directory) for run, directory in directories.items()}
    todo = [run for run in runs if not before[run].finished]
    ended: dict[str, list[Run]] = {"finished": [], "elsewhere": [], "failed": []}
    jobs = [(run, directories[run]) for run in todo]
    with Progress(todo) as progress, contextlib.closing(_pool(jobs, function, slots(workers))) as pool:
        for run in todo:
            if problem := before[run].problem:
                progress.say(f"run {run.id}: {problem}; it is run again")
        for run, outcome in pool:
            ended[outcome].append(run)
            progress.advance(run, outcome, read_result(directories[run]))
    return Tally(
        finished=len(ended["finished"]),
        skipped=len(runs) - len(todo),
        elsewhere=len(ended["elsewhere"]),
        failed={run.id: str(read_result(directories[run]).error) for run in ended["failed"]},
    )


def check(study: Study, say: Callable[[str], None] | None = None) -> None:
    """Raise `ValueError` for a task, a scheme, a setting, or data that will not do."""
    from resformer.data.tasks import TASKS

    for task in study.tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    settings = study.settings
    if settings.max_length < SHORTEST:
        raise ValueError(f"max_length must be at least {SHORTEST} tokens, got {settings.max_length}")

    import torch  # only now: this takes seconds, and what is looked at above is told at once

    from resformer.data.glue import load_task
    from resformer.encoders import build_encoder
    from resformer.train.loop import PRECISIONS
    from resformer.train.schedule import factor

    if settings.precision not in PRECISIONS:
        raise unknown("precision", settings.precision, PRECISIONS)
    factor(settings.schedule, steps=settings.steps, warmup=settings.warmup)
    with torch.random.fork_rng(devices=[]):
        for text in study.schemes:
            name, options = parse_scheme(text)
            taken = options.keys() & signature(build_encoder).parameters.keys() - {"placement"}
            if taken:
                raise ValueError(f"scheme {text!r} sets {min(taken)!r}, which is of the encoder and not of a scheme")
            build_encoder(  # nothing knows better what can be built than building it, as small as it goes
                depth=min(study.depths),
                width=settings.width,
                heads=settings.heads,
                ffn_ratio=(settings.ffn or 4 * settings.width) / settings.width,
                vocab_size=8,
                max_length=8,
                scheme=name,
                init=settings.init,
                weight_init=settings.weight_init,
                **options,
            )
    for task in study.tasks:  # columns, labels, emptiness; and a download happens once, not in every worker
        load_task(task, settings.data, say=say)


def slots(workers: int | None) -> list[Slot]:
    """A slot for each worker: the cores are divided, CUDA devices are given out in turn."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    workers = workers or count or cores
    threads = max(1, cores // workers)
    return [Slot(threads, devices[index % count] if count else None) for index in range(workers)]


class _Worker:
    """A process that carries out one run after another, since its imports cost seconds."""

    def __init__(self, function: Function | str, slot: Slot):
        context = multiprocessing.get_context("spawn")
        self.slot = slot
        self.run: Run | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, function, slot))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def give(self, run: Run, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_json_atomically(directory / "config.json", run.config)
        self.run = run
        with contextlib.suppress(OSError):  # if the process is dead, `receive` will tell
            self.connection.send((run, directory))

    def receive(self) -> str | None:
        """What the process says, or None if it has ended; called when there is one or the other."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def end(self, seconds: float = 10) -> int | None:
        """See to it that the process ends; its exit code."""
        self.connection.close()  # an idle one ends by that
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _pool(
    jobs: Sequence[tuple[Run, Path]], function: Function | str, slots: Sequence[Slot]
) -> Generator[tuple[Run, str]]:
    """Carry out the runs in their directories, and yield each with what became of it, in the words of `serve`."""
    todo, directories = deque(jobs), dict(jobs)
    started: list[_Worker] = []
    try:
        for slot in slots[: len(todo)]:
            started.append(_Worker(function, slot))
        active = list(started)
        while active:
            ends: dict[Any, _Worker] = {end: w for w in active for end in (w.connection, w.process.sentinel)}
            for worker in dict.fromkeys(ends[end] for end in wait(ends)):
                said, run, worker.run = worker.receive(), worker.run, None
                if said is None:
                    code = worker.end()
                    if run is not None:
                        _record_death(run, directories[run], code)
                        said = "failed"
                if said in ("ready", "finished", "elsewhere") and todo:
                    worker.give(*todo.popleft())
                else:
                    active.remove(worker)
                    worker.connection.close()
                    if said == "failed" and todo:
                        started.append(_Worker(function, worker.slot))
                        active.append(started[-1])
                    # One that was not even ready when it ended is not replaced: another would do no better.
                if run is not None and said is not None:
                    yield run, said
        if todo:
            raise RuntimeError(
                "no worker process could start; its own message is above. In a script of your own, "
                'execute must be called under `if __name__ == "__main__":`'
            )
    except BaseException:  # Ctrl-C, or a caller that listens no more
        for worker in started:
            worker.process.terminate()
        raise
    finally:
        for worker in started:
            worker.end()


def _record_death(run: Run, directory: Path, code: int | None) -> None:
    how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
    error = f"the process of this run died ({how})"
    if code == -signal.SIGKILL:
        error += "; often that means that memory ran out: try fewer workers"
    log = directory / "log.txt"
    tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    write_json_atomically(directory / "error.json", {"config": run.config, "error": error, "traceback": tail})
