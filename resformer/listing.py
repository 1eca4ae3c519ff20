"""The registries as tables: for the command line and the README."""

from __future__ import annotations

import re
import sys

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from resformer.data.tasks import TASKS
from resformer.errors import unknown
from resformer.hosts import families
from resformer.schemes import Scheme, schemes

HOST_KINDS = {"post": "post-LN", "pre": "pre-LN"}


def schemes_table() -> Group:
    """Every scheme by idea: what it is, its update, the hosts it can keep, where it comes from."""
    tables: list[RenderableType] = []
    for idea, members in by_idea().items():
        table = Table(title=idea, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(width=max(map(len, schemes())))
        table.add_column(overflow="fold")
        for name, cls in members.items():
            card = cls.card()
            found = re.findall(r"arXiv:[0-9.]+[0-9]|https://\S+", card["reference"])
            table.add_row(f"[bold]{name}[/bold]", card["summary"])
            table.add_row("", escape(card["equation"]))
            table.add_row("", f"[dim]keeps {_preserves(cls.preserves)}; {', '.join(found)}[/dim]")
        tables += [table, ""]
    return Group(*tables[:-1])


def by_idea() -> dict[str, dict[str, type[Scheme]]]:
    """The registered schemes under the first line of the file that each stands in."""
    found: dict[str, dict[str, type[Scheme]]] = {}
    for name, cls in schemes().items():
        idea = (sys.modules[cls.__module__].__doc__ or cls.__module__).strip().splitlines()[0]
        found.setdefault(idea, {})[name] = cls
    return found


def scheme_card(name: str) -> Table:
    """All that the docstring of one scheme says."""
    if name not in schemes():
        raise unknown("scheme", name, schemes())
    cls = schemes()[name]
    table = _table("", "")
    for key, text in cls.card().items():
        table.add_row(key, escape(text))
    table.add_row("preserves", _preserves(cls.preserves))
    table.add_row("placement", f"{cls.placement} with init='paper'" if cls.norms is None else "fixed by the scheme")
    return table


def schemes_markdown() -> str:
    """The README's tables, one for each idea."""
    parts = []
    for idea, members in by_idea().items():
        rows = [idea, "", "| scheme | update | keeps | reference |", "|---|---|---|---|"]
        for name, cls in members.items():
            card = cls.card()
            equation, reference = (card[key].replace("|", "\\|") for key in ("equation", "reference"))
            rows.append(f"| `{name}` | {equation} | {_preserves(cls.preserves)} | {reference} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def hosts_table() -> Table:
    """Every family with its kind, sites and inside points."""
    table = _table("family", "kind", "stack", "sites", "layer class")
    for name, family in families().items():
        for stack in family.stacks:
            sites = ", ".join(site.name for site in stack.sites)
            table.add_row(name, HOST_KINDS[family.kind], stack.name, sites, stack.layer_name.rpartition(".")[2])
    return table


def tasks_table() -> Table:
    """Every task with its columns and metrics; those built in need no data."""
    table = _table("task", "", "what", "metrics")
    for name, task in TASKS.items():
        table.add_row(name, "built in" if task.builtin else "GLUE", task.summary, ", ".join(task.metrics))
    return table


def _preserves(kinds: tuple[str, ...]) -> str:
    return " and ".join(HOST_KINDS[kind] for kind in kinds) + " hosts" if kinds else "no host"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(columns))
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    return table
