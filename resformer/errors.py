"""One form for the message about a name that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(
    kind: str, name: object, known: Iterable[str], hint: str = "", of: str = "", listed: str = ""
) -> ValueError:
    """A `ValueError` that says what was given, the nearest known names, and all of them, or where they are listed."""
    names = sorted(known)
    spelt = {one.lower(): one for one in names}
    near = [spelt[one] for one in get_close_matches(str(name).lower(), spelt, n=2, cutoff=0.5)]
    guess = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    owner = f" of {of}" if of else ""
    known_ones = f"{len(names)}, see `{listed}`" if listed else ", ".join(names)
    return ValueError(f"unknown {kind} {name!r}{owner}.{guess} Known: {known_ones}.{' ' + hint if hint else ''}")
