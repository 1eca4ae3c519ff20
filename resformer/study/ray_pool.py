"""The runs of a study on a Ray cluster, or on one machine by a Ray of its own. Needs `pip install resformer[ray]`.

All nodes see the study's folder under one path, on a shared disk: what there is of a study is there, and Ray remembers
nothing. So nodes, workers and the process that started the study may die; what they were at is run again.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from resformer.study.pool import Job, died
from resformer.study.worker import Function, Slot, Unit, attempt, prepared, record, smaller

RETRIES = 3  # of a run whose process or node died; one that raises is not tried again
# Seconds that a run may still be held by a process that is ending, since its driver was killed; or, since its node
# died, by a shared disk that waits for the node to come back, as NFS does for 90.
PATIENCE, PATIENCE_AFTER_DEATH = 30.0, 180.0
POLL = 10.0  # seconds after which the size of the cluster is looked at again


class RayPool:
    """Carries out runs as tasks of Ray, each in a process of its own; to be closed.

    workers   how many runs at a time; None: one per GPU of the cluster, or per core where it has none
    address   of a cluster, or "auto"; None: a Ray is started on this machine, and ended with the study
    """

    def __init__(self, function: Function | str, workers: int | None = None, address: str | None = None):
        if find_spec("ray") is None:
            raise ValueError("executor 'ray' needs Ray: pip install resformer[ray]; or take executor 'local'")
        self.function, self.count, self.address = function, workers, address
        self.started = False  # a Ray that is to be ended by us
        self.flying: dict[Any, Job] = {}
        self.deaths: Counter[Unit] = Counter()

    @cached_property
    def ray(self) -> Any:
        import ray

        if not ray.is_initialized():
            own: dict[str, Any] = {} if self.address else {"include_dashboard": False}
            try:
                _check_reachable(self.address)
                ray.init(address=self.address, log_to_driver=False, logging_level="warning", **own)
            except OSError as error:
                raise ValueError(f"no Ray cluster at {self.address!r} ({error}); start one by `ray start`") from None
            self.started = True
        return ray

    def carry_out(self, jobs: Iterable[tuple[Unit, Path]]) -> Generator[tuple[Unit, str]]:
        """As `Pool.carry_out`; a run has started when it is given to Ray, which is once there is room for it."""
        todo: deque[Job] = deque((run, directory, None) for run, directory in jobs)
        while todo or self.flying:
            slot, gpus, room = share(self.ray.nodes(), self.count)
            while todo and len(self.flying) < room:
                job = todo.popleft()
                self.flying[self._submit(job, slot, gpus)] = job
                yield job[0], "started"
            for task in self.ray.wait(list(self.flying), timeout=POLL)[0]:
                run, directory, micro = job = self.flying.pop(task)
                try:
                    said = self.ray.get(task)
                except self.ray.exceptions.RayTaskError as error:  # before the run: `attempt` raises nothing
                    said, line = "failed", str(error).strip().splitlines()[-1]
                    record(run, directory, f"the run could not begin on its node: {line}", str(error))
                except self.ray.exceptions.RayError as error:  # its process died, or its node
                    line = str(error).strip().splitlines()[0]
                    said = died(run, directory, self.deaths, RETRIES, f"the process of this run died ({line})")
                if said == "memory":
                    todo.appendleft((run, directory, smaller(run, micro)))
                if said == "died":
                    todo.appendleft(job)
                yield run, said

    def _submit(self, job: Job, slot: Slot, gpus: int) -> Any:
        # A process for each run, so that what one leaves behind, in memory too, does not touch another.
        task = self.ray.remote(num_cpus=slot.threads, num_gpus=gpus, max_retries=0, max_calls=1)(_carry_out)
        patience = PATIENCE_AFTER_DEATH if self.deaths[job[0]] else PATIENCE
        return task.remote(self.function, slot, patience, *job)

    def close(self) -> None:
        """End what is not finished."""
        for task in self.flying:
            self.ray.cancel(task, force=True)
        self.flying.clear()
        if self.started:
            self.ray.shutdown()


def share(nodes: list[dict[str, Any]], workers: int | None) -> tuple[Slot, int, int]:
    """What each run gets of the nodes that are alive, as `ray.nodes()` tells: its slot, its GPUs, and how many runs
    there are at a time. Where there are GPUs a run gets one, with as many cores as fall to it on every node."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    graphic = [node for node in alive if node.get("GPU", 0) >= 1]
    if graphic:
        threads = max(1, int(min(node.get("CPU", 1) // node["GPU"] for node in graphic)))
        room = sum(int(node["GPU"]) for node in graphic)
        return Slot(threads), 1, min(room, workers or room)
    cores = [int(node.get("CPU", 0)) for node in alive if node.get("CPU", 0) >= 1]
    if not cores:
        return Slot(1), 0, 1
    threads = 1 if workers is None else max(1, min(sum(cores) // workers, *cores))
    room = sum(each // threads for each in cores)
    return Slot(threads), 0, min(room, workers or room)


def _check_reachable(address: str | None) -> None:
    """Raise `OSError` if nothing listens at HOST:PORT: Ray itself would be minutes about it, and end the process."""
    host, _, port = (address or "").rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _carry_out(
    function: Function | str, slot: Slot, patience: float, run: Unit, directory: Path, micro_batch_size: int | None
) -> str:
    threading.Thread(target=_end_with_node, daemon=True).start()
    return attempt(prepared(function, slot), run, directory, micro_batch_size, patience)


def _end_with_node() -> None:
    """End this process when that of its node does, which Ray leaves to the end of the task."""
    node = os.getppid()
    while os.getppid() == node:
        time.sleep(1)
    os._exit(1)
