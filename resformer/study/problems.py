"""All that is wrong with a study, said at once. Stdlib only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `value`, given for `key`."""

    key: str
    value: Any
    text: str


class Problems(ValueError):
    """What is wrong, in the order it was found; falsy while nothing is."""

    def __init__(self, found: tuple[Problem, ...] = ()):
        self.found = list(found)

    def __str__(self) -> str:
        return "\n".join(problem.text for problem in self.found)

    def __bool__(self) -> bool:
        return bool(self.found)

    def __reduce__(self) -> Any:
        return type(self), (tuple(self.found),)

    def add(self, key: str, value: Any, allowed: str) -> None:
        """`value` was given for `key`; `allowed` says what may be."""
        self.found.append(Problem(key, value, f"{key} must be {allowed}, got {value!r}"))

    def say(self, key: str, value: Any, text: str) -> None:
        """The same in words of one's own."""
        self.found.append(Problem(key, value, text))

    def unless(self, fine: bool, key: str, value: Any, allowed: str) -> None:
        if not fine:
            self.add(key, value, allowed)

    def stop(self) -> None:
        """Raise, if there is anything."""
        if self:
            raise self
        return None
