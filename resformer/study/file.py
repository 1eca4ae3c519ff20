"""A study as a user writes it: a TOML file, options of the command line, a protocol under both."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from resformer.configfile import checked, read_toml
from resformer.errors import unknown
from resformer.study.plan import Study
from resformer.study.pretraining import Pretraining
from resformer.study.problems import Problem, Problems
from resformer.study.resolve import Say, resolve
from resformer.study.settings import Settings, protocol

AXES = tuple(one.name for one in fields(Study) if one.name not in ("settings", "pretraining", "facts"))
SETTINGS = tuple(one.name for one in fields(Settings))
# What an axis holds in TOML.
KINDS = {"schemes": list[str], "depths": list[int], "tasks": list[str], "learning_rates": list[float],
         "weight_inits": list[str], "seeds": int, "baseline": str, "controls": bool, "endpoint": str,
         "protocol": str} | get_type_hints(Settings)  # fmt: skip
TABLE = "pretraining"  # with the fields of `Pretraining`
TABLE_KINDS = get_type_hints(Pretraining) | {"corpus": list[str]}


def read_study(path: Path | None, given: Mapping[str, Any] | None = None, say: Say | None = None) -> Study:
    """The study of a TOML file, looked up (see `resolve`), with what is `given` besides before what the file says.

    Keys are the names of the fields of `Study` and `Settings`, with - or _, "protocol", and the table "pretraining"
    with those of `Pretraining`. Raises one `ValueError` for all that is wrong, each with its line or option; an
    `OSError` if the file cannot be read.
    """
    text, content = ("", {}) if path is None else read_toml(path)
    given = {key.replace("-", "_"): value for key, value in (given or {}).items()}
    problems, values = Problems(), dict[str, Any]()
    values[TABLE] = _pretraining(content.pop(TABLE, None), str(path), problems)
    for key, value in ({key.replace("-", "_"): value for key, value in content.items()} | given).items():
        try:
            if key not in KINDS:
                raise unknown("key", key, KINDS)
            values[key] = value if key in given else checked(key, value, KINDS[key], str(path))
        except ValueError as error:
            problems.say(key, value, str(error))
    try:
        under = protocol(values.pop("protocol", "controlled"))
        values = {key: value for key, value in under.items() if key != "epochs" or "steps" not in values} | values
    except ValueError as error:
        problems.say("protocol", values.get("protocol"), str(error))
    for name in ("schemes", "tasks", *(("depths",) if "model" not in values else ())):
        if name not in values and not any(problem.key == name for problem in problems.found):
            problems.say(name, None, f"{name}: give at least one")
    sound = _sound(values, problems)
    try:
        study = resolve(sound, say) if sound else None
    except Problems as error:
        problems.found += error.found
    if problems or study is None:
        _tell(problems, path, text, given)
    return study


def _pretraining(table: Any, path: str, problems: Problems) -> Pretraining | None:
    """What the table says, without what is wrong in it; None where there is no table, or no sound one."""
    if table is None:
        return None
    if not isinstance(table, dict):
        problems.say(TABLE, table, f"{TABLE} must be a table, [{TABLE}], got {table!r}")
        return None
    values, own = {}, Problems()
    for key, value in table.items():
        try:
            if key not in TABLE_KINDS:
                raise unknown("key", key, TABLE_KINDS, of=f"[{TABLE}]")
            values[key] = checked(key, value, TABLE_KINDS[key], path)
        except ValueError as error:
            own.say(key, value, str(error))
    if "corpus" not in values and not own:
        own.say("corpus", None, f"[{TABLE}] needs corpus, the text: files, folders or patterns")
    found = None
    try:
        found = Pretraining(**values) if "corpus" in values else None
    except Problems as error:
        own.found += error.found
    problems.found += [Problem(f"{TABLE}.{one.key}", one.value, one.text) for one in own.found]
    return found


def _sound(values: dict[str, Any], problems: Problems) -> Study | None:
    """A study of what is sound in the values; what is not is added to the problems. None if nothing is left."""
    while values:  # again without what was wrong, until nothing is
        try:
            own = {key: value for key, value in values.items() if key in AXES}
            lists = {key: tuple(value) for key, value in own.items() if isinstance(value, list)}
            settings = Settings(**{key: value for key, value in values.items() if key in SETTINGS})
            return Study(**({"depths": ()} | own | lists), settings=settings, pretraining=values.get(TABLE))
        except Problems as error:
            problems.found += error.found
            before, values = values, _without(values, error.found)
            if values == before:
                return None
        except TypeError:  # an axis that has to be there is not
            return None
    return None


def _without(values: dict[str, Any], wrong: list[Problem]) -> dict[str, Any]:
    left = dict(values)
    for problem in wrong:
        value = left.get(problem.key)
        if isinstance(value, list | tuple) and problem.value in value and len(value) > 1:
            left[problem.key] = [one for one in value if one != problem.value]
        else:
            left.pop(problem.key, None)
    return left


def _tell(problems: Problems, path: Path | None, text: str, given: Mapping[str, Any]) -> NoReturn:
    """Raise one `ValueError`, a line for each problem, with the place it comes from."""
    ordered = sorted(problems.found, key=lambda problem: _line(text, problem) or 0)
    lines = list(dict.fromkeys(f"{_where(problem, path, text, given)}{problem.text}" for problem in ordered))
    if len(lines) == 1:
        raise ValueError(lines[0])
    raise ValueError("\n  ".join([f"{len(lines)} things are wrong with this study:", *lines]))


def _where(problem: Problem, path: Path | None, text: str, given: Mapping[str, Any]) -> str:
    if problem.key in given:
        return f"--{problem.key.replace('_', '-')}: "
    number = _line(text, problem)
    return f"{path}, line {number}: " if number else f"{path}: " if path else ""


def _line(text: str, problem: Problem) -> int | None:
    """The line of the value, or else that of the key; None where the key is not there."""
    lines = text.splitlines()
    table, _, name = problem.key.rpartition(".")
    header = rf"\s*\[{table}\]" if table or problem.key == TABLE else None
    begin = 0 if header is None else next((n for n, line in enumerate(lines) if re.match(header, line)), 0)
    key = re.compile(rf"""\s*["']?{re.escape(name).replace("_", "[_-]")}["']?\s*=""")
    first = next((number for number, line in enumerate(lines) if number >= begin and key.match(line)), None)
    if first is None and header is not None:
        return begin + 1
    if first is None:
        return None
    values = {json.dumps(problem.value, default=str), f"'{problem.value}'"}
    for number, line in enumerate(lines[first:], first):
        if number > first and re.match(r"\s*[\w\"'-]+\s*=", line):
            break  # of the next key
        if any(re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", line) for value in values):
            return number + 1
    return first + 1
