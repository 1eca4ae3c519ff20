"""What a run of the theory suite leaves behind: a plot a claim (SVG), all figures (JSON), and two tables (CSV)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from resformer.files import finite, write_json_atomically, write_text_atomically
from resformer.palette import DASHES, MARKERS, RC, SERIES, SOFT
from resformer.provenance import provenance
from resformer.theory.claim import Claim, Measured, Verdict
from resformer.theory.run import Outcome


def write_theory(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write theory.json, verdicts.csv, curves.csv and CLAIM.svg for each claim that has curves; returns their paths.

    The folder is made; files of an earlier run are replaced. JSON and CSV have every number in full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "theory.json", folder / "verdicts.csv", folder / "curves.csv"]
    write_json_atomically(files[0], finite({**provenance(), "claims": [_record(one) for one in outcomes]}))
    write_text_atomically(files[1], _table(_verdict_rows(outcomes)))
    write_text_atomically(files[2], _table(_curve_rows(outcomes)))
    for outcome in outcomes:
        if outcome.measured.curves:
            files.append(folder / f"{outcome.claim.name}.svg")
            write_text_atomically(files[-1], plot(outcome.claim, outcome.measured))
    return files


def plot(claim: Claim, measured: Measured) -> str:
    """An SVG: for each curve the mean over the seeds, and the range from the lowest to the highest seed."""
    with matplotlib.rc_context(RC | {"svg.hashsalt": claim.name, "figure.facecolor": "white"}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        looks = zip(measured.curves.items(), cycle(SERIES), cycle(MARKERS), cycle(DASHES), strict=False)
        for (name, curve), color, marker, dash in looks:
            if name.startswith("theory"):
                axes.plot(list(curve.x), list(curve.y[0]), color=SOFT, linestyle=":", linewidth=1, label=name)
                continue
            columns = list(zip(*curve.y, strict=True))
            means = [sum(column) / len(column) for column in columns]
            x = list(curve.x)
            every = max(1, len(x) // 12)
            shape: Any = {"color": color, "marker": marker, "linestyle": dash, "linewidth": 1.4, "markersize": 4}
            axes.plot(x, means, markevery=every, label=name, **shape)
            low, high = [min(column) for column in columns], [max(column) for column in columns]
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        if "x" in claim.log:
            axes.set_xscale("log", base=2)
            places = sorted({x for curve in measured.curves.values() for x in curve.x})
            if len(places) <= 10:
                axes.set_xticks(places, [f"{x:g}" for x in places])
        if "y" in claim.log:
            axes.set_yscale("log", nonpositive="mask")
        axes.set_xlabel(claim.axes[0])
        axes.set_ylabel(claim.axes[1])
        axes.set_title(f"{claim.name} ({claim.source})", loc="left")
        figure.legend(loc="outside right upper", fontsize=8)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _record(outcome: Outcome) -> dict[str, Any]:
    claim, measured = outcome.claim, outcome.measured
    return {
        "claim": claim.name,
        "statement": claim.statement,
        "reference": claim.reference,
        "seeds": len(next(iter(measured.values.values()))),
        "cpu_seconds": outcome.seconds,
        "laws": [_law(verdict) | {"values": measured.values[verdict.law.quantity]} for verdict in outcome.verdicts],
        "axes": list(claim.axes),
        "curves": {
            name: {"x": list(curve.x), "y": [list(y) for y in curve.y]} for name, curve in measured.curves.items()
        },
    }


def _law(verdict: Verdict) -> dict[str, Any]:
    law = verdict.law
    return {
        "quantity": law.quantity,
        "relation": law.relation,
        "predicted": law.predicted,
        "tolerance": law.tolerance,
        "spread": law.spread,
        "popular": law.popular,
        "measured": verdict.mean,
        "deviation": verdict.deviation,
        "verdict": verdict.word,
    }


def _verdict_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {"claim": outcome.claim.name, "source": outcome.claim.source} | _law(verdict)
        for outcome in outcomes
        for verdict in outcome.verdicts
    ]


def _curve_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        {"claim": outcome.claim.name, "curve": name, "seed": seed, "x": x, "y": y}
        for outcome in outcomes
        for name, curve in outcome.measured.curves.items()
        for seed, row in enumerate(curve.y)
        for x, y in zip(curve.x, row, strict=True)
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    text = StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
