"""What a study will take, before it runs: its cells, its runs, time and disk. Steps are tried, nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from resformer.study.plan import Run, Study, arm
from resformer.study.pretraining import Encoder
from resformer.study.results import Result, read_result
from resformer.study.run import HELD_OUT, encoder_parts, parts
from resformer.study.selection import chosen
from resformer.train.finetune import finetuning
from resformer.train.pretrain import pretraining
from resformer.train.progress import duration
from resformer.train.rehearsal import Rehearsal, rehearse

A_RUN, A_STEP, A_WEIGHT = 30_000, 130, 4  # bytes: of a run's small files, of a line of its log, of a saved weight
Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """Runs of one kind: how many, how many of them are there, and the seconds that each takes by itself."""

    name: str
    planned: int
    there: int
    seconds: float  # of those that are missing
    bytes: float  # of those that are missing


@dataclass(frozen=True)
class Forecast:
    """`seconds` of a run by what is compared and the depth, mean over tasks and weight initialisations."""

    study: Study
    stages: tuple[Stage, ...]
    seconds: Mapping[tuple[str, int], float]
    workers: int

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
        yield ""
        table = Table("seconds a run", *(f"depth {depth}" for depth in depths), box=None, padding=(0, 2, 0, 0))
        for name in arms:
            known = [self.seconds.get((name, depth)) for depth in depths]
            table.add_row(name, *("" if one is None else f"{one:,.0f}" for one in known))
        yield table
        yield ""
        stages = Table("runs", "planned", "there", "missing", "time", box=None, padding=(0, 2, 0, 0))
        for one in self.stages:
            missing = one.planned - one.there
            stages.add_row(one.name, f"{one.planned:,}", f"{one.there:,}", f"{missing:,}", duration(one.seconds))
        yield stages
        total = sum(one.seconds for one in self.stages)
        size = sum(one.bytes for one in self.stages) / 1e6
        yield ""
        yield (
            f"About {duration(total)} of work, {duration(total / self.workers)} with {self.workers} "
            f"worker{'s' * (self.workers > 1)}, and {max(1, math.ceil(size)):,} MB of disk. These are training steps, "
            "timed one at a time: reading data, building models and evaluating come on top, a second or two a run at "
            "the least, and workers that share cores or memory are slower."
        )


def forecast(study: Study, output: Path, *, workers: int, say: Say = lambda text: None) -> Forecast:
    """What `study`, looked up by `resolve`, will take beyond what is in `output`.

    The seconds of a run are those of finished runs of its cell where there are some; else two steps are taken at the
    least and the greatest depth, and the depths between follow by a straight line. Reading data, building models and
    evaluating are not in it.
    """

    def look(run: Run | Encoder) -> Result:
        return read_result(Path(output) / "runs" / run.id)

    conditions = study.conditions()
    tuning = [run for condition in conditions for run in study.tuning(condition)]
    reported = study.runs(chosen(study, look))
    encoders = study.encoders()
    timed = _Timed([*encoders, *reported], Path(output), say)
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
            seconds = [timed(run) for run in missing]
            size = sum(timed.bytes(run) for run in missing)
            stages.append(Stage(name, len(runs), len(runs) - len(missing), sum(seconds), size))
    times: dict[tuple[str, int], list[float]] = {}
    for condition in conditions:
        run = next(run for run in reported if run.condition == condition)
        times.setdefault((arm(vars(condition)), condition.depth), []).append(timed(run))
    return Forecast(study, tuple(stages), {cell: fmean(values) for cell, values in times.items()}, workers)


class _Timed:
    """The seconds that a run takes, measured once for each kind of run; `runs` holds one of each kind and more."""

    def __init__(self, runs: Sequence[Run | Encoder], output: Path, say: Say):
        self.output, self.say = output, say
        self.runs = {_kind(run): run for run in reversed(runs)}
        self.known: dict[tuple[Any, ...], list[float]] = {}  # kind -> seconds of finished runs
        self.tried: dict[tuple[Any, ...], tuple[float, float]] = {}  # kind -> seconds and bytes of a run

    def learn(self, results: Mapping[Any, Result]) -> None:
        for run, result in results.items():
            if result.finished and "seconds" in result.cost:
                self.known.setdefault(_kind(run), []).append(result.cost["seconds"])

    def __call__(self, run: Run | Encoder) -> float:
        known = self.known.get(_kind(run))
        return fmean(known) if known else self._between(run)[0]

    def bytes(self, run: Run | Encoder) -> float:
        return self._between(run)[1]

    def _between(self, run: Run | Encoder) -> tuple[float, float]:
        """From runs of the least and the greatest depth there are, by a straight line over depth."""
        *same, depth = _kind(run)
        depths = sorted(kind[-1] for kind in self.runs if list(kind[:-1]) == same)
        low, high = ((end, *self._try((*same, end))) for end in (depths[0], depths[-1]))
        share = (depth - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
        return low[1] + share * (high[1] - low[1]), low[2] + share * (high[2] - low[2])

    def _try(self, kind: tuple[Any, ...]) -> tuple[float, float]:
        if kind not in self.tried:
            run = self.runs[kind]
            self.say(f"timing two steps: {run}")
            with torch.random.fork_rng(devices=[]):
                found = _rehearsal(run, self.output)
            steps = found.config["steps"]
            saved = A_WEIGHT * found.plan.parameters if isinstance(run, Encoder) else 0
            self.tried[kind] = steps * found.seconds, A_RUN + A_STEP * steps + saved
        return self.tried[kind]


def _kind(run: Run | Encoder) -> tuple[Any, ...]:
    """What decides how long a run takes, its depth last."""
    return (run.condition.task, run.condition.scheme, run.condition.extra_ffn > 0, run.condition.depth)


def _rehearsal(run: Run | Encoder, output: Path) -> Rehearsal:
    if isinstance(run, Encoder):
        model, tokenizer, packed, training = encoder_parts(run)
        job = pretraining(model, tokenizer, packed, training, held_out=HELD_OUT)
    else:
        model, tokenizer, task, data, training = parts(replace(run, learning_rate=run.learning_rate or 1e-4))
        job = finetuning(model, tokenizer, task, data, training, max_length=run.settings.max_length)
    return rehearse(model, job, output / "runs" / "rehearsal", training)
