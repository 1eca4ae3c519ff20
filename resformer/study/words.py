"""Numbers and lists as people write them."""

from collections.abc import Iterable, Sequence
from typing import Any

MINUS = "\N{MINUS SIGN}"


def number(value: Any) -> str:
    """A number as people write it: 1e-3, 0.05, 400. Other values as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def signed(value: float, decimals: int = 3) -> str:
    return f"{value:+.{decimals}f}".replace("-", MINUS)


def unsigned(value: float, decimals: int = 3) -> str:
    """With a sign where it is below zero alone."""
    return f"{value:.{decimals}f}".replace("-", MINUS)


def joined(names: Iterable[str]) -> str:
    """a; a and b; a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def ranges(depths: Sequence[int], among: Sequence[int]) -> str:
    """Depths in words, neighbours in `among` taken together: "depths 2 to 16 and 48"."""
    spans: list[list[int]] = []
    for depth in depths:
        if spans and among.index(depth) == among.index(spans[-1][-1]) + 1:
            spans[-1].append(depth)
        else:
            spans.append([depth])
    words = [f"{s[0]} to {s[-1]}" if len(s) > 2 else joined(map(str, s)) for s in spans]
    return f"{'depth' if len(depths) == 1 else 'depths'} {joined(words)}"


def counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def verb(word: str, names: Sequence[str]) -> str:
    return f"{word}s" if len(names) == 1 else word


def they(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "they"
