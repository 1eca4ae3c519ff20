"""The report of a study, made from its document: a page of its own, Markdown with figures, tables. Needs no torch."""

import csv
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from resformer.files import write_json_atomically, write_text_atomically
from resformer.study import drawings, figures, svg
from resformer.study.document import Document, study_document
from resformer.study.markdown import coverage, markdown
from resformer.study.records import COSTS
from resformer.study.tables import aggregate, cost, entry, failed, indexed, main_rows, p_value, sentence, shown
from resformer.study.words import counted, number


def write_report(output: Path, out: Path | None = None) -> Path:
    """Write the report of the study in a folder, into it or into `out`; return the path of the page.

    Works on studies that are not finished. Raises `ValueError` if `output` does not hold a study.
    """
    return write(study_document(Path(output)), Path(out or output))


def write(document: Document, out: Path) -> Path:
    """report.html, report.json, report.md with its figures, results.csv (runs) and comparisons.csv, into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomically(out / "report.json", document)
    for name, drawing in figures.sheets(document, svg.styles(document["arms"])).items():
        write_text_atomically(out / f"{name}.svg", drawing)
    write_text_atomically(out / "report.md", markdown(document))
    runs = [row for setting in document["settings"] for row in setting["runs"]]
    _write_table(out / "results.csv", runs)
    _write_table(out / "comparisons.csv", (row for setting in document["settings"] for row in _tests(setting)))
    write_text_atomically(out / "report.html", html(document))
    return out / "report.html"


def html(document: Document) -> str:
    """The page. Everything that comes from the study is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    filters = {"breakable": breakable, "aside": aside, "number": number, "shown": shown, "entry": entry}
    environment.filters |= filters | {
        "aggregate": aggregate,
        "cost": cost,
        "failed": failed,
        "p_value": p_value,
        "sentence": sentence,
    }
    environment.globals |= {
        "figures": figures,
        "drawings": drawings,
        "svg": svg,
        "cost_names": COSTS,
        "palette": palette,
    }
    environment.globals |= {"indexed": indexed, "main_rows": main_rows, "counted": counted, "coverage": coverage}
    template = files("resformer.study").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        report=document,
        looks=svg.styles(document["arms"]),
        controls={arm["name"] for arm in document["arms"] if arm["control"]},
    )


def nothing_finished(document: Document) -> str | None:
    """Why a report says nothing, where it does not: for a message."""
    found = document["coverage"]
    if found["finished"]:
        return None
    failed_runs = f", {found['failed']} failed" * bool(found["failed"])
    return f"no run is finished ({found['planned']} planned{failed_runs}): there is nothing to report yet"


def to_know(document: Document) -> Iterator[str]:
    """What somebody at a terminal should know of a report before they read it: files that do not count, runs that are
    missing."""
    found = document["coverage"]
    if bad := found["not_counted"]:
        first, more = bad[0], f"; {len(bad) - 1} more" * (len(bad) > 1)
        does = "does" if len(bad) == 1 else "do"
        yield (
            f"{counted(len(bad), 'result file')} {does} not count: runs/{first['run']}: {first['problem']}{more}. "
            "`resformer compare` into the folder moves those of its runs to rejected-N.json, and makes them again"
        )
    if moved := found["moved"]:
        were = "was" if len(moved) == 1 else "were"
        more = f" and {len(moved) - 1} more" * (len(moved) > 1)
        yield f"{counted(len(moved), 'result file')} did not count and {were} moved aside: {moved[0]}{more}"
    left = found["planned"] - found["finished"]
    if found["finished"] and left:
        under_way = f", {found['under_way']} under way in another process" * bool(found["under_way"])
        yield f"{left} of {found['planned']} runs have no result yet{under_way}: the report is partial"


def breakable(text: str) -> Markup:
    """Text, escaped, whose names may be broken after : and , and on a phone after _ too."""
    broken = re.sub(r"([:,])(?=[^\s&])", r"\1<wbr>", str(escape(text)))
    return Markup(broken.replace("_", '_<wbr class="narrow">'))


def aside(text: str) -> Markup:
    """A sentence, escaped and `breakable`, with what stands in parentheses made small."""
    return Markup(re.sub(r"(\([^()]*\))", r"<small>\1</small>", str(breakable(text))))


def palette() -> dict[str, str]:
    """The CSS variables of the figures with their values on a light page."""
    return {variable: color for color, variable in svg.VARIABLES.items()}


def _tests(setting: Document) -> Iterable[dict[str, Any]]:
    for test in setting["comparisons"]:
        gap = test["gap"] or {}
        flat = {name: gap.get(name) for name in ("mean", "low", "high", "n", "sd")}
        rest = {name: value for name, value in test.items() if name not in ("arm", "depth", "gap")}
        yield {
            "setting": setting["title"],
            "arm": test["arm"],
            "baseline": setting["baseline"],
            "depth": test["depth"],
            **rest,
            **flat,
        }


def _write_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    kept = list(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in kept for key in row)))
        writer.writeheader()
        writer.writerows(kept)
