"""Where the norms of an arm act, as its runs recorded: arms that differ there differ in more than the shortcut."""

import re
from collections.abc import Iterator, Sequence

from resformer.study.plan import STATIC, arm
from resformer.study.results import Result
from resformer.study.summary import Setting
from resformer.study.words import joined

WORDS = {
    frozenset({"post"}): "post-LN",
    frozenset({"pre"}): "pre-LN",
    frozenset({"out"}): "normed on the branch's output",
    frozenset({"pre", "out"}): "normed on both sides of the branch",
    frozenset(): "without norms",
}
PLACED = {"post": {"post"}, "pre": {"pre"}, "sandwich": {"pre", "out"}, "none": set[str]()}
ELSEWHERE = "normed in another way"


def placement(run: Result) -> str | None:
    """In words, from the equation that the run recorded; None where it recorded none."""
    text = run.diagnostics.get("equation")
    if not text:
        return None
    if "F(" not in text:
        return _of_patching(run, text)
    rule = text.rpartition(";")[2] if "; in the layers " in text else text
    after = "← N(" in rule
    inner = rule.replace("← N(", "← (")
    found = (("post", after), ("pre", "F(N(" in inner), ("out", "N(F(" in inner))
    slots = frozenset(slot for slot, there in found if there)
    return ELSEWHERE if not slots and re.search(r"\bN", inner) else WORDS.get(slots, ELSEWHERE)


def _of_patching(run: Result, text: str) -> str | None:
    """Where the equation is only that of mixing layers, as earlier versions recorded it: from how it was patched."""
    patched = run.patched or {}
    placed, host = patched.get("placement"), patched.get("host")
    if "N" in text or placed is None:  # norms of the scheme's own
        return ELSEWHERE if "N" in text else None
    if placed == "native":
        from resformer.hosts import families  # only here: it brings torch

        placed = families()[host].kind if host in families() else None
    return WORDS[frozenset(PLACED[placed])] if placed in PLACED else None


def differing(settings: Sequence[Setting]) -> Iterator[str]:
    """The caveats: arms whose norms act at different places, and the one draw of the control that mixes layers."""
    found: dict[str, str] = {}
    for run in (run for setting in settings for run in setting.finished):
        name = arm(run.config)
        if name not in found and (words := placement(run)):
            found[name] = words
    by_place: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for setting in settings for name in setting.arms if name in found):
        by_place.setdefault(found[name], []).append(name)
    if len(by_place) > 1:
        parts = [f"{joined(names)} {'is' if len(names) == 1 else 'are'} {words}" for words, names in by_place.items()]
        yield (
            f"Arms differ in where their norms act: {'; '.join(parts)}. Between these a difference is one of whole "
            "recipes, and not of the shortcut alone."
        )
    mixed = [name for name in found if name.partition(":")[0] == STATIC]
    if mixed:
        yield (
            f"The weights of {joined(mixed)} are one draw, the same for every seed and another at each depth: "
            "intervals and a trend over depth do not cover what another draw would give."
        )
