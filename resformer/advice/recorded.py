"""The calibration on a recorded study, and as it is kept: what the runs began with, measured again, and their ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from resformer.advice.calibration import Calibration, HeldOut, Point, Rule, calibrate
from resformer.advice.predictors import PREDICTORS, at_start, fresh
from resformer.diagnostics.token_cosine import token_cosine
from resformer.files import finite, write_json_atomically
from resformer.provenance import provenance
from resformer.study.apart import split
from resformer.study.plan import Run
from resformer.study.reading import read_runs
from resformer.study.results import Result, run_of
from resformer.study.run import LOOKED_AT, looked_at
from resformer.study.summary import FAILING, Cell, Setting

VERSION = 1
OURS = "calibration.json"  # in this package: of scripts/studies/depth_x_scheme
CLOSE = 1e-3  # how near a token cosine has to be to the recorded one for the net to be the same
KEPT = ("resformer", "torch", "transformers", "numpy", "git", "dirty", "finished")  # of where it was made
CONDITIONS = ("family", "width", "ffn_ratio", "weight_init", "steps", "batch_size", "schedule", "warmup")


def calibrate_study(
    study: Path, data: str | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """What `calibrate` finds in a study's folder: its runs' nets are made again from their configurations, measured
    before training, and set against the recorded training losses and failures.

    data: folder of the tasks' data, where it is not what the runs name. Arms that are controls of other sizes are left
    out, and so are settings that lack the study's greatest depth. A run that diverged counts with the loss of a
    constant guess. Returns what `write_calibration` keeps.

    Raises a `ValueError` where the net that is made again is not the recorded one, for runs from trained weights, and
    for what `calibrate` refuses.
    """
    settings = split(read_runs(study).runs)
    depth = max((setting.deepest for setting in settings), default=0)
    settings = [setting for setting in settings if setting.deepest == depth]
    cells = [
        (setting, cell)
        for setting in settings
        for cell in setting.cells.values()
        if cell.finished and not any(run.config.get("extra_ffn") for run in cell.runs)
    ]
    total, points, done = sum(len(cell.finished) for _, cell in cells), [], 0
    for setting, cell in cells:
        alone = sum(setting.task == other.task for other in settings) == 1
        points.append(_point(setting.task if alone else _label(setting), cell, data))
        done += len(cell.finished)
        say(f"{done} of {total} nets measured ({cell.arm}, depth {cell.depth}, {setting.task})")
    found = calibrate(points, np.random.default_rng(0))
    config = cells[0][1].finished[0].config
    return {
        "version": VERSION,
        **asdict(replace(found, conditions={name: config[name] for name in CONDITIONS if name in config})),
        "points": [asdict(point) for point in points],
        "provenance": {name: value for name, value in provenance().items() if name in KEPT},
    }


def _label(setting: Setting) -> str:
    return " ".join([setting.task, *(f"{name}={value}" for name, value in setting.differs.items())])


def _point(task: str, cell: Cell, data: str | None) -> Point:
    measured = [at_start(_run(run, data)) for run in cell.finished]
    return Point(
        task,
        cell.depth,
        cell.arm,
        {name: [one[name] for one in measured] for name in PREDICTORS},
        list(cell.values("train_loss").values()),
        fmean(outcome in FAILING for outcome in cell.outcomes),
    )


def _run(result: Result, data: str | None) -> Run:
    """The run of a result, checked to begin with the recorded net."""
    run = run_of(result.config)
    assert run is not None, result.directory  # `read_result` has seen to it
    if data is not None:
        run = replace(run, settings=replace(run.settings, data=data))
    recorded = result.diagnostics.get("token_cosine")
    if recorded is None:
        return run
    model, tokenizer, task, rows = fresh(run)
    batch = looked_at(tokenizer, task, rows, LOOKED_AT)
    again = token_cosine(model, {name: value for name, value in batch.items() if name != "labels"})
    if abs(again - recorded) > CLOSE:
        raise ValueError(
            f"{run}: the net made again has token cosine {again:.4g}, the recorded one {recorded:.4g}; calibrate with "
            "the version of resformer that ran the study, and with its data"
        )
    return run


def write_calibration(path: Path, record: dict[str, Any]) -> None:
    """As JSON; infinite predictors as null."""
    write_json_atomically(path, finite(record))


def read_calibration(path: Path | None = None) -> Calibration | None:
    """One that was written; without a path that which comes with resformer, or None where there is none. Raises a
    `ValueError` for a file that is none."""
    if path is None:
        ours = files("resformer.advice") / OURS
        if not ours.is_file():
            return None
        text, name = ours.read_text(encoding="utf-8"), OURS
    else:
        try:
            text, name = path.read_text(encoding="utf-8"), str(path)
        except OSError as error:
            raise ValueError(f"calibration {str(path)!r} cannot be read: {error.strerror}") from None
    try:
        record = json.loads(text)
        assert record["version"] == VERSION
        rule, test = Rule(**record["rule"]), record["test"]
        held = HeldOut(**test | {"schemes": tuple(test["schemes"]), "tasks": tuple(test["tasks"])})
        return Calibration(tuple(record["chosen_on"]), record["seeds"], rule, held, dict(record["conditions"]))
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(f"{name!r} is no calibration; `resformer study calibrate STUDY` makes one") from None
