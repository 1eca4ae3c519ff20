"""`--config FILE.toml`: the options of a command from a file, under those of the command line.

The keys are the names of the options, with - or _: `batch-size = 32`, `depths = [2, 8]`, `save-model = false`. Paths
are read as on the command line: from the folder where the command runs, not from that of the file.
"""

from __future__ import annotations

import re
import tomllib
import typing
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

import typer

from resformer.errors import unknown

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text"}
NATIVE: dict[Any, tuple[type, ...]] = {float: (int, float), Path: (str,)}  # what TOML has for them


def read_options(path: Path, command: Any) -> dict[str, Any]:
    """The values of a TOML file by the name of the parameter of this command that each is for.

    command: as typer made it, whose function says by its annotations what each option takes.

    Raises a ValueError, with the line, for what is no TOML, an option that the command has not (with the nearest names)
    or that is there twice, and for a value of another type; an OSError if the file cannot be read.
    """
    text, given = read_toml(path)
    hints = typing.get_type_hints(command.callback)
    known = {
        name.removeprefix("--"): parameter.name
        for parameter in command.params
        if parameter.name in hints and parameter.name != "config"
        for name in parameter.opts
        if name.startswith("--")
    }
    values: dict[str, Any] = {}
    for key, value in given.items():
        option = key.replace("_", "-")
        where = f"{path}{_line(text, key)}"
        if option not in known:
            raise unknown("option", option, known, of=where)
        if known[option] in values:
            raise ValueError(f"option {option!r} is twice in {where}, with - and with _; keep one")
        values[known[option]] = checked(option, value, hints[known[option]], where)
    return values


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file, and what it says. Raises a ValueError for what is none, an OSError as it comes."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no UTF-8 text (byte {error.start}); TOML files are") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{str(path)!r} is no TOML file: {error}") from None


def checked(option: str, value: Any, hint: Any, where: str) -> Any:
    """The value, if it is of the type; else a ValueError."""
    if (wanted := misfit(value, hint)) is None:
        return value
    raise ValueError(f"option {option!r} of {where} must be {wanted}, got {value!r}")


def misfit(value: Any, hint: Any) -> str | None:
    """What is wanted in place of a value that is not of the type; None for one that is."""
    if NoneType in typing.get_args(hint):  # X | None
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not NoneType)
    if typing.get_origin(hint) is list:
        (kind,) = typing.get_args(hint)
        fits = isinstance(value, list) and value and all(_is(one, kind) for one in value)
        return None if fits else f"a list, each of it {WORDS[kind]}"
    return None if _is(value, hint) else WORDS[hint]


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, NATIVE.get(kind, (kind,))) and (kind is bool or not isinstance(value, bool))


def _line(text: str, key: str) -> str:
    """ ", line N" of a key or table, or nothing where it is written in a way not looked for."""
    written = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    number = next((number for number, line in enumerate(text.splitlines(), 1) if written.match(line)), None)
    return f", line {number}" if number else ""


def _fill(context: typer.Context, path: Path | None) -> Path | None:
    """The values of the file become the defaults of this call: also of options that have to be given."""
    if path is not None:
        context.default_map = read_options(path, context.command)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,  # before the others ask for their defaults
        callback=_fill,
        help="TOML file with options of this command; those given here go before. Its paths start from here.",
    ),
]
