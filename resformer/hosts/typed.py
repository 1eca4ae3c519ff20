"""The fields of a spec against their annotations, so that a wrong one is named before anything reads it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_types(spec: Any, who: str, skip: tuple[str, ...] = ()) -> None:
    """A `ValueError` for the first field of a dataclass, or of those that it holds, that is not what its annotation
    says; lists pass for tuples. `skip`: fields, of any of them, that are checked elsewhere."""
    cls: Any = type(spec)
    hints = _hints(cls)
    for field in fields(spec):
        if field.name in skip:
            continue
        value, hint = getattr(spec, field.name), hints[field.name]
        if not _fits(value, hint):
            raise ValueError(f"`{field.name}` of {who} must be {_text(hint)}, got {value!r}")
        members = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
        for member in members:
            if is_dataclass(member):
                name = getattr(member, "name", None)  # a projection has none, and is found by its field
                kind = type(member).__name__.lower()
                where = f"{kind} {name!r} of {who}" if name else f"a {kind} in `{field.name}` of {who}"
                check_types(member, where, skip)


@functools.cache  # there are a few classes, and hundreds of specs; reading the annotations takes a while
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin is tuple and args[-1] is Ellipsis:
        return isinstance(value, tuple | list) and all(_fits(one, args[0]) for one in value)
    if origin is tuple:
        pair = isinstance(value, tuple | list) and len(value) == len(args)
        return pair and all(map(_fits, value, args))
    if origin is Mapping:
        key, member = args
        return isinstance(value, Mapping) and all(_fits(k, key) and _fits(v, member) for k, v in value.items())
    if origin is Callable:
        return callable(value)
    return type(value) is hint if hint in (int, bool) else isinstance(value, hint)


def _text(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_text(one) for one in args)
    if origin is tuple and args[-1] is Ellipsis:
        return f"a tuple, ({_member(args[0])}, ...)"
    if origin is Mapping:
        return f"{{name: {_member(args[1])}, ...}}"
    if origin is Callable:
        return "a function"
    plain = {str: "a string", int: "a whole number", bool: "True or False", type(None): "None"}
    return plain.get(hint) or hint.__name__


def _member(hint: Any) -> str:
    """How one of many is written."""
    if get_origin(hint) is tuple:
        return f"({', '.join(_member(one) for one in get_args(hint))})"
    plain = {str: "path", int: "number", Any: "value"}
    return plain.get(hint) or f"{hint.__name__}(...)"
