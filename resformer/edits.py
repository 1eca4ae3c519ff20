"""What a scheme multiplies in its host: weights by role, and the eps of a norm; and how that is undone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from resformer.host import HostStack, heads_of
from resformer.hosts.family import Family, Projection, Site
from resformer.layer import Edit, find
from resformer.schemes import Scheme

EPS = ("eps", "variance_epsilon")  # what norms call it


def check_edits(family: Family, stack: HostStack, sites: list[Site], scheme: Scheme) -> None:
    """A `ValueError` if the scheme scales projections that the family does not name, or cannot scale by layer."""
    edits = scheme.edits()
    named = {role for site in sites for role in site.points} | ({"embed"} if stack.spec.embeddings else set())
    ends = all(names_ends(site) for site in sites)
    missing = [r for r in edits if r not in named and r != "sum" and not (r == "branch" and ends)]
    if missing:
        adds = ["add them to the `points` of its sites"] if missing != ["embed"] else []
        adds += ["name the tables that open the stack in `Stack.embeddings`"] if "embed" in missing else []
        raise ValueError(
            f"scheme {scheme.name!r} scales the weights of {', '.join(missing)}, which family {family.name!r} does not "
            f"name; {', '.join(adds)}, or take another scheme"
        )
    if stack.shared and edits:
        raise ValueError(
            f"scheme {scheme.name!r} scales weights ({', '.join(edits)}) in each layer, and the layers of this "
            f"{type(stack.root).__name__} share them; take a scheme with parameters of its own, or see whether it "
            f"scales nothing with init={'paper' if scheme.init == 'preserve' else 'preserve'!r}"
        )


def names_ends(site: Site) -> bool:
    """Whether it is known what a branch ends with: a norm, or of each of its sublayers the last projection."""
    return "out" in site.norms or all({"o", "down"} & set(part.points) for part in site.parts or (site,))


def edits_of(stack: HostStack, layer: nn.Module, site: Site, role: str, gain: float) -> list[Edit]:
    """The parameters behind a role of `Scheme.edits`; their paths start at the layer, of "embed" at the stack."""
    acts = find(layer, "resformer").acts[site.name]
    if role == "sum":
        if "post" not in acts:
            return []
        return [Edit(role, f"{acts['post']}.{eps_name(find(layer, acts['post']))}", gain * gain)]
    if role == "branch":
        ends = [site.points[point].path for point in ("o", "down") if point in site.points]
        paths = [acts["out"]] if "out" in acts else ends
        named = [(path, name) for path in paths for name, _ in find(layer, path).named_parameters(recurse=False)]
        return [Edit(role, f"{path}.{name}", gain) for path, name in named]
    if role == "embed":
        tables = [path for path in stack.spec.embeddings if find(stack.root, path) is not None]
        return [Edit(role, f"{path}.weight", gain) for path in tables]
    if role in site.points:
        every = site.points[role].every
        return [Edit(role, f"{part.path}.weight", gain, part, groups_of(stack, layer, part)) for part in every]
    return []


def eps_name(norm: nn.Module) -> str:
    """What a norm calls its eps."""
    return next(name for name in EPS if hasattr(norm, name))


def groups_of(stack: HostStack, layer: nn.Module, part: Projection) -> int:
    """Into how many groups a fused projection falls, each of which has its slices side by side."""
    if not part.by_head:
        return 1
    if (heads := heads_of(stack, layer)) is None:
        raise ValueError(
            f"{part.path!r} is fused head by head, and {stack.spec.heads!r}, the number of heads, was found neither in "
            f"the configuration nor in {type(layer).__name__}; name it in `Stack.heads`"
        )
    return heads


def slices_of(root: nn.Module, edit: Edit) -> list[Tensor]:
    """The slices of a weight that an edit is about: one, or of a projection fused head by head one for each head."""
    weight, part = find(root, edit.path).data, edit.part
    if part is None or part.parts == 1:
        return [weight]
    axis = 1 if isinstance(find(root, part.path), Conv1D) else 0
    return [group.chunk(part.parts, dim=axis)[part.part] for group in weight.chunk(edit.groups, dim=axis)]


def offset_of(module: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies with it: 1 in Gemma, whose weights start at 0."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or isinstance(module, nn.LayerNorm):
        return 0.0
    norm = copy.deepcopy(module).to("cpu", torch.float64)
    with torch.no_grad():
        norm.weight.zero_()  # type: ignore[operator]
        sample = torch.linspace(-1, 1, len(weight), dtype=torch.float64)
        return 1.0 if bool(norm(sample).any()) else 0.0


@torch.no_grad()
def scale(parameter: Tensor, gain: float | Tensor, offset: float = 0.0) -> None:
    """Multiply, in place, what a parameter stands for: itself, or in a norm with an offset the sum with it."""
    if not offset:
        parameter.mul_(gain)
        return
    wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    parameter.copy_((wide + offset) * gain - offset)


def multiply(root: nn.Module, edit: Edit) -> None:
    path, _, name = edit.path.rpartition(".")
    if name in EPS:
        edit.original = getattr(find(root, path), name)
        setattr(find(root, path), name, edit.original * edit.gain)
        return
    edit.offset = offset_of(find(root, path))
    edit.original = [view.clone() for view in slices_of(root, edit)]
    for view in slices_of(root, edit):
        scale(view, edit.gain, edit.offset)


def divide(root: nn.Module, edit: Edit) -> None:
    path, _, name = edit.path.rpartition(".")
    if name in EPS:
        setattr(find(root, path), name, edit.original)
        return
    views = slices_of(root, edit)
    originals = [None] * len(views) if edit.original is None else [one.to(views[0]) for one in edit.original]
    for view, original in zip(views, originals, strict=True):
        if original is not None:
            scaled = original.clone()
            scale(scaled, edit.gain, edit.offset)
            if torch.equal(view, scaled):
                view.copy_(original)
                continue
        if edit.gain:  # trained since, or loaded from a checkpoint; what was set to zero stays as it is
            scale(view, 1 / edit.gain, edit.offset)
