"""Which runs a report is about: those that the studies of a folder plan as things stand, read from disk.

A folder in which somebody kept study.json and the result.json files alone is read like the one they were made in.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from resformer.study.apart import place
from resformer.study.plan import Run, Study
from resformer.study.pretraining import Encoder, Pretraining
from resformer.study.results import Result, read_result, read_study, run_id
from resformer.study.selection import Choice, choices, chosen
from resformer.study.worker import running


@dataclass(frozen=True)
class Reading:
    """The runs that are reported on and those that chose their learning rates, finished or not."""

    folder: Path
    entries: list[dict[str, Any]]  # of study.json, oldest first
    studies: list[Study]  # of the entries
    runs: list[Result]  # reported on, each with the config that was planned; of two settings, if two share it
    choices: list[Choice]  # what the tuning runs of each cell found, also where it is not complete
    encoders: list[Result]  # that the study pre-trains for its runs
    other_rates: int  # finished runs at learning rates that are not, or no longer, chosen
    unplanned: int  # finished runs that no study of the folder plans as things stand
    not_counted: list[Result]  # with a result.json that is damaged or of another run, planned or not
    moved: list[Path]  # results that did not count, and were moved aside when their runs were made again

    @property
    def study(self) -> Study:
        """The one whose endpoint and baseline count: that which was planned last."""
        return self.studies[-1]

    @cached_property
    def reported(self) -> list[Result]:
        """The runs that are reported on, each once."""
        return _each_once(self.runs)

    @cached_property
    def tuning(self) -> list[Result]:
        return _each_once([result for choice in self.choices for result in choice.results.values()])

    @cached_property
    def under_way(self) -> int:
        """Runs that a process is at just now."""
        unfinished = [run for run in (*self.encoders, *self.tuning, *self.reported) if not run.finished]
        return sum(running(run.directory) for run in unfinished)


def read_runs(output: Path) -> Reading:
    """The runs of the studies in a folder. Raises `ValueError` if it holds none, or one of another version.

    Studies under different conditions stand side by side. Under the same ones a later study adds to the cells of an
    earlier one, and where it runs a cell in another way, at another learning rate say, it takes the cell over.
    """
    entries = read_study(output)
    studies = [Study.read(entry["study"]) for entry in entries]
    folder = Path(output) / "runs"
    encoders = {encoder.id: encoder for study in studies for encoder in study.encoders()}
    read = cache(lambda name: read_result(folder / name))

    def look(run: Run) -> Result:
        """As it stands on disk, with the config that was planned, which one that has not started has not there."""
        return replace(read(run.id), config=_told(encoders, run))

    planned: dict[tuple[str, int], Run] = {}  # by place and seed
    tuned: dict[str, Choice] = {}  # by place
    for study in studies:
        now = {(place(_told(encoders, run)), run.seed): run for run in study.runs(chosen(study, look))}
        ways = {where: _way(run) for (where, _), run in now.items()}
        rates = {where: run.learning_rate for (where, _), run in now.items()}
        planned = {key: run for key, run in planned.items() if ways.get(key[0]) in (None, _way(run))} | now
        tuned = {where: choice for where, choice in tuned.items() if rates.get(where, choice.rate) == choice.rate}
        for choice in choices(study, look).values():
            tuned[place(next(iter(choice.results.values())).config)] = choice
    there = [read(path.name) for path in sorted(folder.glob("*")) if path.is_dir()]
    other_rates, unplanned = _left_out(there, planned.values())
    return Reading(
        Path(output),
        entries,
        studies,
        [look(run) for run in planned.values()],
        list(tuned.values()),
        [read(name) for name in encoders],
        other_rates,
        unplanned,
        [result for result in there if result.problem],
        sorted(folder.glob("*/rejected-*.json")),
    )


def _told(encoders: Mapping[str, Encoder], run: Run) -> dict[str, Any]:
    """The config of a run with what it does not tell by itself: how its encoder was pre-trained, which the encoder's id
    hides, and that its width is the one with so many parameters."""
    config = run.config
    if run.encoder is not None:
        config["pretraining"] = _pretraining(encoders[run.encoder])
    if run.settings.model is None and run.settings.match_parameters is not None:
        config["match_parameters"] = run.settings.match_parameters
    return config


def _pretraining(encoder: Encoder) -> str:
    """In words; what is as always is left out."""
    given, usual = encoder.pretraining, Pretraining(encoder.pretraining.corpus)
    named = ("corpus", "steps", "batch_size", "length", "learning_rate", "seeds")
    more = {key: value for key, value in asdict(given).items() if key not in named and value != getattr(usual, key)}
    size = f"{given.steps} steps of {given.batch_size} x {given.length} tokens"
    words = f"{size} of corpus {str(encoder.corpus_sha256)[:8]}, learning rate {given.learning_rate:g}"
    return ", ".join([words, *(f"{key.replace('_', ' ')} {value}" for key, value in more.items())])


def _way(run: Run) -> str:
    """What all runs of a cell have in common."""
    return replace(run, seed=0, encoder=None).id


def _left_out(there: Sequence[Result], planned: Iterable[Run]) -> tuple[int, int]:
    """How many finished runs are not shown: at another learning rate than one that is, and for any other reason."""
    runs = list(planned)
    shown, known = {run.id for run in runs}, {_way(replace(run, learning_rate=None)) for run in runs}
    others = [result for result in there if result.finished and result.directory.name not in shown]
    reported = [result for result in others if result.config.get("tuning") is False]
    any_rate = {"learning_rate": None, "seed": 0, "encoder": None}
    rates = sum(run_id(result.config | any_rate) in known for result in reported)
    return rates, len(reported) - rates


def _each_once(results: Sequence[Result]) -> list[Result]:
    return list({result.directory: result for result in results}.values())
