"""Which runs a report is about: those that the studies of a folder plan as things stand, read from disk.

A folder in which somebody kept study.json and the result.json files alone is read like the one they were made in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from resformer.study.plan import Condition, Run, Study, arm
from resformer.study.pretraining import Encoder
from resformer.study.results import Result, read_result, read_study
from resformer.study.selection import Choice, choices, chosen


@dataclass(frozen=True)
class Reading:
    """The runs that are reported on and those that chose their learning rates, finished or not."""

    entries: list[dict[str, Any]]  # of study.json, oldest first
    studies: list[Study]  # of the entries
    runs: list[Result]  # reported on, each with the config that was planned
    choices: dict[Condition, Choice]  # what the tuning runs found, also where it is not complete
    encoders: list[Result]  # that the study pre-trains for its runs
    other_rates: int  # finished runs at learning rates that are not, or no longer, chosen
    replaced: int  # finished runs whose place a later study of the folder took

    @property
    def study(self) -> Study:
        """The one whose endpoint and baseline count: that which was planned last."""
        return self.studies[-1]

    @property
    def tuning(self) -> list[Result]:
        return [result for choice in self.choices.values() for result in choice.results.values()]


def read_runs(output: Path) -> Reading:
    """The runs of the studies in a folder. Raises `ValueError` if it holds none, or one of another version.

    Of runs of one scheme, depth, task, initialisation and seed those of the study that was planned last count.
    """
    entries = read_study(output)
    if not entries:
        raise ValueError(f"{str(output)!r} lists no studies in study.json; run `resformer compare` into it")
    studies = [Study.read(entry["study"]) for entry in entries]
    encoders = {encoder.id: encoder for study in studies for encoder in study.encoders()}
    look = partial(_look, Path(output) / "runs", encoders)
    planned: dict[tuple[Any, ...], Run] = {}
    tuned: dict[tuple[Any, ...], tuple[Condition, Choice]] = {}
    for study in studies:
        runs_now = study.runs(chosen(study, look))
        rates = {_place(run.condition): run.learning_rate for run in runs_now}
        # A cell is run at one learning rate: those of an earlier study at another are not of it any more.
        planned = {
            place: run
            for place, run in planned.items()
            if rates.get(place[:-1], run.learning_rate) == run.learning_rate
        }
        planned |= {(*_place(run.condition), run.seed): run for run in runs_now}
        tuned |= {_place(condition): (condition, choice) for condition, choice in choices(study, look).items()}
    runs = [look(run) for run in planned.values()]
    shown = {run.id for run in planned.values()}
    other_rates, replaced = _left_out(Path(output) / "runs", shown, runs)
    pretrained = [read_result(Path(output) / "runs" / name) for name in encoders]
    return Reading(entries, studies, runs, dict(tuned.values()), pretrained, other_rates, replaced)


def _place(condition: Condition) -> tuple[Any, ...]:
    """Where a condition stands in the tables; the units of a wider feed-forward may change between studies."""
    c = condition
    return c.scheme, bool(c.extra_ffn), c.depth, c.task, c.weight_init


def _look(folder: Path, encoders: Mapping[str, Encoder], run: Run) -> Result:
    """A run as it stands on disk, with the config that was planned, which one that has not started has not there, and
    how its encoder was pre-trained, which the encoder's id would hide."""
    config = run.config
    if run.encoder is not None:
        given, corpus = encoders[run.encoder].pretraining, str(encoders[run.encoder].corpus_sha256)[:8]
        size = f"{given.steps} steps of {given.batch_size} x {given.length} tokens"
        config["pretraining"] = f"{size} of corpus {corpus}, learning rate {given.learning_rate:g}"
    return replace(read_result(folder / run.id), config=config)


def _left_out(folder: Path, shown: set[str], runs: list[Result]) -> tuple[int, int]:
    """How many finished runs are not shown: at another learning rate than one that is, and for any other reason."""
    known = {_without_rate(run.config) for run in runs}
    others = (read_result(path) for path in sorted(folder.glob("*")) if path.is_dir() and path.name not in shown)
    reported = [other for other in others if other.finished and other.config.get("tuning") is False]
    rates = sum(_without_rate(other.config) in known for other in reported)
    return rates, len(reported) - rates


def _without_rate(config: dict[str, Any]) -> tuple[Any, ...]:
    return arm(config), *(str(config.get(key)) for key in ("depth", "task", "weight_init", "seed", "steps", "width"))
