"""What a study will take, before it runs: its cells, its runs, time and disk, and how little its pairs can show.

Parts of runs are tried, nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import DatasetDict
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from resformer.study.plan import Run, Study, arm
from resformer.study.pretraining import Encoder
from resformer.study.results import Result, check_output, read_result
from resformer.study.run import (
    HELD_OUT,
    at_initialisation,
    encoder_parts,
    encoding,
    examples,
    parts,
    prepare_text,
    vocabulary,
)
from resformer.study.selection import chosen
from resformer.study.stats import FEWEST, detectable
from resformer.train.finetune import finetuning
from resformer.train.pretrain import pretraining
from resformer.train.progress import duration
from resformer.train.rehearsal import rehearse

A_RUN, A_STEP, A_WEIGHT = 30_000, 130, 4  # bytes: of a run's small files, of a line of its log, of a saved weight
EVALUATED = 256  # examples of each split, at most, on which evaluation is timed
ALPHA, POWER = 0.05, 0.8
Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """Runs of one kind: how many, how many of them are there, and what the others take."""

    name: str
    planned: int
    there: int
    perhaps: int  # there as well, if their learning rate is the one that will be chosen
    seconds: float  # of those that are missing
    bytes: float  # of those that are missing


@dataclass(frozen=True)
class Forecast:
    """`seconds` of a run by what is compared and the depth, mean over tasks and weight initialisations."""

    study: Study
    stages: tuple[Stage, ...]
    seconds: Mapping[tuple[str, int], float]
    workers: int
    shard: tuple[int, int] | None = None  # (i, n): of piece i of n alone

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        study, conditions = self.study, self.study.conditions()
        arms = list(dict.fromkeys(arm(vars(one)) for one in conditions))
        depths = sorted(study.depths)
        many = f" x {len(study.weight_inits)} weight initialisations" if len(study.weight_inits) > 1 else ""
        yield (
            f"{len(conditions)} cells: {len(arms)} schemes and controls x depths {', '.join(map(str, depths))} x "
            f"{', '.join(study.tasks)}{many}; {study.seeds} seeds each. Declared: {study.endpoint} against "
            f"{study.baseline}."
        )
        if self.shard:
            i, n = self.shard
            yield f"Of piece {i} of {n}, which has {len(study.piece(i, n))} of them:"
        yield ""
        table = Table("seconds a run", *(f"depth {depth}" for depth in depths), box=None, padding=(0, 2, 0, 0))
        for name in arms:
            known = [self.seconds.get((name, depth)) for depth in depths]
            table.add_row(name, *("" if one is None else f"{one:,.{int(one < 10)}f}" for one in known))
        yield table
        yield ""
        stages = Table("runs", "planned", "there", "missing", "time", box=None, padding=(0, 2, 0, 0))
        for one in self.stages:
            missing = one.planned - one.there
            there, left = f"{one.there:,}", f"{missing:,}"
            if one.perhaps:
                there, left = f"{there} to {one.there + one.perhaps:,}", f"{missing - one.perhaps:,} to {left}"
            stages.add_row(one.name, f"{one.planned:,}", there, left, duration(one.seconds))
        yield stages
        total = sum(one.seconds for one in self.stages)
        size = sum(one.bytes for one in self.stages) / 1e6
        yield ""
        at_most = "At most about" if any(one.perhaps for one in self.stages) else "About"
        yield (
            f"{at_most} {duration(total)} of work, {duration(total / self.workers)} with {self.workers} "
            f"worker{'s' * (self.workers > 1)}, and {max(1, math.ceil(size)):,} MB of disk. Timed here, one at a time: "
            "two training steps of a run, and what it does besides (encoding its data, building and looking at its "
            "model, evaluating). Not timed: starting the workers and reading the data, once for each. Workers that "
            "share cores or memory are slower."
        )
        yield ""
        yield power(study)


def power(study: Study) -> str:
    """How large a difference to the baseline has to be to be found, in standard deviations of a paired difference."""
    n, tests = study.seeds, sum(arm(vars(one)) != study.baseline for one in study.conditions())
    alone, among = detectable(1.0, n, POWER, ALPHA), detectable(1.0, n, POWER, ALPHA / max(1, tests))
    if alone is None or among is None:
        return f"With {n} seed{'s' * (n > 1)} no difference is tested: that takes {FEWEST} pairs."
    text = f"{n} pairs: a difference is detected (power {POWER:g}) from {alone:.2g} of its standard deviations on"
    return f"{text}; with Holm over {tests} comparisons from {among:.2g}." if tests > 1 else f"{text}."


def forecast(
    study: Study,
    output: Path,
    *,
    workers: int,
    shard: tuple[int, int] | None = None,
    say: Say = lambda text: None,
) -> Forecast:
    """What `study`, looked up by `resolve`, will take beyond what is in `output`.

    Of a `shard`, as `execute` takes it, that of its conditions alone.

    The seconds of a run are those of training and those of what it does besides, at the least and the greatest depth;
    the depths between follow by a straight line. Training is that of finished runs of the cell where there are some,
    else two steps are taken. Where a learning rate is yet to be chosen, runs that are there at any of the grid are
    counted apart.

    Raises `ValueError` if `output` holds something else than a study, or one that is damaged.
    """
    check_output(output)

    def look(run: Run | Encoder) -> Result:
        return read_result(output / "runs" / run.id)

    conditions = study.piece(*shard) if shard else study.conditions()
    tuning = [run for condition in conditions for run in study.tuning(condition)]
    own = set(conditions)
    reported = [run for run in study.runs(chosen(study, look)) if run.condition in own]
    encoders = study.encoders(conditions)
    timed = _Timed([*encoders, *reported], output, say)
    stages: list[Stage] = []
    kinds: tuple[tuple[str, list[Any]], ...] = (
        ("pre-training", encoders),
        ("learning rates", tuning),
        ("reported", reported),
    )
    for name, runs in kinds:
        results = {run: look(run) for run in runs}
        timed.learn(results)
        if runs:
            missing = [run for run, result in results.items() if not result.finished]
            perhaps = sum(
                any(look(replace(run, learning_rate=rate)).finished for rate in study.learning_rates)
                for run in missing
                if isinstance(run, Run) and run.learning_rate is None
            )
            seconds = [timed(run) for run in missing]
            size = sum(timed.bytes(run) for run in missing)
            stages.append(Stage(name, len(runs), len(runs) - len(missing), perhaps, sum(seconds), size))
    times: dict[tuple[str, int], list[float]] = {}
    for condition in conditions:
        run = next(run for run in reported if run.condition == condition)
        times.setdefault((arm(vars(condition)), condition.depth), []).append(timed(run))
    return Forecast(study, tuple(stages), {cell: fmean(values) for cell, values in times.items()}, workers, shard)


@dataclass(frozen=True)
class _Tried:
    """A run of which parts were tried."""

    training: float  # seconds of all its steps
    besides: float  # seconds
    bytes: float

    def between(self, other: _Tried, share: float) -> _Tried:
        """On the straight line from here to another."""
        return _Tried(*(one + share * (vars(other)[name] - one) for name, one in vars(self).items()))


class _Timed:
    """The seconds that a run takes, measured once for each kind of run; `runs` holds one of each kind and more."""

    def __init__(self, runs: Sequence[Run | Encoder], output: Path, say: Say):
        self.output, self.say = output, say
        self.runs = {_kind(run): run for run in reversed(runs)}
        self.known: dict[tuple[Any, ...], list[float]] = {}  # kind -> seconds of training of finished runs
        self.tried: dict[tuple[Any, ...], _Tried] = {}  # by kind

    def learn(self, results: Mapping[Any, Result]) -> None:
        for run, result in results.items():
            if result.finished and "seconds" in result.cost:
                self.known.setdefault(_kind(run), []).append(result.cost["seconds"])

    def __call__(self, run: Run | Encoder) -> float:
        known, like = self.known.get(_kind(run)), self._between(run)
        return (fmean(known) if known else like.training) + like.besides

    def bytes(self, run: Run | Encoder) -> float:
        return self._between(run).bytes

    def _between(self, run: Run | Encoder) -> _Tried:
        """From runs of the least and the greatest depth there are, by a straight line over depth."""
        *same, depth = _kind(run)
        depths = [kind[-1] for kind in self.runs if list(kind[:-1]) == same]
        low, high = min(depths), max(depths)
        share = (depth - low) / (high - low) if high > low else 0.0
        return self._try((*same, low)).between(self._try((*same, high)), share)

    def _try(self, kind: tuple[Any, ...]) -> _Tried:
        if kind not in self.tried:
            run = self.runs[kind]
            self.say(f"timing parts of a run: {run}")
            with torch.random.fork_rng(devices=[]):
                self.tried[kind] = _tried(run, self.output)
        return self.tried[kind]


def _kind(run: Run | Encoder) -> tuple[Any, ...]:
    """What decides how long a run takes, its depth last."""
    return (run.condition.task, run.condition.scheme, run.condition.extra_ffn > 0, run.condition.depth)


def _tried(run: Run | Encoder, output: Path) -> _Tried:
    """All that a run does before its first step, two steps, and an evaluation."""
    more = 1.0  # times as many examples are evaluated
    if isinstance(run, Encoder):
        prepare_text(run.pretraining)  # as it is in a worker that has run another
        started = time.perf_counter()
        model, tokenizer, packed, training = encoder_parts(run)
        job = pretraining(model, tokenizer, packed, training, held_out=HELD_OUT)
    else:
        settings = run.settings
        examples(run.condition.task, settings.data, settings.train_size, run.tuning)
        if settings.model is None:
            vocabulary(run.condition.task, settings.data, settings.max_length)
        started = time.perf_counter()
        model, tokenizer, task, data, training = parts(replace(run, learning_rate=run.learning_rate or 1e-4))
        splits = {name: data[name] for name in task.splits if name in data}
        few = {name: rows.select(range(min(EVALUATED, len(rows)))) for name, rows in splits.items()}
        more = sum(map(len, splits.values())) / sum(map(len, few.values()))
        data = DatasetDict(few, train=data["train"])
        job = finetuning(model, tokenizer, task, data, training, max_length=settings.max_length, encode=encoding(run))
        at_initialisation(model, tokenizer, task, data)
    before = time.perf_counter() - started
    found = rehearse(model, job, output / "runs" / "rehearsal", training)
    started = time.perf_counter()
    with job.around():
        job.evaluate(model)
    after = more * (time.perf_counter() - started)
    steps = found.config["steps"]
    saved = A_WEIGHT * found.plan.parameters if isinstance(run, Encoder) else 0
    return _Tried(steps * found.seconds, before + after, A_RUN + A_STEP * steps + saved)
