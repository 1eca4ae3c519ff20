"""Which runs stand together: what makes a place in a table, and what sets the settings of a report apart."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from resformer.spelling import parse_scheme
from resformer.study.identity import PLACES
from resformer.study.plan import BASELINES, STATIC, arm
from resformer.study.results import Result
from resformer.study.settings import OF_A_NEW_MODEL
from resformer.study.summary import Setting

# Entries of a run's config that are no condition: axes of a study, what is chosen or made for each cell, and where
# things lie.
AXES = ("scheme", "extra_ffn", "depth", "task", "seed", "learning_rate", "tuning", "encoder", *PLACES)
OF_NEW_WEIGHTS = (*OF_A_NEW_MODEL, "weight_init", "init")  # what a checkpoint brings or decides


def conditions(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config has to be equal where runs are averaged or compared over seeds and depths.

    A width that follows from `match_parameters` is none of it; of files only the first digits of their sha256 are.
    """
    found = {key: value for key, value in config.items() if key not in AXES}
    if "match_parameters" in found:
        del found["width"]
    digits = {key: str(found.pop(key))[:8] for key in ("model_sha256", "rows_sha256") if found.get(key)}
    return found | {key.removesuffix("_sha256"): value for key, value in digits.items()}


def place(config: Mapping[str, Any]) -> str:
    """Of the cell that a run belongs to: one for each arm, depth and task under the same conditions.

    The units of a wider feed-forward may change from one study to the next, as the schemes do that they stand for.
    """
    cell = [config["task"], arm(config), config["depth"]]
    return json.dumps([*cell, conditions(config)], sort_keys=True)


def is_control(config: Mapping[str, Any]) -> bool:
    """Whether a run is of a negative control: more parameters alone, or a scheme that means nothing."""
    return bool(config.get("extra_ffn")) or parse_scheme(config["scheme"])[0] == STATIC


def split(
    results: Sequence[Result], schemes: Sequence[str] = (), tasks: Sequence[str] = (), baseline: str | None = None
) -> list[Setting]:
    """The results by setting, those with the most cells first, then by task; schemes and tasks in the order given,
    others after them by name, controls last.

    A condition that is tied to depth (one value at each depth) does not set settings apart, since the curves
    over depth would fall apart: `tied` names such, and the report tells.
    """
    settings = []
    for task in _order(tasks, (run.config["task"] for run in results)):
        runs = [run for run in results if run.config["task"] == task]
        keys = _telling(runs)
        groups: dict[tuple[Any, ...], list[Result]] = {}
        for run in runs:
            known = conditions(run.config)
            groups.setdefault(tuple(known.get(key) for key in keys), []).append(run)
        for values in sorted(groups, key=lambda values: [(value is None, str(value)) for value in values]):
            own = tuple(groups[values])
            names = _order(schemes, (arm(run.config) for run in own))
            main = next((name for name in (baseline, *BASELINES) if name in names), None)
            checks = {arm(run.config) for run in own if is_control(run.config)} - {main}
            controls = tuple(name for name in names if name in checks)
            arms = (*(name for name in names if name not in checks), *controls)
            settings.append(Setting(task, dict(zip(keys, values, strict=True)), arms, controls, main, own))
    return sorted(settings, key=lambda setting: -len({(arm(r.config), r.config["depth"]) for r in setting.runs}))


def _order(wanted: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    there = set(names)
    return (*(name for name in dict.fromkeys(wanted) if name in there), *sorted(there - set(wanted)))


def _telling(runs: Sequence[Result]) -> list[str]:
    """The conditions that set runs of a task apart. Of what goes with a checkpoint or its absence, that alone."""
    keys = [key for key in varying(runs) if not _tied(key, runs, "depth")]
    return [key for key in keys if not ("model" in keys and key in OF_NEW_WEIGHTS and _tied(key, runs, "model"))]


def varying(runs: Sequence[Result]) -> list[str]:
    """The conditions in which runs differ."""
    known = [conditions(run.config) for run in runs]
    keys = dict.fromkeys(key for one in known for key in one)
    return [key for key in keys if len({_text(one.get(key)) for one in known}) > 1]


def tied(runs: Sequence[Result]) -> list[str]:
    """Those of `varying` that have one value at each depth: a change of depth changes them too."""
    return [key for key in varying(runs) if _tied(key, runs, "depth")]


def _tied(key: str, runs: Sequence[Result], other: str) -> bool:
    """Whether a condition has one value for each value of another, or of the depth."""
    found: dict[str, set[str]] = {}
    for run in runs:
        known = conditions(run.config) | {"depth": run.config["depth"]}
        found.setdefault(_text(known.get(other)), set()).add(_text(known.get(key)))
    return all(len(values) == 1 for values in found.values())


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
