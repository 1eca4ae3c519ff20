"""The table of the theory suite, in lines of at most 80 characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from resformer.theory.claim import Verdict
from resformer.theory.run import Outcome

STYLES = {"holds": "green", "false": "yellow", "FAILS": "bold red", "TRUE?": "bold red"}


def table(outcomes: Sequence[Outcome], explain: bool = False) -> RenderableType:
    """claim | source | predicted | measured | tolerance | verdict, and below it why popular claims are false; with
    `explain` also what each claim says, how it was measured and where to read it."""
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, width=80)
    shown.add_column("claim")
    shown.add_column("source", width=13)
    shown.add_column("predicted", justify="right", no_wrap=True)
    shown.add_column("measured", no_wrap=True)
    shown.add_column("within", justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    for outcome in outcomes:
        shown.add_row(Text(outcome.claim.name, style="bold"), outcome.claim.source)
        for verdict in outcome.verdicts:
            law = verdict.law
            shown.add_row(
                Padding(Text(law.quantity), (0, 0, 0, 1)),
                "often claimed" if law.popular else "",
                f"{law.relation} {number(law.predicted)}",
                measured(verdict),
                number(law.tolerance),
                Text(verdict.word, style=STYLES[verdict.word]),
            )
    verdicts = [verdict for outcome in outcomes for verdict in outcome.verdicts]
    reasons: dict[tuple[str, str], list[str]] = {}  # one may explain several rows of a claim
    for outcome in outcomes:
        for law in outcome.claim.laws:
            if law.popular:
                reasons.setdefault((outcome.claim.name, law.popular), []).append(law.quantity)
    notes = [Text(f"{name}, {'; '.join(rows)}: {reason}") for (name, reason), rows in reasons.items()]
    surprises = sum(not verdict.expected for verdict in verdicts)
    closing = (
        f"{len(verdicts)} predictions of {len(outcomes)} claims; means over seeds ± their standard deviation. "
        + (f"{surprises} are not as expected." if surprises else "All are as expected.")
    )
    parts: list[RenderableType] = [shown, Text()]
    if explain:
        for outcome in outcomes:
            parts += [Text(outcome.claim.name, style="bold")]
            parts += [Padding(Text(_flowing(outcome.claim.statement)), (0, 0, 0, 2))]
            parts += [Padding(Text(f"Reference: {outcome.claim.reference}"), (0, 0, 1, 2))]
    if notes:
        parts += [Text("False or conditional, though often claimed:", style="bold")]
        parts += [Padding(note, (0, 0, 0, 2)) for note in notes]
        parts += [Text()]
    return Group(*parts, Text(closing))


def _flowing(text: str) -> str:
    """Paragraphs without the line breaks of the source."""
    return "\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def measured(verdict: Verdict) -> str:
    deviation = "" if verdict.deviation is None else f" ±{number(verdict.deviation, 2)}"
    return f"{number(verdict.mean)}{deviation}"


def number(value: float, digits: int = 3) -> str:
    """In at most 8 characters: 0.0625, -0.51, 1.3e-06, 12400."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(power)}"
