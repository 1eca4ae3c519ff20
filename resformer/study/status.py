"""How far the studies in a folder are, cell by cell. Needs no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from resformer.study.execute import studies
from resformer.study.plan import Condition, Study, arm
from resformer.study.pretraining import PRETRAINING
from resformer.study.results import Result, read_result
from resformer.study.selection import Choice, choices, chosen
from resformer.study.worker import Unit, running

STATES = ("done", "running", "failed", "missing")


@dataclass(frozen=True)
class Cell:
    """A condition, and how many of its runs are in each of `STATES`; its task may be `PRETRAINING`."""

    condition: Condition
    tuning: Counter[str]  # of the runs that choose its learning rate
    runs: Counter[str]  # of those that are reported on
    choice: Choice | None  # None where there is nothing to choose
    rate: float | None  # None: not chosen yet


def cells(study: Study, look: Callable[[Unit], Result]) -> list[Cell]:
    """The cells of a study in the order they are run in, before them the encoders that they start from; `look` reads a
    run as it stands on disk."""
    made, rates = choices(study, look), study.rates(chosen(study, look))
    found = {condition: Counter[str]() for condition in study.conditions()}
    for run in study.runs(rates):
        found[run.condition][_state(look(run))] += 1
    encoders: defaultdict[Condition, Counter[str]] = defaultdict(Counter)
    for encoder in study.encoders():
        encoders[encoder.condition][_state(look(encoder))] += 1
    return [Cell(condition, Counter(), counts, None, None) for condition, counts in encoders.items()] + [
        Cell(
            condition,
            Counter(_state(look(run)) for run in study.tuning(condition)),
            runs,
            made.get(condition),
            rates[condition],
        )
        for condition, runs in found.items()
    ]


def status(output: Path) -> Group:
    """A table for each study of a folder, within 80 columns. Raises `ValueError` if the folder holds none.

    A study that was started again with more depths, schemes or seeds is shown once, as it grew.
    """
    output = Path(output)
    found = studies(output)
    shown = [study for i, study in enumerate(found) if not any(_within(study, later) for later in found[i + 1 :])]
    seen: dict[Unit, Result] = {}

    def look(run: Unit) -> Result:
        if run not in seen:
            seen[run] = read_result(output / "runs" / run.id)
        return seen[run]

    parts: list[Table | Text] = []
    for study in shown:
        of_it = cells(study, look)
        if len(shown) > 1:
            parts.append(Text(f"study of {len(study.conditions())} cells x {study.seeds} seeds", style="bold"))
        parts += [table(of_it), Text(_summary(of_it))]
    rejected = {f"run {run.id}: {result.problem}": None for run, result in seen.items() if result.problem}
    return Group(*parts, *map(Text, [*_failures(seen), *rejected]))


def table(of_study: Iterable[Cell]) -> Table:
    """A row for each cell; a learning rate at the end of the grid is marked."""
    of_study = list(of_study)
    tuned, several = any(cell.choice for cell in of_study), len({cell.condition.weight_init for cell in of_study}) > 1
    found = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    found.add_column("depth", justify="right")
    found.add_column("task", overflow="fold")
    if several:
        found.add_column("weights", overflow="fold")
    found.add_column("scheme", overflow="fold", ratio=1)
    if tuned:
        found.add_column("tuning", justify="right", no_wrap=True)
        found.add_column("lr", justify="right", no_wrap=True)
    for name in STATES:
        found.add_column(name, justify="right", no_wrap=True)
    for cell in of_study:
        condition, counts = cell.condition, cell.runs
        row = [str(condition.depth), condition.task, *([condition.weight_init] if several else [])]
        row.append(escape(arm(asdict(condition))))
        if tuned and condition.task == PRETRAINING:
            row += ["", ""]
        elif tuned:
            edge = "" if cell.choice is None or cell.choice.edge is None else "*"
            row += [_tuning(cell), "-" if cell.rate is None else f"{cell.rate:g}{edge}"]
        done = f"{counts['done']}/{counts.total()}"
        found.add_row(*row, done, *(str(counts[name]) if counts[name] else "" for name in STATES[1:]))
    return found


def _state(result: Result) -> str:
    if result.finished:
        return "done"
    if running(result.directory):
        return "running"
    return "failed" if result.status == "failed" else "missing"


def _tuning(cell: Cell) -> str:
    """Such as "2/3", with what is the matter where there is something."""
    marks = [f"{cell.tuning[name]} {name}" for name in ("running", "failed") if cell.tuning[name]]
    return " ".join([f"{cell.tuning['done']}/{cell.tuning.total()}", *marks])


def _failures(seen: dict[Unit, Result]) -> list[str]:
    """A line for each reason why runs failed, with the first of them."""
    by_reason: defaultdict[str, list[Unit]] = defaultdict(list)
    for run, result in seen.items():
        if _state(result) == "failed":
            by_reason[str(result.error)].append(run)
    return [
        f"failed: {runs[0].id} ({runs[0]})" + f" and {len(runs) - 1} more" * (len(runs) > 1) + f": {reason}"
        for reason, runs in by_reason.items()
    ]


def _summary(of_study: list[Cell]) -> str:
    runs: Counter[str] = Counter()
    for cell in of_study:
        runs += cell.runs + cell.tuning
    reported = [cell for cell in of_study if cell.condition.task != PRETRAINING]
    whole = sum(cell.runs["done"] == cell.runs.total() for cell in reported)
    besides = "tuning and pre-training" if len(reported) < len(of_study) else "tuning"
    counts = [f"{whole} of {len(reported)} cells and {runs['done']} of {runs.total()} runs done (with {besides})"]
    counts += [f"{runs[name]} {name}" for name in STATES[1:] if runs[name]]
    lines = [", ".join(counts)]
    if any(cell.choice is not None and cell.choice.edge for cell in of_study):
        lines.append("* at the end of the grid: a better learning rate may lie beyond")
    if runs["failed"]:
        lines.append("`resformer study retry` runs the failures again")
    return "\n".join(lines)


def _within(study: Study, later: Study) -> bool:
    """Whether the later one asks for all that the study does."""
    grids = (study.settings, study.learning_rates, study.endpoint, study.facts.data, study.facts.model)
    others = (later.settings, later.learning_rates, later.endpoint, later.facts.data, later.facts.model)
    return grids == others and study.seeds <= later.seeds and set(study.conditions()) <= set(later.conditions())
