"""Whether what a family names as projections, embeddings and norms has the shapes of such."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from resformer.host import Host, HostStack, width_of
from resformer.hosts.family import Projection, Site
from resformer.layer import find
from resformer.swap import host_class

ENDS = ("o", "down")  # these give the stream's width; the others take it


def check_shapes(host: Host) -> None:
    """A `ValueError` for the first point, embedding or norm around the layers that cannot be what it is named as."""
    for stack in host.stacks:
        who = f"family {host.family.name!r} does not fit {type(stack.root).__name__}"
        layer = next(layer for layer in stack.layers if stack.fits(layer))
        width = width_of(stack, layer)
        sizes = {
            site.name: _sizes_of_points(f"{who}: in site {site.name!r}", layer, site, width)
            for site in stack.sites(layer)
        }
        _check_slices(who, layer, stack.sites(layer))
        for site in stack.sites(layer):
            _check_meeting(f"{who}: in site {site.name!r}", site, sizes[site.name])
        _check_embeddings(who, stack, width)
        for name in ("embed_norm", "final_norm"):
            path = getattr(stack.spec, name)
            norm: Any = find(stack.root, path) if path else None
            if norm is not None and any(p.ndim > 1 for p in norm.parameters()):
                raise ValueError(f"{who}: `{name}` is {path!r}, a {_class(norm)}, which is no norm")


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """How much a linear map takes and gives, or None for anything else."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    inputs, outputs = weight.shape if isinstance(module, Conv1D) else weight.shape[::-1]
    return inputs, outputs


def _sizes_of_points(who: str, layer: nn.Module, site: Site, width: int) -> dict[str, tuple[int, int]]:
    """How much each point takes and gives; a `ValueError` where that is not what a point of its name does."""
    sizes: dict[str, tuple[int, int]] = {}
    for point, named in site.points.items():
        for projection in named.every:
            path, module = projection.path, find(layer, projection.path)
            if (found := sizes_of(module)) is None:
                raise ValueError(f"{who} point {point!r} is {path!r}, a {_class(module)}, which is no linear map")
            takes, gives = found
            if gives % projection.parts:
                raise ValueError(
                    f"{who} point {point!r} is a part of {projection.parts} of {path!r}, which gives {gives}, and that "
                    "does not divide; how many does it hold?"
                )
            if point in ENDS and gives != width:
                raise ValueError(
                    f"{who} point {point!r} is {path!r}, which gives {gives}, and the stream is {width} wide; 'o' and "
                    "'down' are the maps at the end of a sublayer"
                )
            if point not in ENDS and takes != width and not (site.when and point in ("k", "v")):  # of other states
                raise ValueError(
                    f"{who} point {point!r} is {path!r}, which takes {takes}, and the stream is {width} wide; 'q', "
                    "'k', 'v', 'up' and 'gate' are the maps at the beginning of a sublayer"
                )
            sizes[point] = takes, gives // projection.parts
    return sizes


def _check_meeting(who: str, site: Site, sizes: dict[str, tuple[int, int]]) -> None:
    for first, last in (("v", "o"), ("up", "down")):
        if first in sizes and last in sizes and sizes[last][0] % sizes[first][1]:  # heads may share their values
            raise ValueError(
                f"{who} point {first!r} gives {sizes[first][1]}, and {last!r} takes {sizes[last][0]}; is "
                f"{site.points[first].path!r} fused? Then say of how many `parts`"
            )


def _check_slices(who: str, layer: nn.Module, sites: list[Site]) -> None:
    """Two points at one path are different slices of one division of it."""
    known: dict[int, tuple[str, Projection]] = {}
    for point, projection in ((p, one) for site in sites for p, named in site.points.items() for one in named.every):
        module = id(find(layer, projection.path))
        other, before = known.setdefault(module, (point, projection))
        if before is projection:
            continue
        if projection.parts != before.parts or projection.by_head != before.by_head:
            raise ValueError(
                f"{who}: points {other!r} and {point!r} are slices of {projection.path!r}, and have to say alike of "
                f"how many `parts` and whether `by_head`; got {before} and {projection}"
            )
    taken: dict[tuple[int, int], str] = {}
    for point, projection in ((p, one) for site in sites for p, named in site.points.items() for one in named.every):
        key = id(find(layer, projection.path)), projection.part
        if key in taken:
            raise ValueError(
                f"{who}: points {taken[key]!r} and {point!r} are both {projection.path!r}"
                + (f", part {projection.part} of {projection.parts}" if projection.parts > 1 else "")
                + "; where it is fused, say which `part` of how many `parts` each is"
            )
        taken[key] = point


def _check_embeddings(who: str, stack: HostStack, width: int) -> None:
    for path in stack.spec.embeddings:
        table: Any = find(stack.root, path)
        if table is None:
            continue
        weight = getattr(table, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"{who}: {path!r} of `embeddings` is a {_class(table)}, which is no table of embeddings")
        if weight.shape[1] != width and not _is_projected(stack, weight.shape[1], width):
            raise ValueError(
                f"{who}: {path!r} of `embeddings` is {weight.shape[1]} wide, and the stream is {width} wide, with "
                "nothing between that takes the one to the other"
            )


def _is_projected(stack: HostStack, narrow: int, width: int) -> bool:
    """Whether outside the layers a linear map takes embeddings to the stream (ELECTRA, ALBERT, OPT)."""
    inside = {id(module) for layer in stack.layers for module in layer.modules()}
    maps = (sizes_of(module) for module in stack.root.modules() if id(module) not in inside)
    return (narrow, width) in maps


def _class(module: Any) -> str:
    return host_class(module).__name__ if isinstance(module, nn.Module) else type(module).__name__
