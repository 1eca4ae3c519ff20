"""The report of a study: one self-contained page, the same in Markdown, and a table of the runs. Needs no torch."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from resformer.study import figures, findings
from resformer.study.results import Result, read_results, read_study
from resformer.study.stats import Estimate, estimate
from resformer.study.summary import FAR, Cell, Setting, learned, not_started, outcome, split

COSTS = {
    "parameters": "parameters",
    "scheme_parameters": "of the scheme",
    "seconds": "seconds",
    "examples_per_second": "examples/s",
    "peak_memory_mb": "peak MiB of the process",
}
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Failure:
    """Runs of one cell that did not learn, for one reason."""

    cell: Cell
    what: str
    detail: str
    runs: tuple[Result, ...]


@dataclass(frozen=True)
class Report:
    """All that the page shows, from what the study left on disk."""

    studies: list[dict[str, Any]]
    runs: list[Result]  # those that were planned and have not started included
    settings: list[Setting]

    @cached_property
    def finished(self) -> list[Result]:
        return [run for run in self.runs if run.finished]

    @cached_property
    def styles(self) -> dict[str, figures.Style]:
        return figures.styles(list(dict.fromkeys(s for setting in self.settings for s in setting.schemes)))

    @property
    def caveats(self) -> list[str]:
        return findings.caveats(self.settings, self.runs)

    @property
    def shared(self) -> dict[str, Any]:
        """The config entries that all runs have in common."""
        return {key: values[0] for key, values in self._configs.items() if len(values) == 1}

    @property
    def varied(self) -> dict[str, list[Any]]:
        """The config entries in which runs differ, with their values."""
        return {key: values for key, values in self._configs.items() if len(values) > 1}

    @property
    def equations(self) -> dict[str, str]:
        """Scheme -> the update it ran with, norms included, as its runs recorded it."""
        known = [run for run in self.finished if "equation" in run.diagnostics]
        found = {run.config["scheme"]: run.diagnostics["equation"] for run in known}
        return {scheme: found[scheme] for scheme in self.styles if scheme in found}

    @property
    def versions(self) -> dict[str, list[Any]]:
        """Where the results come from: every value that occurs, and the first and last time of day."""
        found = _values([run.provenance for run in self.finished])
        times = sorted(found.pop("finished", []))
        return found | ({"finished": list(dict.fromkeys([times[0], times[-1]]))} if times else {})

    @property
    def commands(self) -> list[str]:
        return [entry["command"] for entry in self.studies if entry.get("command")]

    @cached_property
    def _configs(self) -> dict[str, list[Any]]:
        found = _values([run.config for run in self.runs])
        return {key: sorted(values, key=lambda value: (value is None, value)) for key, values in found.items()}


def read_report(output: Path) -> Report:
    """The study in a folder. Raises `ValueError` if there is none."""
    studies, results = read_study(output), read_results(output)
    runs = [*results, *not_started(studies, results, output)]
    plans = [entry["study"] for entry in studies]
    schemes = [scheme for plan in plans for scheme in plan["schemes"]]
    tasks = [task for plan in plans for task in plan["tasks"]]
    return Report(studies, runs, split(runs, schemes, tasks))


def write_report(output: Path) -> Path:
    """Write report.html, report.md with report.svg, and results.csv into a study's folder; return the path of the page.

    Works on studies that are not finished. Raises `ValueError` if `output` does not hold a study.
    """
    output = Path(output)
    report = read_report(output)
    (output / "report.html").write_text(html(report), encoding="utf-8")
    (output / "report.md").write_text(markdown(report), encoding="utf-8")
    if report.finished:
        (output / "report.svg").write_text(figures.picture(report.settings, report.styles), encoding="utf-8")
    with open(output / "results.csv", "w", encoding="utf-8", newline="") as file:
        columns = list(dict.fromkeys(key for run in report.runs for key in row(run)))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row(run, setting) for setting in report.settings for run in setting.runs)
    return output / "report.html"


def html(report: Report) -> str:
    """The page. Everything that comes from the study is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    filters = {"breakable": breakable, "aside": aside, "number": findings.number, "shown": shown}
    environment.filters |= filters | {"cost": _cost, "entry": _entry}
    functions = (best_first, costs, definition, differences, failures, palette, row)
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"figures": figures, "findings": findings, "cost_names": COSTS}
    template = files("resformer.study").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report)


def markdown(report: Report) -> str:
    """The page's text and tables as Markdown."""
    lines = ["# Residual schemes over depth", ""]
    if report.finished:
        lines += ["![Score, training loss and token cosine against depth, by scheme](report.svg)", ""]
    for setting in report.settings:
        lines += [f"## {_plain(findings.title(setting))}", "", _plain(findings.headline(setting)), ""]
        lines += [*(_plain(text) for text in findings.certainty(setting)), ""]
        lines += _table(
            ["scheme", *(f"depth {depth}" for depth in setting.depths)],
            [[s, *(_cell(setting.cells[s, depth]) for depth in setting.depths)] for s in best_first(setting)],
        )
        if setting.threshold is not None:
            lines += [f"Score (runs that learned / runs finished). {definition(setting)}", ""]
        if differences(setting):
            lines += [f"### Score minus that of {_plain(setting.baseline)}, paired by seed", ""]
            lines += _table(
                ["scheme", *(f"depth {depth}" for depth in setting.depths)],
                [[s, *(shown(gap, signed=True) for gap in gaps)] for s, gaps in differences(setting).items()],
            )
        if findings.collapse(setting):
            lines += [findings.collapse(setting), ""]
        if failures(setting):
            lines += ["### Did not learn", ""]
            lines += _table(
                ["scheme", "depth", "what", "runs"],
                [
                    [f.cell.scheme, f.cell.depth, f"{f.what}: {f.detail}", " ".join(r.directory.name for r in f.runs)]
                    for f in failures(setting)
                ],
            )
        if costs(setting):
            lines += ["### Cost", ""]
            lines += _table(
                ["scheme", "depth", *COSTS.values()],
                [[cell.scheme, cell.depth, *map(_cost, values)] for cell, values in costs(setting)],
            )
    lines += ["## Caveats", "", *(f"- {_plain(text)}" for text in report.caveats), "", "## Protocol", ""]
    if report.equations:
        lines += _table(["scheme", "update (N: a norm)"], list(report.equations.items()))
    lines += _table(["setting", "value"], [[key, findings.number(value)] for key, value in report.shared.items()])
    lines += _table(
        ["differs", "values"],
        [[key, ", ".join(map(findings.number, values))] for key, values in report.varied.items()],
    )
    lines += _table(["made with", ""], [[key, ", ".join(map(str, values))] for key, values in report.versions.items()])
    for command in report.commands:
        lines += ["```", command, "```", ""]
    return "\n".join(lines)


def row(run: Result, setting: Setting | None = None) -> dict[str, Any]:
    """A run as a flat row of results.csv. `setting` decides whether the run learned."""
    known = setting is not None and setting.threshold is not None and run.finished
    return {
        "run": run.directory.name,
        **run.config,
        "status": run.status,
        "learned": learned(run, setting.threshold) if known and setting else None,
        "score": run.score,
        "train_loss": run.train_loss,
        "flags": " ".join(run.flags),
        **{f"metric_{name}": value for name, value in run.metrics.items()},
        "token_cosine": run.diagnostics.get("token_cosine"),
        **{name: run.cost.get(name) for name in COSTS},
        "git": run.provenance.get("git"),
        "error": run.error or run.problem,
    }


def best_first(setting: Setting) -> list[str]:
    """The schemes, those that learn to the greatest depth first, otherwise in their order."""
    return sorted(setting.schemes, key=lambda scheme: -setting.learns_to(scheme))


def definition(setting: Setting) -> str:
    """When a run counts as having learned; empty without a constant guess to compare with."""
    if setting.threshold is None or setting.guess_loss is None:
        return ""
    threshold = f"{setting.threshold:.3g}"
    words = (
        f"Learned: final training loss below {threshold}. At chance: {threshold} or more, which is "
        f"{setting.threshold / setting.guess_loss:.0%} of the loss of a constant guess ({setting.guess_loss:.3g})."
    )
    if any(outcome(run, setting.threshold) == "worse" for run in setting.finished):
        words += f" Worse than chance: above {FAR} times {threshold}."
    return words


def differences(setting: Setting) -> dict[str, list[Estimate | None]]:
    """Score minus the baseline's by scheme, one a depth; empty without a baseline or without a pair."""
    baseline = setting.baseline
    if baseline is None:
        return {}
    found = {
        scheme: [setting.difference(scheme, baseline, depth) for depth in setting.depths]
        for scheme in best_first(setting)
        if scheme != baseline
    }
    return {scheme: gaps for scheme, gaps in found.items() if any(gaps)}


def costs(setting: Setting) -> list[tuple[Cell, list[float | None]]]:
    """The means of `COSTS` over the finished runs of each cell that has some."""

    def mean(cell: Cell, name: str) -> float | None:
        values = [run.cost[name] for run in cell.finished if run.cost.get(name) is not None]
        return estimate(values).mean if values else None

    return [(cell, [mean(cell, name) for name in COSTS]) for cell in setting.cells.values() if cell.finished]


def failures(setting: Setting) -> list[Failure]:
    """Every run that did not learn, by cell and reason. Runs that are merely not finished are not among them."""
    return [failure for cell in setting.cells.values() for failure in _failures(setting, cell)]


def _failures(setting: Setting, cell: Cell) -> Iterator[Failure]:
    for kind in ("chance", "worse"):
        runs = [run for run in cell.finished if outcome(run, setting.threshold) == kind]
        losses = [run.train_loss for run in runs if run.train_loss is not None]
        if losses:
            low, high = f"{min(losses):.3f}", f"{max(losses):.3f}"
            spread = low if low == high else f"{low} to {high}"
            yield Failure(cell, findings.FAILED[kind], f"final training loss {spread}", tuple(runs))
    for run in cell.runs:
        if run.status == "diverged":
            last = f"; last step logged {run.loss_curve[-1][0]:.0f}" if run.loss_curve else ""
            yield Failure(cell, "diverged", f"loss not finite, seed {run.config['seed']}{last}", (run,))
        elif run.status == "failed":
            yield Failure(cell, "error", f"{run.error} (seed {run.config['seed']})", (run,))
        elif run.problem:
            yield Failure(cell, "not counted", f"{run.problem} (seed {run.config['seed']})", (run,))


def shown(value: Estimate | None, signed: bool = False) -> str:
    """0.814 ± 0.021, or 0.814 without an interval; nothing for None."""
    if value is None:
        return ""
    mean = f"{value.mean:{'+' if signed else ''}.3f}".replace("-", MINUS)
    return mean if value.half is None else f"{mean} ± {value.half:.3f}"


def breakable(name: str) -> Markup:
    """A name, escaped, that a narrow column may break after _ : and ,"""
    return Markup(re.sub(r"([_:,])", r"\1<wbr>", str(escape(name))))


def aside(text: str) -> Markup:
    """A sentence, escaped, with what stands in parentheses made small."""
    return Markup(re.sub(r"(\([^()]*\))", r"<small>\1</small>", str(escape(text))))


def palette() -> dict[str, str]:
    """The CSS variables of the figures with their values on a light page."""
    return {variable: color for color, variable in figures.VARIABLES.items()}


def _values(entries: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """By key, the distinct values in the order they are met."""
    found: dict[str, list[Any]] = {}
    for entry in entries:
        for key, value in entry.items():
            if value not in found.setdefault(key, []):
                found[key].append(value)
    return found


def _cell(cell: Cell) -> str:
    return " ".join(filter(None, [shown(cell.score), f"({cell.verdict})"]))


def _entry(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _cost(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(_plain(str(entry)) for entry in line) + " |" for line in lines), ""]


def _plain(text: Any) -> str:
    """Text that Markdown shows as it is, within a table too."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", str(text).replace("\n", " "))
