"""Advice on a scheme for a depth: the predictors on untrained nets of every scheme, ordered where that is known to
tell anything."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev

import torch
from scipy.stats import rankdata

from resformer.advice.calibration import Calibration
from resformer.advice.predictors import PREDICTORS, at_start
from resformer.data.tasks import TASKS
from resformer.errors import unknown
from resformer.files import finite, write_text_atomically
from resformer.schemes import schemes
from resformer.spelling import parse_scheme
from resformer.study.plan import WEIGHT_INITS, Condition, Run
from resformer.study.settings import Settings
from resformer.support import refusal

MEASURED = (*PREDICTORS, "gradient_rate")
RATE = 1e-3  # a run has a learning rate; nothing here depends on it


@dataclass(frozen=True)
class Row:
    """One scheme: what was measured of it, a number a seed, and its place."""

    scheme: str
    values: dict[str, list[float]]
    rank: int | None = None  # 1: least likely to fail; by the mean over the seeds. None where nothing is ranked
    best: int | None = None  # of the ranks that single seeds give
    worst: int | None = None
    fails: float | None = None  # share of the seeds beyond the threshold of the rule; None without one

    def mean(self, name: str) -> float:
        return fmean(self.values[name])

    def deviation(self, name: str) -> float | None:
        """Over the seeds; None for a single one, or where one is infinite."""
        own = self.values[name]
        return stdev(own) if len(own) > 1 and all(map(math.isfinite, own)) else None


@dataclass(frozen=True)
class Advice:
    """What was measured of each scheme at a depth, and how well such measurements are known to tell how training ends.

    rows          of every scheme that can serve the family, in their order of rank, or by name where nothing is ranked
    refused       the others, with the reason
    calibration   that the order is by; None where there is none
    """

    settings: Settings
    depth: int
    weight_init: str
    task: str
    seeds: int
    rows: list[Row]
    refused: dict[str, str]
    calibration: Calibration | None = None

    @property
    def ranked(self) -> bool:
        """Only by a rule that was shown to predict, and from the weight initialisation that it was tested at."""
        found = self.calibration
        if found is None or found.conditions.get("weight_init", self.weight_init) != self.weight_init:
            return False
        return found.test.predicts and (found.test.orders or found.rule.threshold is not None)

    def to_json(self) -> str:
        content = {
            "model": {"family": self.settings.family, "depth": self.depth, "width": self.settings.width}
            | {"heads": self.settings.heads, "ffn_ratio": self.settings.ffn_ratio, "weight_init": self.weight_init},
            "task": self.task,
            "seeds": self.seeds,
            "predictors": PREDICTORS,
            "ranked": self.ranked,
            "schemes": [asdict(row) for row in self.rows],
            "refused": self.refused,
            "calibration": None if self.calibration is None else asdict(self.calibration),
        }
        return json.dumps(finite(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """A line for each scheme and seed."""
        out = StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["scheme", "rank", "best", "worst", "seed", *MEASURED])
        for row in self.rows:
            for seed in range(self.seeds):
                own = (row.values[name][seed] for name in MEASURED)
                writer.writerow([row.scheme, row.rank, row.best, row.worst, seed, *own])
        return out.getvalue()

    def save(self, folder: str | Path) -> list[Path]:
        """Write advice.json, advice.csv and advice.svg into a folder, made where it is not there; their paths."""
        from resformer.advice.shown import picture

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"json": self.to_json(), "csv": self.to_csv(), "svg": picture(self)}
        for ending, text in texts.items():
            write_text_atomically(folder / f"advice.{ending}", text)
        return [folder / f"advice.{ending}" for ending in texts]


def advise(
    settings: Settings,
    depth: int,
    *,
    weight_init: str = "xavier",
    task: str = "sentiment",
    chosen: Sequence[str] = (),
    seeds: int = 3,
    calibration: Calibration | None = None,
    workers: int | None = None,
    done: Callable[[int, int], None] = lambda number, of: None,
) -> Advice:
    """Measure `at_start` on the net of each scheme and seed, and rank the schemes where the calibration allows it.

    settings      family and sizes of the model, and the folder of the task's data
    chosen        schemes, written as in a study; none for all that can serve the family
    calibration   as `read_calibration` gives it. Schemes are ranked by its rule where that predicted training losses
                  at the depth it was tested at, from the same weight initialisation: rank by the mean over seeds, and
                  the best and worst rank that a single seed gives. Where it told failing nets from others and no more,
                  schemes of either kind share a rank. Otherwise nothing is ranked
    workers       processes at a time, by default one a core
    done          called with the number of nets that are measured, and of all

    Raises a `ValueError` for sizes, names and counts that cannot be, before anything is measured.
    """
    for name, value in (("depth", depth), ("seeds", seeds), ("workers", workers)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if weight_init not in WEIGHT_INITS:
        raise unknown("weight_init", weight_init, WEIGHT_INITS)
    if task not in TASKS:
        raise unknown("task", task, TASKS, hint="`resformer data` lists them.")
    if settings.model is not None:
        raise ValueError("advice is on nets with fresh weights; leave the model out, and give family, width and depth")
    asked = list(dict.fromkeys(chosen)) or sorted(schemes())
    refused = _refused(settings.family, asked, strict=bool(chosen))
    runs = {
        (scheme, seed): Run(Condition(scheme, depth, task, weight_init), seed, RATE, settings=settings)
        for seed in range(seeds)
        for scheme in asked
        if scheme not in refused
    }
    found: dict[str, dict[int, dict[str, float]]] = {}
    for number, ((scheme, seed), values) in enumerate(_measured(runs, workers), start=1):
        if isinstance(values, str):
            if chosen:
                raise ValueError(values)
            refused[scheme] = values
        else:
            found.setdefault(scheme, {})[seed] = values
        done(number, len(runs))
    rows = [
        Row(scheme, {name: [found[scheme][seed][name] for seed in range(seeds)] for name in MEASURED})
        for scheme in asked
        if scheme not in refused
    ]
    if not rows:
        raise ValueError(f"no scheme can be measured here: {next(iter(refused.values()))}")
    advice = Advice(settings, depth, weight_init, task, seeds, rows, refused, calibration)
    if calibration is None or not advice.ranked:
        return advice
    return replace(advice, rows=ranked(rows, calibration))


def ranked(rows: Sequence[Row], calibration: Calibration) -> list[Row]:
    """The rows by rank, equal values with the same one: by the predictor, or by whether it foretells failure alone."""
    rule, bad = calibration.rule, calibration.rule.badness
    if not calibration.test.orders:
        bad = lambda value: float(bool(rule.fails(value)))
    values = [[bad(value) for value in row.values[rule.predictor]] for row in rows]
    mean = rankdata([fmean(own) for own in values], method="min")
    single = [rankdata(column, method="min") for column in zip(*values, strict=True)]
    placed = []
    for number, row in enumerate(rows):
        fails = [rule.fails(value) for value in row.values[rule.predictor]]
        share = None if rule.threshold is None else fmean(bool(one) for one in fails)
        own = [int(ranks[number]) for ranks in single]
        placed.append(Row(row.scheme, row.values, int(mean[number]), min(own), max(own), share))
    return sorted(placed, key=lambda row: (row.rank, row.scheme))


def _refused(family: str, asked: Sequence[str], *, strict: bool) -> dict[str, str]:
    """The schemes that cannot serve a family, with the reason; of those that were asked for by name, an error."""
    found = {}
    for text in asked:
        name, _ = parse_scheme(text)
        if name not in schemes():
            raise unknown("scheme", name, schemes(), listed="resformer schemes")
        if reason := refusal(family, name, "paper"):
            if strict:
                raise ValueError(reason)
            found[text] = reason
    return found


def _measured(
    runs: dict[tuple[str, int], Run], workers: int | None
) -> Iterator[tuple[tuple[str, int], dict[str, float] | str]]:
    """Each run with its numbers, or why there are none, in any order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, max(1, len(runs)))
    if workers == 1:
        for key, run in runs.items():
            yield key, _one(run)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_one, run): key for key, run in runs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _one(run: Run) -> dict[str, float] | str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum is the same everywhere
    try:
        return at_start(run)
    except ValueError as error:
        return str(error)
    finally:
        torch.set_num_threads(threads)
