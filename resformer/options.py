"""Command-line options that follow from the fields of a dataclass: named, typed and explained in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Annotated, Any, get_type_hints

import typer


def option(default: Any, help: str, *names: str) -> Any:
    """A field of a dataclass with its explanation; `names` are further ones on the command line, such as "--lr". A
    default of ... is none: it has to be given."""
    return field(default=MISSING if default is ... else default, metadata={"help": help, "names": names})


def options_of(
    kind: type, *, taken: str, partial: bool = False, positional: tuple[str, ...] = ()
) -> Callable[[Callable], Callable]:
    """A decorator for a command with a parameter called `taken`, of the dataclass `kind`: in its place the command line
    has an option for each field; for those that are `positional` an argument without a name.

    partial: the command gets a dict of those that were given, by name, instead of a `kind`.
    """

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command)
        hints = get_type_hints(command, include_extras=True)
        kinds = get_type_hints(kind)
        members = [_parameter(one, kinds[one.name], partial, one.name in positional) for one in fields(kind)]
        names = [one.name for one in members]

        def called(**given: Any) -> Any:
            found = {name: given.pop(name) for name in names}
            found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
            if partial:
                return command(**given, **{taken: {name: value for name, value in found.items() if value is not None}})
            return command(**given, **{taken: _made(kind, found, positional)})

        others = [
            one.replace(annotation=hints[one.name], kind=one.KEYWORD_ONLY)
            for one in signature.parameters.values()
            if one.name != taken
        ]
        called.__name__, called.__doc__, called.__module__ = command.__name__, command.__doc__, command.__module__
        called.__signature__ = inspect.Signature([*others, *members])  # type: ignore[attr-defined]
        called.__annotations__ = {one.name: one.annotation for one in (*others, *members)}
        return called

    return decorate


def _made(kind: type, found: dict[str, Any], positional: tuple[str, ...]) -> Any:
    """The dataclass; its errors speak of arguments by the names that help has for them."""
    try:
        return kind(**found)
    except ValueError as error:
        message = str(error)
        for name in positional:
            message = message.replace(f"--{name}", name.upper())
        raise ValueError(message) from None


def _parameter(one: Field, kind: Any, partial: bool, positional: bool) -> inspect.Parameter:
    name = f"--{one.name.replace('_', '-')}"
    flags = (f"{name}/--no-{name[2:]}",) if kind is bool else (name,)
    names = (*flags, *one.metadata["names"])
    default = {MISSING: inspect.Parameter.empty, (): []}.get(one.default, one.default)
    shown = default not in (None, [], inspect.Parameter.empty)
    asked: Any = list[str] if default == [] else kind
    if positional:
        argument = typer.Argument(help=one.metadata["help"], metavar=one.name.upper(), show_default=shown)
        return inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[asked, argument]
        )
    help = one.metadata["help"]
    if partial and shown:  # whether it was given is told by None
        default, asked, help = None, asked | None, f"{help} [default: {default}]"
    annotation = Annotated[asked, typer.Option(*names, help=help, show_default=shown and not partial)]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
