"""Running claims: each with seeds 0, 1, ..., in one process a core, and the same figures however many there are."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from resformer.theory.claim import Claim, Measured, Verdict, claims, find_claim, judge


@dataclass(frozen=True)
class Outcome:
    """A claim with what was measured, and the processor seconds that took."""

    claim: Claim
    measured: Measured
    verdicts: list[Verdict]
    seconds: float

    @property
    def expected(self) -> bool:
        return all(verdict.expected for verdict in self.verdicts)


def run_claim(name: str, seeds: int | None = None) -> Outcome:
    """Measure and judge one claim with its own number of seeds, or another one, on one torch thread.

    The tolerances are for the claim's own number: with fewer seeds a true law can fail.
    """
    claim = find_claim(name)
    count = claim.seeds if seeds is None else seeds
    if type(count) is not int or count < 1:
        raise ValueError(f"seeds must be a whole number of at least 1, got {seeds!r}")
    return _judged(claim, *_measure(name, count))


def run_claims(
    names: Sequence[str] = (), *, workers: int | None = None, done: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """The outcomes of these claims, or of all, in the order of the registry.

    Args:
        names: of claims; none for all. workers: processes at a time, by default one a core.
        done: called with each outcome as it comes, which is in any order.

    Raises a ValueError for a name that is not known, before any work starts.
    """
    if workers is not None and (type(workers) is not int or workers < 1):
        raise ValueError(f"workers must be a whole number of at least 1, got {workers!r}")
    wanted = {find_claim(name).name for name in names}
    chosen = [name for name in claims() if name in wanted or not names]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(chosen))
    outcomes = {}
    for name, measured, seconds in _run(chosen, workers):
        outcomes[name] = _judged(find_claim(name), measured, seconds)
        done(outcomes[name])
    return [outcomes[name] for name in chosen]


def _run(names: Sequence[str], workers: int) -> Iterator[tuple[str, Measured, float]]:
    if workers == 1:
        for name in names:
            yield name, *_measure(name, find_claim(name).seeds)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        slowest_first = sorted(names, key=lambda name: -find_claim(name).seconds)
        futures = {pool.submit(_measure, name, find_claim(name).seeds): name for name in slowest_first}
        for future in as_completed(futures):
            yield futures[future], *future.result()


def _measure(name: str, seeds: int) -> tuple[Measured, float]:
    threads, begun = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)  # the order of a sum is the same everywhere
    try:
        return find_claim(name).measure(range(seeds)), time.process_time() - begun
    finally:
        torch.set_num_threads(threads)


def _judged(claim: Claim, measured: Measured, seconds: float) -> Outcome:
    return Outcome(claim, measured, judge(claim.laws, measured.values), seconds)
