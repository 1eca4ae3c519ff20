"""How a scheme with its options is written on a command line. Stdlib only."""

import ast
import json
from typing import Any


def parse_scheme(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a scheme written as "rezero" or "hyper_connections:num_streams=4,placement=pre".

    A value is a Python literal (4, 0.5, True, (1, 2), 'text'), true or false, or else taken as the text it is.
    Raises `ValueError` for anything else; whether scheme and options exist is not looked at.
    """
    name, colon, options = text.strip().partition(":")
    form = "write it as NAME or NAME:OPTION=VALUE,OPTION=VALUE, such as exclusive_gate:bias=0"
    if not name.isidentifier() or (colon and not options.strip()):
        raise ValueError(f"cannot read scheme {text!r}; {form}")
    # Python's own reading of a call knows which commas part the options and which are inside a value.
    source = f"_({options})"
    try:
        call = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError):
        raise ValueError(f"cannot read the options of scheme {text!r}; {form}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"cannot read the options of scheme {text!r}; {form}")
    read: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in read:
            twice = f"option {keyword.arg!r} is given twice" if keyword.arg else "options need a name"
            raise ValueError(f"cannot read scheme {text!r}: {twice}; {form}")
        if keyword.arg == "verify":
            raise ValueError(f"scheme {text!r} sets 'verify', which is of resformer.patch and not of a scheme")
        try:
            read[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError:
            read[keyword.arg] = ast.get_source_segment(source, keyword.value)
        if read[keyword.arg] in ("true", "false"):  # as text both would count as true
            read[keyword.arg] = read[keyword.arg] == "true"
    return name, read


def write_scheme(name: str, options: dict[str, Any]) -> str:
    """The text that `parse_scheme` reads as this, the same for equal options: sorted by name, text without quotes."""
    written = ",".join(f"{key}={_written(value)}" for key, value in sorted(options.items()))
    return f"{name}:{written}" if options else name


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    try:
        bare = isinstance(value, str) and parse_scheme(f"scheme:option={value}")[1] == {"option": value}
    except ValueError:
        bare = False
    return value if bare else repr(value)


def with_options(scheme: str | None, options: str | None) -> str | None:
    """A scheme as `parse_scheme` reads it, with the options of a JSON object, such as '{"bias": 0}'.

    Raises `ValueError` for what is no JSON object, for options without a scheme, and for a scheme that has some.
    """
    if options is None:
        return scheme
    form = """write a JSON object, such as '{"bias": 0}'"""
    try:
        read = json.loads(options, object_pairs_hook=_once, parse_constant=_no_constant)
    except ValueError as error:
        raise ValueError(f"cannot read the scheme options {options!r}: {error}; {form}") from None
    if not isinstance(read, dict):
        raise ValueError(f"the scheme options {options!r} are no JSON object; {form}")
    if wrong := [name for name in read if not name.isidentifier()]:
        raise ValueError(f"the scheme options {options!r} hold {wrong[0]!r}, which is no name of an option; {form}")
    if scheme is None:
        raise ValueError(f"the scheme options {options!r} are of a scheme; give the scheme as well")
    if ":" in scheme:
        raise ValueError(
            f"scheme {scheme!r} brings options, and {options!r} gives some as well; use one of the two ways"
        )
    return f"{scheme}:{','.join(f'{name}={value!r}' for name, value in read.items())}" if read else scheme


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")
