"""A study as a user writes it: a TOML file, options of the command line, a protocol under both."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from resformer.configfile import misfit, read_toml
from resformer.errors import unknown
from resformer.study.plan import Study
from resformer.study.pretraining import Pretraining
from resformer.study.problems import Problem, Problems
from resformer.study.resolve import Say, resolve
from resformer.study.settings import OF_A_NEW_MODEL, Settings, protocol

AXES = tuple(one.name for one in fields(Study) if one.name not in ("settings", "pretraining", "facts"))
SETTINGS = tuple(one.name for one in fields(Settings))
OF_THE_COMMAND = ("output", "workers", "executor", "address", "shard", "dry_run")
TABLE = "pretraining"  # with the fields of `Pretraining`
# What the keys hold in TOML.
KINDS = {"schemes": list[str], "depths": list[int], "tasks": list[str], "learning_rates": list[float],
         "weight_inits": list[str], "seeds": int, "baseline": str, "controls": bool, "endpoint": str,
         "protocol": str, TABLE: dict} | get_type_hints(Settings)  # fmt: skip
TABLE_KINDS = get_type_hints(Pretraining) | {"corpus": list[str]}
# In place of an axis of which nothing is left, so that the rest can be looked at.
STAND_INS = {"schemes": ("identity",), "depths": (1,), "tasks": ("sentiment",)}
# What is not looked at without the other: it may well fit that once it is mended.
RESTS_ON = {"width": "heads", "schemes": "baseline"}
HEADER = re.compile(r"\s*\[+\s*([\w\"'.-]+)\s*\]+\s*(#.*)?")
KEY = re.compile(r"\s*([\w\"'.-]+)\s*=")


def read_study(path: Path | None, given: Mapping[str, Any] | None = None, say: Say | None = None) -> Study:
    """The study of a TOML file, looked up (see `resolve`), with what is `given` besides before what the file says.

    Keys are the names of the fields of `Study` and `Settings`, with - or _, "protocol", and the table "pretraining"
    with those of `Pretraining`. Raises one `ValueError` for all that is wrong, each with its line or option; an
    `OSError` if the file cannot be read.
    """
    text, content = ("", {}) if path is None else read_toml(path)
    given = {key.replace("-", "_"): value for key, value in (given or {}).items()}
    problems = Problems()
    values = _typed(content, KINDS, problems) | given
    if table := values.pop(TABLE, None):
        values |= _pretraining(table, problems)
    for key in OF_A_NEW_MODEL if "model" in values else ():
        if key in values:
            problems.add(key, values.pop(key), "left out where a checkpoint brings the model")
    try:
        under = protocol(values.pop("protocol", "controlled"))
        values = {key: value for key, value in under.items() if key != "epochs" or "steps" not in values} | values
    except ValueError as error:
        problems.say("protocol", (content | given).get("protocol"), str(error))
    for name in ("schemes", "tasks", *(("depths",) if "model" not in values else ())):
        if name not in values and not any(problem.key == name for problem in problems.found):
            problems.say(name, None, f"{name}: give at least one")
    sound, study = _sound(values, problems), None
    try:
        study = resolve(sound, None if problems else say)
    except Problems as error:
        problems.found += error.found
    if problems or study is None:
        _tell(problems, path, text, given)
    return study


def _typed(content: Mapping[str, Any], kinds: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """What is of its type, and of a list that which is; what is not is added to the problems."""
    found: dict[str, Any] = {}
    for written, value in content.items():
        key = written.replace("-", "_")
        kind = kinds.get(key)
        if key in OF_THE_COMMAND:
            problems.say(key, value, f"{key} is said on the command line, --{key.replace('_', '-')}, not in the file")
        elif kind is None:
            problems.say(key, value, str(unknown("key", written, kinds)))
        elif key in found:
            problems.say(key, value, f"{key} is there twice, with - and with _; keep one")
        elif kind is dict:
            if isinstance(value, dict):
                found[key] = value
            else:
                problems.add(key, value, f"a table, [{key}]")
        elif get_origin(kind) is list and isinstance(value, list):
            problems.unless(bool(value), key, value, "a list of at least one")
            (member,) = get_args(kind)
            for one in value:
                problems.unless((wanted := misfit(one, member)) is None, key, one, str(wanted))
            if fine := [one for one in value if misfit(one, member) is None]:
                found[key] = fine
        elif wanted := misfit(value, kind):
            problems.add(key, value, wanted)
        else:
            found[key] = value
    return found


def _pretraining(table: dict[str, Any], problems: Problems) -> dict[str, Pretraining]:
    """What the table says, without what is wrong in it; nothing where there is no corpus left."""
    own = Problems()
    values = _typed(table, TABLE_KINDS, own)
    if "corpus" not in values and not any(problem.key == "corpus" for problem in own.found):
        own.say("corpus", None, "corpus, the text, is missing: give files, folders or patterns")
    found = None
    while found is None:
        try:
            found = Pretraining(**({"corpus": ("text",)} | values))
        except Problems as error:
            own.found += error.found
            values = _without(values, error.found)
    problems.found += [Problem(f"{TABLE}.{one.key}", one.value, f"[{TABLE}] {one.text}") for one in own.found]
    return {TABLE: found} if "corpus" in values else {}


def _sound(values: dict[str, Any], problems: Problems) -> Study:
    """A study of what is sound in the values; what is not is added to the problems."""
    while True:  # again without what was wrong, until nothing is
        own = {key: value for key, value in values.items() if key in AXES}
        if "model" in values:
            own = {"depths": ()} | own
        lists = {key: tuple(value) for key, value in own.items() if isinstance(value, list)}
        try:
            settings = Settings(**{key: value for key, value in values.items() if key in SETTINGS})
            return Study(**(STAND_INS | own | lists), settings=settings, pretraining=values.get(TABLE))
        except Problems as error:
            problems.found += error.found
            values = _without(values, error.found)


def _without(values: dict[str, Any], wrong: list[Problem]) -> dict[str, Any]:
    left = dict(values)
    for problem in wrong:
        value = left.get(problem.key)
        if isinstance(value, list | tuple) and problem.value in value and len(value) > 1:
            last = max(place for place, one in enumerate(value) if one is problem.value or one == problem.value)
            left[problem.key] = [*value[:last], *value[last + 1 :]]  # where there are two, one may do
        else:
            left.pop(problem.key, None)
        left.pop(RESTS_ON.get(problem.key, ""), None)
    assert left != values, wrong
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
    """The line of the value, or else that of its key, or else that of its table; None where there is none of them."""
    above = problem.key.rpartition(".")[0]
    values = {json.dumps(problem.value, default=str), f"'{problem.value}'"}
    table, of_table, of_key = "", None, None
    for number, line in enumerate(text.splitlines(), 1):
        begins = HEADER.fullmatch(line) or KEY.match(line)
        if begins and of_key:
            break
        if begins:
            name = re.sub("[\"']", "", begins[1]).replace("-", "_")
            if begins.re is HEADER:
                table = name
            elif table:
                name = f"{table}.{name}"
            if name == problem.key:
                of_key = number
            elif name == above:
                of_table = of_table or number
        if of_key and any(re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", line) for value in values):
            return number
    return of_key or of_table
