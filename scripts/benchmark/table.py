"""The results as a table of a terminal, and as Markdown."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from benchmark.record import PEERS, Record
from benchmark.suite import Row, Suite, Value


def marked(row: Row, quantity: str, values: dict[str, Value]) -> str:
    """A cell: the value with the mark of its goals."""
    if quantity not in values or values[quantity] is None:
        return ""
    value = values[quantity]
    return shown(value) + "".join(goal.mark(value) for goal in row.goals if goal.quantity == quantity)


def shown(value: Value) -> str:
    """Three digits; a median with its interval."""
    if isinstance(value, dict):
        return f"{shown(value['median'])} ({shown(value['low'])}-{shown(value['high'])})"
    if isinstance(value, str):
        return value
    if 0.995 <= abs(value) < 9.995:
        return f"{value:.2f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def terminal(suite: Suite, record: Record) -> Table:
    """At most 80 columns wide."""
    table = Table(title=suite.name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), width=80)
    for name in ("", *suite.shown, "goals"):
        table.add_column(name, justify="left" if name in ("", "goals") else "right", overflow="fold")
    for row in suite.rows:
        if (found := record.row(suite.name, row.name)) is not None:
            cells = _cells(row, suite.shown, found["values"])
            table.add_row(*(cell.replace("; ", "\n").replace(" (", "\n").replace(")", "") for cell in cells))
    return table


def _cells(row: Row, shown: tuple[str, ...], values: dict[str, Value]) -> list[str]:
    return [row.name, *(marked(row, quantity, values) for quantity in shown), "; ".join(map(str, row.goals))]


def markdown(suites: dict[str, Suite], record: Record) -> str:
    """All that a record holds, with the machine, the versions and the commands."""
    machine = ", ".join(f"{key} {value}" for key, value in record.content["machine"].items())
    lines = ["# Benchmark", "", machine, ""]
    for suite in suites.values():
        kept = [(row, found) for row in suite.rows if (found := record.row(suite.name, row.name)) is not None]
        if not kept:
            continue
        lines += [f"## {suite.name}", "", f"{suite.about}.", ""]
        quantities = (*suite.shown, *suite.more)
        heads = ["", *quantities, "goals"]
        lines += [_line(heads), _line(["---"] * len(heads))]
        lines += [_line(_cells(row, quantities, found["values"])) for row, found in kept]
        lines += [""] + [f"- {row.name}: {row.note}" for row, _ in kept if row.note] + [""]
        lines += [f"    {made}" for made in dict.fromkeys(_made(suite.name, found["made"]) for _, found in kept)] + [""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _made(suite: str, made: dict[str, Any]) -> str:
    commit = f"{made['git'][:9]}{' (changed)' * bool(made['dirty'])}" if made["git"] else "no commit"
    names = ("torch", "transformers", *(PEERS if suite == "peers" else ()), "python")
    versions = ", ".join(f"{name} {made[name]}" for name in names)
    return f"{made['finished'][:10]}, {commit}, {versions}: {made['command']}"
