"""The report as one JSON document: every number and sentence that the page, the Markdown and the tables show.

Version 1. `estimate` stands for {"mean", "n", "sd", "low", "high"}, the last three null below 3 seeds; what is not
known is null.

    version, title, endpoint ("score" | "train_loss"), endpoints {name: words}, overview, claims [text]
    coverage    {planned, finished, diverged, failed, missing, under_way, not_counted [{run, problem}], moved [path],
                tuning {planned, finished}, encoders {...}, other_rates, unplanned}
    arms        [{name, control, baseline, equation}] in the order of tables and legends
    settings    [{title, task, endpoint, differs, where, claims, certainty, definition, collapse, baseline, depths,
                arms, guess {score, loss, threshold},
                reach       [{arm, depth, words}]
                cells       [{arm, depth, state, verdict, planned, finished, score estimate, train_loss estimate,
                            seeds [{seed, status, score, train_loss}], failures {failed, n, low, high},
                            learning_rates [rate], token_cosine [value of a seed], gradient_norms [median of a layer],
                            cost {name: mean}}]
                comparisons [{arm, depth, endpoint, primary, gap estimate, detectable, p, adjusted, stars, verdict,
                            unequal, sentence}]    arm - baseline; adjusted: Holm's where primary, else BH
                interactions [{arm, slope estimate or null, resolved_from, found}]
                against_controls [{arm, control, depth, gap estimate, sentence}]    at a level for all pairs together
                learning_rates [{arm, depth, values {rate: score, or loss, on the slice}, diverged [rate], chosen,
                            edge, best, drop, at_edge, complete}]
                speed       {target, words, fractions, cells [{arm, depth, at [estimate], median, reached, n}]}
                curves      [{arm, depth, seed, status, points [[step, loss]]}]
                failures    [{arm, depth, what, detail, runs [{id, traceback}]}]
                runs        [rows of results.csv]}]
    across      [{title, tasks, arm, depth, statistic, value {value, low, high, runs}, gap or null}], and
                across_note
    caveats     [text]
    protocol    {shared {key: value}, varied {key: [value]}, made_with {key: [value]}, commands [text]}
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resformer.files import finite
from resformer.study import findings, sureness
from resformer.study.across import FEWEST_TASKS, across
from resformer.study.aggregate import FEWEST_FOR_BOOTSTRAP, Aggregate
from resformer.study.apart import split
from resformer.study.caveats import caveats
from resformer.study.comparisons import Comparison, against_controls, compare, interactions
from resformer.study.coverage import coverage_sentence
from resformer.study.layers import outside_layers
from resformer.study.plan import arm
from resformer.study.rates import Grid, bounded, grids
from resformer.study.reading import Reading, read_runs
from resformer.study.records import (
    cell_record,
    comparison_record,
    estimate_record,
    failure_records,
    grid_record,
    row,
)
from resformer.study.results import Result
from resformer.study.speed import FRACTIONS, speeds, target
from resformer.study.stats import FEWEST, comparison
from resformer.study.summary import Setting
from resformer.study.words import joined

VERSION = 1
Document = dict[str, Any]


def study_document(output: Path) -> Document:
    """Of the study in a folder. Raises `ValueError` if there is none."""
    reading = read_runs(output)
    schemes = [scheme for study in reading.studies for scheme in study.schemes]
    tasks = [task for study in reading.studies for task in study.tasks]
    settings = split(reading.runs, schemes, tasks, reading.study.baseline)
    endpoint = reading.study.endpoint
    tried = [grids(setting, reading) for setting in settings]
    comparisons = compare(settings, endpoint)
    finished = [run for run in reading.runs if run.finished]
    document = {
        "version": VERSION,
        "title": "Residual schemes over depth",
        "endpoint": endpoint,
        "endpoints": findings.ENDPOINT,
        "overview": findings.overview(settings) if len(settings) > 1 else None,
        "claims": [text for text in _claims(settings, comparisons, endpoint) if text],
        "coverage": _coverage(reading),
        "arms": _arms(settings, finished),
        "settings": [
            _setting(setting, endpoint, own, [test for test in comparisons if test.setting == position])
            for position, (setting, own) in enumerate(zip(settings, tried, strict=True))
        ],
        **_across(settings, endpoint),
        "caveats": caveats(settings, reading, tried),
        "protocol": _protocol(reading, finished),
    }
    return finite(document)


def _claims(settings: Sequence[Setting], comparisons: Sequence[Comparison], endpoint: str) -> Iterator[str]:
    if len(settings) > 1:
        yield from sureness.controls_overview(settings, endpoint)
    yield sureness.against_baseline(comparisons, settings)
    if len(settings) > 1:
        yield sureness.seeds(settings)


def _setting(setting: Setting, endpoint: str, tried: Sequence[Grid], tests: Sequence[Comparison]) -> Document:
    reach = {name: findings.reach(setting, name) for name in setting.arms}
    goal, outside = target(setting), outside_layers(setting)
    arms = sorted(setting.arms, key=lambda name: (name in setting.controls, -setting.learns_to(name)))
    return {
        "title": findings.title(setting),
        "task": setting.task,
        "endpoint": endpoint,
        "differs": setting.differs,
        "where": findings.where(setting),
        "claims": findings.claims(setting, endpoint),
        "certainty": [text for text in (*sureness.certainty(setting, endpoint), bounded(tried)) if text],
        "definition": findings.definition(setting),
        "collapse": findings.collapse(setting),
        "baseline": setting.baseline,
        "depths": list(setting.depths),
        "arms": arms,
        "guess": {**asdict(setting.chance), "threshold": setting.chance.threshold},
        "reach": [{"arm": name, "depth": depth, "words": words} for name, (depth, words) in reach.items()],
        "cells": [cell_record(setting.cells[name, depth], outside) for name in arms for depth in setting.depths],
        "comparisons": [comparison_record(test) for test in tests],
        "interactions": [
            {"arm": i.arm, "slope": estimate_record(i.slope), "resolved_from": i.resolved_from, "found": i.found}
            for i in interactions(setting, endpoint)
        ],
        "against_controls": [
            {
                "arm": arm,
                "control": control,
                "depth": against.depth,
                "gap": estimate_record(gap),
                "sentence": comparison(gap),
            }
            for against in filter(None, [against_controls(setting, endpoint)])
            for (arm, control), gap in against.gaps.items()
        ],
        "learning_rates": [grid_record(grid) for grid in tried],
        "speed": {
            "target": goal and goal.loss,
            "words": goal and goal.words,
            "fractions": list(FRACTIONS),
            "cells": [
                {
                    "arm": speed.cell.arm,
                    "depth": speed.cell.depth,
                    "at": [estimate_record(value) for value in speed.at],
                    "median": speed.median,
                    "reached": speed.reached,
                    "n": len(speed.runs),
                }
                for speed in speeds(setting)
            ],
        },
        "curves": [
            {
                "arm": arm(run.config),
                "depth": run.config["depth"],
                "seed": run.config["seed"],
                "status": run.status,
                "points": run.loss_curve,
            }
            for run in setting.finished
            if run.loss_curve
        ],
        "failures": [failure for cell in setting.cells.values() for failure in failure_records(cell)],
        "runs": [row(run, setting) for run in setting.runs],
    }


def _coverage(reading: Reading) -> Document:
    runs, tuning = reading.reported, reading.tuning
    return {
        "planned": len(runs),
        "finished": sum(run.finished for run in runs),
        "diverged": sum(run.status == "diverged" for run in runs),
        "failed": sum(run.status == "failed" for run in runs),
        "missing": sum(run.status == "unfinished" for run in runs),
        "under_way": reading.under_way,
        "not_counted": [{"run": result.directory.name, "problem": result.problem} for result in reading.not_counted],
        "moved": [str(path.relative_to(reading.folder)) for path in reading.moved],
        "tuning": {"planned": len(tuning), "finished": sum(run.finished for run in tuning)},
        "encoders": {
            "planned": len(reading.encoders),
            "finished": sum(encoder.finished for encoder in reading.encoders),
        },
        "other_rates": reading.other_rates,
        "unplanned": reading.unplanned,
    }


def _arms(settings: Sequence[Setting], finished: Sequence[Result]) -> list[Document]:
    known = {arm(run.config): run.diagnostics["equation"] for run in finished if "equation" in run.diagnostics}
    names = dict.fromkeys(name for setting in settings for name in setting.arms)
    controls = {name for setting in settings for name in setting.controls}
    return [
        {
            "name": name,
            "control": name in controls,
            "baseline": any(name == setting.baseline for setting in settings),
            "equation": known.get(name),
        }
        for name in sorted(names, key=controls.__contains__)
    ]


def _across(settings: Sequence[Setting], endpoint: str) -> Document:
    found = across(settings, endpoint)
    note = "0 is the constant guess of a task and 1 a perfect score, or a training loss of 0."
    few = [entry for entry in found if entry.value.tasks < FEWEST_TASKS]
    if few:
        note += (
            f" Of fewer than {FEWEST_TASKS} tasks: the mean over tasks and seeds, all tasks with the same weight, with "
            f"its 95% Student-t interval over seeds from {FEWEST} on. It is of these tasks, and no sample of tasks."
        )
    if len(few) < len(found):
        note += " Interquartile mean: of the middle half of all values of an arm, seeds and tasks pooled."
        if any(e.value.runs >= FEWEST_FOR_BOOTSTRAP for e in found if e.value.tasks >= FEWEST_TASKS):
            note += f" {coverage_sentence()}"
        else:
            note += f" Below {FEWEST_FOR_BOOTSTRAP} seeds it has no interval."

    def shown(value: Aggregate) -> Document:
        return {"value": value.value, "low": value.low, "high": value.high, "runs": value.runs}

    entries = [
        {
            "title": ", ".join([joined(e.tasks), *e.apart]),
            "tasks": list(e.tasks),
            "arm": e.arm,
            "depth": e.depth,
            "statistic": e.statistic,
            "value": shown(e.value),
            "gap": e.gap and shown(e.gap),
        }
        for e in found
    ]
    return {"across": entries, "across_note": note if entries else None}


def _protocol(reading: Reading, finished: Sequence[Result]) -> Document:
    configs = {
        key: sorted(values, key=lambda value: (value is None, isinstance(value, str), value))
        for key, values in _values([run.config for run in reading.runs]).items()
    }
    made = _values([run.provenance for run in finished])
    times = sorted(made.pop("finished", []))
    if times:
        made["finished"] = list(dict.fromkeys([times[0], times[-1]]))
    return {
        "shared": {key: values[0] for key, values in configs.items() if len(values) == 1 and values[0] is not None},
        "varied": {key: values for key, values in configs.items() if len(values) > 1},
        "made_with": made,
        "commands": list(dict.fromkeys(e["command"] for e in reading.entries if e.get("command"))),
    }


def _values(entries: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """By key, the distinct values in the order they are met."""
    found: dict[str, list[Any]] = {}
    for entry in entries:
        for key, value in entry.items():
            if value not in found.setdefault(key, []):
                found[key].append(value)
    return found
