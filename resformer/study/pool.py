"""The runs of a study on one machine: long-lived worker processes, one per GPU or core."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Generator, Iterable
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from resformer.study.worker import LEAVE, Function, Slot, Unit, note, record, serve, smaller

AGAIN = "it is begun again, in a fresh process"
RETRIES = 1  # of a run whose process died, as by the kernel where memory ran out; one that raises is not tried again
Job = tuple[Unit, Path, int | None]  # with its directory, and how many examples are computed at once (None: the batch)


class Pool:
    """Carries out runs in processes of this machine; to be closed. No process starts before there is a run."""

    def __init__(self, function: Function | str, workers: int | None = None):
        self.function, self.count = function, workers
        self.workers: list[_Worker] = []
        self.deaths: Counter[Unit] = Counter()
        self.stillborn = 0  # processes that died before they were ready, one after the other

    @cached_property
    def vacant(self) -> list[Slot]:
        return slots(self.count)[::-1]

    def carry_out(self, jobs: Iterable[tuple[Unit, Path]]) -> Generator[tuple[Unit, str]]:
        """Yield (run, "started") and (run, what became of it in the words of `attempt`) for each of the runs.

        After "memory" the run is started again, in a fresh process and with half the micro-batch; after "died", which
        is said of no more than `RETRIES` deaths of its process, as it was. Raises `ChildProcessError` if no process can
        start.
        """
        todo: deque[Job] = deque((run, directory, None) for run, directory in jobs)
        while True:
            free = sum(worker.job is None and worker.reserved is None for worker in self.workers)
            while todo and self.vacant and free < len(todo):
                self._start()
                free += 1
            for worker in self.workers:
                if worker.ready and worker.job is None and (worker.reserved or todo):
                    job = worker.reserved or todo.popleft()
                    worker.give(job)
                    yield job[0], "started"
            if not todo and not any(worker.job or worker.reserved for worker in self.workers):
                return
            if not self.workers:
                raise ChildProcessError(
                    f"no worker process could start: {self.stillborn} died before they were ready, with what they said "
                    "above; where memory ran out, try fewer workers: the same command goes on. In a script of your "
                    'own, execute must be called under `if __name__ == "__main__":`'
                )
            awaited = [worker for worker in self.workers if worker.job or not worker.ready]
            ends: dict[Any, _Worker] = {end: w for w in awaited for end in (w.connection, w.process.sentinel)}
            for worker in dict.fromkeys(ends[end] for end in wait(ends)):
                yield from self._heard(worker)

    def _heard(self, worker: _Worker) -> Iterable[tuple[Unit, str]]:
        """What a worker has to say, or that it has ended."""
        said, started = worker.receive(), worker.ready
        if said == "ready":
            worker.ready = True
            return
        job, worker.job, code = worker.job or worker.reserved, None, None
        if said in (None, "failed", "memory"):
            self.workers.remove(worker)
            code = worker.end()
            self.stillborn = 0 if started else self.stillborn + 1
            if self.stillborn <= RETRIES:  # more of them, and another would do no better
                self.vacant.append(worker.slot)
        if job is None:
            return
        run, directory, micro = job
        if said is None:
            said = died(run, directory, self.deaths, RETRIES if self.vacant else 0, _death(code))
        if said == "memory":
            self._start((run, directory, smaller(run, micro)))
        if said == "died":
            self._start(job)
        yield run, said

    def _start(self, reserved: Job | None = None) -> _Worker:
        self.workers.append(_Worker(self.function, self.vacant.pop(), reserved))
        return self.workers[-1]

    def close(self) -> None:
        """End the processes, with what they have not finished."""
        for worker in self.workers:
            worker.leave()
        for worker in self.workers:
            worker.end()
        self.workers.clear()


def died(run: Unit, directory: Path, deaths: Counter[Unit], retries: int, how: str) -> str:
    """Count the death of a run's process: "died" where the run is to be started again, else "failed", on record."""
    deaths[run] += 1
    if deaths[run] <= retries:
        note(directory, f"{how}; {AGAIN}")
        return "died"
    record(run, directory, f"{how}, {deaths[run]} times in a row")
    return "failed"


def slots(workers: int | None) -> list[Slot]:
    """A slot for each worker: the cores are divided, CUDA devices are given out in turn."""
    check_workers(workers)
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    workers = workers or count or cores
    threads = max(1, cores // workers)
    return [Slot(threads, devices[index % count] if count else None) for index in range(workers)]


def check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers!r}")


class _Worker:
    """A process that carries out one run after another, since its imports cost seconds."""

    def __init__(self, function: Function | str, slot: Slot, reserved: Job | None = None):
        context = multiprocessing.get_context("spawn")
        self.slot, self.reserved = slot, reserved  # what it is to begin with
        self.ready = False
        self.job: Job | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, function, slot))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def give(self, job: Job) -> None:
        self.job, self.reserved = job, None
        with contextlib.suppress(OSError):  # if the process is dead, `receive` will tell
            self.connection.send(job)

    def receive(self) -> str | None:
        """What the process says, or None if it has ended; called when there is one or the other."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def leave(self) -> None:
        """Have the process end in the ordinary way, whatever it is at."""
        if (pid := self.process.pid) is not None and self.process.is_alive():
            os.kill(pid, LEAVE)

    def end(self, seconds: float = 10) -> int | None:
        """See to it that the process ends; its exit code."""
        self.connection.close()  # an idle one ends by that
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _death(code: int | None) -> str:
    how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
    hint = ", often since memory ran out: try fewer workers" if code == -signal.SIGKILL else ""
    return f"the process of this run died ({how}{hint})"
