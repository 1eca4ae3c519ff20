"""The registries as tables: for the command line and the README."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from resformer.checkpoint import outline
from resformer.data.tasks import TASKS
from resformer.description import Description, describe
from resformer.errors import unknown
from resformer.hosts import families
from resformer.schemes import Scheme, schemes
from resformer.support import by_reason, can_be_made, refusal

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
    """Every family with its kind, stacks, sites and inside points, and how many schemes keep it or serve it at all."""
    table = _table("family", "kind", "stack", "sites", "points", "schemes")
    known: dict[str, str] = {}  # those that differ in the name of their layers alone serve the same
    for name, family in families().items():
        build = repr([replace(stack, layer="", embeddings=stack.embeddings[:1]) for stack in family.stacks])
        if build not in known:
            known[build] = ""
            if can_be_made(name):
                kept, changed, _ = _served(name)
                known[build] = f"{len(kept)}, {len(kept) + len(changed)}"
        counts = known[build]
        for stack in family.stacks:
            sites = " ".join(site.name for site in stack.sites)
            points = dict.fromkeys(point for site in stack.sites for point in site.points)
            row = name, HOST_KINDS[family.kind], stack.name, sites, " ".join(points), counts
            table.add_row(*(row if stack is family.stacks[0] else ("", "", *row[2:5], "")))
    table.caption = (
        "schemes: how many keep what the model computes, and how many serve it at all; more: resformer hosts NAME, of "
        "a family, a folder with a checkpoint, or a hub id"
    )
    table.caption_justify = "left"
    table.columns[0].no_wrap = True  # a name that can be copied
    return table


def host_card(name: str) -> Table | Description:
    """All about a family, or about the model of a checkpoint, of which the configuration is enough."""
    if name in families():
        return family_card(name)
    return describe(outline(name))


def family_card(name: str) -> Table:
    """All that the spec of one family says, and what each scheme can do with it."""
    family = families()[name]
    table = _table("", "")
    table.add_row("family", f"{name}, {HOST_KINDS[family.kind]}")
    if family.only:
        table.add_row("only", ", ".join(f"config.{key} = {value!r}" for key, value in family.only.items()))
    if family.note:
        table.add_row("note", escape(family.note))
    for stack in family.stacks:
        table.add_row(stack.name, stack.layer_name)
        table.add_row("", f"layers: {stack.layers}; final norm: {stack.final_norm or 'none'}")
        for site in stack.sites:
            branch = " + ".join(" → ".join(part.calls) for part in site.parts or (site,))
            norms = "; ".join(f"{slot}: {path}" for slot, path in site.norms.items()) or "none"
            table.add_row(f"  {site.name}", f"branch: {branch}" + (f" (with {site.when})" if site.when else ""))
            table.add_row("", f"norms: {norms}; points: {' '.join(site.points) or 'none'}")
    if not can_be_made(name):
        table.add_row("schemes", "not known: there is no `config` from which a tiny model can be made to try them on")
        return table
    kept, changed, refused = _served(name)
    table.add_row("kept by", f"{len(kept)} schemes, with init='preserve': {', '.join(kept)}")
    table.add_row("changed by", f"{len(changed)} schemes, with init='paper' only: {', '.join(changed) or 'none'}")
    if not refused:
        table.add_row("refused", "no scheme")
    for reason, names in refused.items():
        table.add_row("refused", escape(f"{', '.join(names)}: {reason}"))
    return table


def _served(family: str) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """The schemes that keep a family, those that only change it, and by reason those that it refuses."""
    kept, changed = [], []
    refused: dict[str, str] = {}
    for name in schemes():
        if refusal(family, name) is None:
            kept.append(name)
        elif (reason := refusal(family, name, "paper")) is None:
            changed.append(name)
        else:
            refused[name] = reason
    return kept, changed, by_reason(refused)


def tasks_table() -> Table:
    """Every task with its columns and metrics; those built in need no data."""
    table = _table("task", "", "what", "metrics")
    for name, task in TASKS.items():
        source = "built in" if task.builtin else task.reference.split(", ")[1]
        table.add_row(name, source, task.summary, ", ".join((*task.metrics, *task.also)))
    return table


def _preserves(kinds: tuple[str, ...]) -> str:
    return " and ".join(HOST_KINDS[kind] for kind in kinds) + " hosts" if kinds else "no host"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=any(columns))
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    return table
