"""Options that take several values."""

from __future__ import annotations

LISTS = (
    "--schemes",
    "--depths",
    "--tasks",
    "--learning-rates",
    "--weight-inits",
    "--corpus",
    "--validation",
    "--track",
    "--measure",
)


def spread(arguments: list[str]) -> list[str]:
    """`--depths 2 8 32` as `--depths 2 --depths 8 --depths 32`, which is the only form that click reads."""
    result: list[str] = []
    option = None
    for argument in (part for whole in arguments for part in _parted(whole)):
        if argument.startswith("--"):
            option = argument if argument in LISTS else None
            if option is None:
                result.append(argument)
        elif option is None:
            result.append(argument)
        else:
            result += [option, argument]
    return result


def _parted(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name in LISTS else [argument]
