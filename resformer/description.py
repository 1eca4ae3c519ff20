"""Say what a patched model computes: in a terminal, as text, or in a notebook."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from textwrap import fill
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape as markup
from rich.table import Table
from torch import nn

from resformer.grouped import bottleneck
from resformer.host import Host, HostStack, find_host, heads_of, width_of
from resformer.hosts.family import class_name
from resformer.layer import Residual, find
from resformer.patching import is_patched
from resformer.plan import width_at
from resformer.shapes import check_shapes
from resformer.sizes import Match, layer_parameters
from resformer.support import by_reason, refusals
from resformer.swap import swapped

SUBSCRIPT = {"pre": "on the branch's input", "out": "on the branch's output", "post": "after the add"}


@dataclass(frozen=True)
class Description:
    """What `describe` found: rows of (what, value); prints as text, with rich, and as HTML."""

    title: str
    rows: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        wide = max(len(name) for name, _ in self.rows)
        lines = (
            fill(value, 80, initial_indent=f"  {name:<{wide}}  ", subsequent_indent=" " * (wide + 4))
            for name, value in self.rows
        )
        return "\n".join([self.title, *lines])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=self.title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in self.rows:
            table.add_row(f"[dim]{name}[/dim]", markup(value))
        yield table

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th align=left>{escape(n)}</th><td align=left>{escape(v)}</td></tr>" for n, v in self.rows)
        return f"<table><caption align=top>{escape(self.title)}</caption>{rows}</table>"


def describe(model: nn.Module) -> Description:
    """The equation in force on this host, its sites, norms, extra parameters and the measured preservation error.

    An unpatched model is described as the host it is: what would be patched, which schemes keep what it computes (with
    init="preserve"), which change it (with init="paper" only), and which cannot stand in it.

    Raises a ValueError for a model without a family.
    """
    host = find_host(model)
    depth = " + ".join(str(len(stack.layers)) for stack in host.stacks)
    title = f"{type(model).__name__}, family {host.family.name} ({host.family.kind}-LN), {depth} layers"
    if not is_patched(model):
        return Description(title, tuple(_unpatched(host)))

    patched = [(stack, found) for stack in host.stacks if (found := stack.residuals())]
    own = next(iter(patched[0][1].values()))
    settings, scheme = own.settings, own.schemes[-1]
    options = ", ".join(f"{name}={value!r}" for name, value in settings["options"].items())
    everything = [one for _, found in patched for one in found.values()]
    added = sum(p.numel() for one in everything for p in one.parameters())
    total = sum(p.numel() for p in model.parameters())
    frozen = len({(id(stack.layers[n]), path) for stack, found in patched for n in found for path in found[n].frozen})
    rows = [
        ("scheme", f"{settings['scheme']}({options}), init={settings['init']!r}, placement={settings['placement']!r}"),
        ("equation", equation(model)),
        ("reference", scheme.card()["reference"]),
    ]
    for stack in host.stacks:
        if found := stack.residuals():
            rows += _of_stack(stack, found, f"{stack.spec.name} " if len(host.stacks) > 1 else "")
        else:
            rows.append((f"{stack.spec.name} layers", f"{len(stack.layers)}, not patched: as the host has them"))
    rows.append(("parameters added", f"{added:,} of {total:,} ({added / total:.2%})"))
    config: Any = getattr(model, "config", None)
    if (cardinality := getattr(config, "ffn_cardinality", None)) is not None:
        size, more = bottleneck(config.hidden_size, config.intermediate_size, cardinality)
        than = f"{more:+,} parameters a layer against the plain one of {config.intermediate_size}"
        rows.append(("feed-forward", f"sum of {cardinality} bottlenecks of width {size}, {than}"))
    if (wanted := getattr(config, "matched_parameters", None)) is not None:
        rows.append(("matched", str(Match(config.hidden_size, layer_parameters(host.model), wanted))))
    if frozen:
        rows.append(("not used", f"{frozen} parameters of the host's norms: kept, not trained"))
    if hasattr(scheme, "evaluations"):  # of solvers
        counts = [str(getattr(one.schemes[-1], "evaluations", None) or "?") for one in everything]
        rows.append(("evaluations", f"of each layer, first to last, in the last forward: {', '.join(counts)}"))
    rows.append(("preservation", _preservation(own.difference, settings["init"])))
    return Description(title, tuple(rows))


def _unpatched(host: Host) -> list[tuple[str, str]]:
    """What there is to patch, and with which schemes."""
    check_shapes(host)
    rows = [("scheme", "none: the host's own residual connections")]
    if host.family.note:
        rows.append(("note", host.family.note))
    for stack in host.stacks:
        rows += _of_host_stack(stack, f"{stack.spec.name} " if len(host.stacks) > 1 else "")
    keeping, serving = refusals(host), refusals(host, "paper")
    kept = [name for name, reason in keeping.items() if reason is None]
    only = [name for name, reason in serving.items() if reason is None and name not in kept]
    refused = {name: reason for name, reason in serving.items() if reason is not None and name not in kept}
    for what, names in (("kept by", kept), ("changed by", only), ("refused by", list(refused))):
        rows.append((what, f"{len(names)} of {len(keeping)} schemes: {', '.join(names)}" if names else "no scheme"))
    rows += [("", f"{', '.join(names)}: {reason}") for reason, names in by_reason(refused).items()]
    return rows


def _of_host_stack(stack: HostStack, prefix: str) -> list[tuple[str, str]]:
    numbers, spec = stack.fitting, stack.spec
    layer = stack.layers[numbers[0]]
    sites = stack.sites(layer)
    count = f"{len(numbers)} of {spec.layer_name.rpartition('.')[2]}"
    others = {class_name(type(one)).rpartition(".")[2] for n, one in enumerate(stack.layers) if n not in numbers}
    if others:
        count += f" (numbers {', '.join(map(str, numbers))}; the others, {', '.join(sorted(others))}, stay as they are)"
    if stack.shared:
        count += ", which share their weights"
    heads = heads_of(stack, layer)
    rows = [
        (f"{prefix}layers", f"{count}, sites: {', '.join(site.name for site in sites)}"),
        (f"{prefix}width", f"{width_of(stack, layer)}, {heads or 'unknown number of'} heads"),
    ]
    for site in sites:
        rows.append((f"{prefix}norms of {site.name}", _norms(dict(site.norms))))
        if site.points:
            widths = ", ".join(
                f"{point} {width_at(layer, point, projection)}" for point, projection in site.points.items()
            )
            rows.append((f"{prefix}points of {site.name}", widths))
    rows.append((f"{prefix}final norm", spec.final_norm or "none"))
    return rows


def _of_stack(stack: HostStack, found: dict[int, Residual], prefix: str) -> list[tuple[str, str]]:
    first, last = min(found), max(found)
    own = found[first]
    rows = [(f"{prefix}layers", f"{first} to {last} of {len(stack.layers)}, sites: {', '.join(own.acts)}")]
    rows += [(f"{prefix}norms of {site}", _norms(acts)) for site, acts in own.acts.items()]
    rows.append((f"{prefix}final norm", _final_norm(stack, found[last])))
    if own.edited:
        gains = ", ".join(f"{edit.path} × {edit.gain:.4g}" for edit in own.edited)
        rows.append((f"{prefix}edited", f"{gains} in layer {first}"))
    return rows


def equation(model: nn.Module) -> str:
    """The update that a patched model computes at each site, with the norms of this host in it, N for a norm."""
    own = next(module for module in model.modules() if isinstance(module, Residual))
    scheme = own.schemes[-1]
    text, acts = scheme.formula(), own.acts[own.scheme_names[0]]
    if text.startswith("x ← Σ") and "F(" not in text:  # it mixes what whole layers give
        return f"{text}; in the layers {_normed('x ← x + F(x)', acts)}"
    return text if scheme.norms is not None else _normed(text, acts)


def _normed(text: str, acts: dict[str, str]) -> str:
    head, arrow, rule = text.partition(" ← ")
    if not arrow or "F(" not in rule:
        return text
    rule, comma, where = rule.partition(", ")
    if "pre" in acts:
        rule = re.sub(r"F\((\w+'?)", r"F(N(\1)", rule)  # what enters the branch, to which a scheme may add
    if "out" in acts:
        rule = re.sub(r"F\(((?:[^()]|\([^()]*\))*)\)", r"N(F(\1))", rule)
    return f"{head} ← N({rule}){comma}{where}" if "post" in acts else f"{head} ← {rule}{comma}{where}"


def _norms(acts: dict[str, str]) -> str:
    if not acts:
        return "none"
    return "; ".join(f"{_where(slot)}: {path}" for slot, path in acts.items())


def _where(slot: str) -> str:
    slot, _, part = slot.partition("_")  # of sublayers side by side a part may have a norm of its own
    return f"{SUBSCRIPT[slot]} ({part})" if part else SUBSCRIPT[slot]


def _final_norm(stack: HostStack, own: Residual) -> str:
    if hasattr(own, "final_norm"):
        return "made for the scheme, in the last layer"
    path = stack.spec.final_norm
    if not path:
        return "none"
    if any(hasattr(layer, "resformer_readout") for layer in stack.layers):
        return f"{path}, inside the scheme's readout"
    return f"{path}, passed over" if swapped(find(stack.root, path), "norm") else f"{path}, the host's own"


def _preservation(difference: float | None, init: str) -> str:
    if difference is None:
        return "not measured: loaded from a checkpoint, or patched with verify=False"
    text = "bit-equal to the host" if difference == 0 else f"relative difference from the host {difference:.1e}"
    return f"{text}, measured when patched" + ("" if init == "preserve" else " (init='paper' does not keep the host)")
