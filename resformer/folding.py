"""Merge a scheme into its host's weights: a plain model that computes the same and needs no resformer."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from resformer.edits import edits_of, eps_name, names_ends, offset_of, scale, slices_of
from resformer.host import Host, HostStack, find_host, width_of
from resformer.hosts.family import Site
from resformer.layer import Edit, Residual, find, settings_of
from resformer.patching import detach, is_patched, unmark
from resformer.probing import difference, probe
from resformer.schemes import find_scheme
from resformer.schemes.base import Branch
from resformer.swap import swapped

CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}  # how near the folded model must come; half precision: 0.05


@dataclass(frozen=True)
class Sum:
    """What a site was found to compute: N(λ x + c ⊙ F(p N'(x)))."""

    shortcut: Tensor  # λ: (D), a constant vector where it can be folded
    branch: Tensor  # c: (D)
    inside: float  # p, between the norm on the branch's input and the sublayer


def fold(model: PreTrainedModel) -> PreTrainedModel:
    """Merge the scheme of a patched model into the weights of its host, in place, and take resformer off.

    What each site computes is measured: where it is the host's own residual connection with constant factors on its
    two sides (layer_scale, rezero, scaled, deepnorm ...; drop_path in evaluation; a schedule where it stands; a gate
    that never learned), the factors go into the weights and biases around it, and the model becomes an ordinary one
    that `save_pretrained` writes and plain transformers loads. It computes the same up to rounding, in evaluation:

    x + c F(x)                 c goes into the branch's last projection, or into the norm that it ends with
    N(λ x + c F(x); eps)       λ must be one number. The norm before it takes on s λ and the projections that read the
                               stream 1 / (s λ), where s² = (the host's eps) / eps, since a configuration has only one
                               eps; so hidden states between the layers may have another scale than before

    The scheme's parameters are gone afterwards, and weights that took factors learn at another pace: fold what is
    trained. Returns the same model. Raises a ValueError that says why, and leaves the model as it was, if it is not
    patched, if the scheme is no such sum (gates, several streams, a history, norms that the host does not have), if a
    weight that would change is used in two places, or if the result is measured to differ.
    """
    host = find_host(model)
    if not is_patched(model):
        raise ValueError(f"this {type(model).__name__} is not patched; there is nothing to fold")
    if getattr(model.config, "ffn_cardinality", None) is not None:
        raise _refusal(host, "its feed-forwards are sums of bottlenecks, which no plain host has")
    if any(stack.shared for stack in host.stacks):
        raise _refusal(host, "its layers share their weights, which cannot take on a factor for each")
    changes = [change for stack in host.stacks for change in _changes(host, stack, _sums(host, stack))]
    _check_uses(host, changes)
    expected = probe(host)
    restore = _carry_out(host, changes)
    try:
        change = difference(probe(host), expected)
        close = CLOSE.get(expected.dtype, 0.05)
        if not change <= close:
            raise _refusal(host, f"the folded model differs by {change:.1e} (relative), and {close:.0e} is allowed")
    except BaseException:
        restore()
        raise
    detach(host, edit_weights=False)
    unmark(model)
    return model


def _refusal(host: Host, reason: str) -> ValueError:
    settings = settings_of(host.model)
    name = settings["scheme"] if settings else ""
    return ValueError(
        f"scheme {name!r} cannot be folded into this {type(host.model).__name__}: {reason}. Save it patched "
        "(resformer.from_pretrained loads it), or give it up with resformer.unpatch"
    )


# ---------------------------------------------------------------------------------------------------- what is computed


def _sums(host: Host, stack: HostStack) -> list[tuple[int, Site, Sum]]:
    """What every patched site computes, in order; a ValueError where it is not the host's sum with factors."""
    found = []
    for number, own in stack.residuals().items():
        layer = stack.layers[number]
        sites = [site for site in stack.sites(layer) if site.name in own.acts]
        _check_norms(host, stack, own, sites)
        try:
            sums = _measure(own, sites, width_of(stack, layer))
        except _NoSum as error:
            raise _refusal(host, f"in layer {number} {error}") from None
        for site, one in zip(sites, sums, strict=True):
            post = "post" in own.acts[site.name]
            even = bool((one.shortcut - one.shortcut[0]).abs().max() <= 1e-12 * one.shortcut[0].abs())
            if not (even and one.shortcut[0] > 0) if post else bool((one.shortcut - 1).abs().max() > 1e-12):
                need = "one positive number before a norm" if post else "1 where no norm follows"
                raise _refusal(host, f"the factor on its shortcut has to be {need}, in layer {number} it is not")
            found.append((number, site, one))
    return found


def _check_norms(host: Host, stack: HostStack, own: Residual, sites: list[Site]) -> None:
    made = [name for name, _ in own.named_children() if name.endswith("_norm")]
    final = stack.spec.final_norm
    over = bool(final) and swapped(find(stack.root, final), "norm")
    over = over and not any(hasattr(other, "resformer_readout") for other in stack.layers)
    if made or over or any(own.acts[site.name] != dict(site.norms) for site in sites):
        raise _refusal(host, "its norms act elsewhere than the host's own")


class _NoSum(Exception):
    """Why a site is no sum with constant factors."""


@torch.no_grad()
def _measure(own: Residual, sites: list[Site], width: int) -> list[Sum]:
    """Run the schemes of a layer on random numbers, with branches and norms that answer with other random numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:  # tokens of several sizes, as trained nets have them
        sizes = torch.logspace(-2, 4, 8, dtype=torch.float64)[:, None]
        return sizes * torch.randn(2, 8, width, generator=generator, dtype=torch.float64)

    def same(s: Any, x: Tensor) -> bool:
        return isinstance(s, Tensor) and torch.equal(s, x)

    # a copy in double precision and evaluation mode, on the CPU, leaves the model's own alone
    schemes = {name: copy.deepcopy(getattr(own, name)).cpu().double().eval() for name in own.scheme_names}
    steps = [schemes["block"]] if own.steps_block else [schemes[site.name] for site in sites]
    sums = []
    s: Any = draw()
    x: Tensor = s
    if own.opens and not same(s := steps[0].start(x), x):
        raise _NoSum("more than one stream is carried, or one that is not the host's")
    for number, scheme in enumerate(steps):
        site = None if own.steps_block else sites[number]
        asked: list[Tensor] = []
        summed: list[Tensor] = []
        y, n = draw(), draw()

        def branch(given: Tensor, values: Any = None, asked: list[Tensor] = asked, y: Tensor = y) -> Tensor:
            if values is not None:
                raise _NoSum("it changes the values of attention")
            asked.append(given)
            return y

        def norm(given: Tensor, summed: list[Tensor] = summed, n: Tensor = n) -> Tensor:
            summed.append(given)
            return n

        has_norm = site is not None and "post" in own.acts[site.name]
        x, y = x.detach().requires_grad_(), y.requires_grad_()
        s = tuple(x if same(part, x) else part for part in s) if isinstance(s, tuple) else x if same(s, x) else s
        try:
            with torch.enable_grad():
                s = scheme.step(s, Branch(branch), norm if has_norm else lambda z: z)
        except _NoSum:
            raise
        except Exception as error:
            raise _NoSum(f"it does not act as a sum of stream and branch ({error})") from None
        z = summed[0] if len(summed) == 1 else s[0] if isinstance(s, tuple) else s
        if isinstance(z, Tensor) and not bool(z.isfinite().all()):
            raise _NoSum("it computes NaN or infinity: its parameters are not finite")
        if len(asked) != 1 or not torch.equal(asked[0], x):
            raise _NoSum("a sublayer does not see the stream itself, once")
        if len(summed) != has_norm:
            raise _NoSum("the norm after the add does not see the sum, once")
        sums.append(Sum(*_factors(x, y, z), inside=_inside(scheme, site, own, draw())))
        x = n if has_norm else z
    if not same(s, x):
        raise _NoSum("more than one stream is carried from layer to layer")
    if own.closes:
        n = draw()
        if not same(steps[-1].finish(s, lambda given: n if same(given, x) else given), n):
            raise _NoSum("what leaves the last layer is not the stream alone")
    if own.steps_block:  # x + f(x) with f(x) = layer(x) - x is the layer
        if bool((sums[0].branch - 1).abs().max() > 1e-12) or bool((sums[0].shortcut - 1).abs().max() > 1e-12):
            raise _NoSum("a step over the layer is not the layer")
        sums = sums * len(sites)
    return sums


def _factors(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """λ, c: (D) with z = λ x + c y, by least squares over the tokens."""
    if z.shape != x.shape:
        raise _NoSum("more than one stream is carried")
    sides = torch.stack([x.detach(), y.detach()], dim=-1).flatten(0, 1).transpose(0, 1)  # (D, tokens, 2)
    factors = torch.linalg.lstsq(sides, z.flatten(0, 1).T.unsqueeze(-1)).solution
    rest = (sides @ factors).squeeze(-1).T.unflatten(0, z.shape[:2]) - z
    if not bool((rest.abs().amax(-1) <= 1e-10 * z.abs().amax(-1)).all()):
        raise _NoSum("it is no sum with constant factors: they depend on the token, or other states come in")
    shortcut, branch = (_exact(factor) for factor in factors.squeeze(-1).unbind(-1))
    # a gate may be constant here and not elsewhere, as a hard one is between its steps: its gradient tells
    for side, factor in ((x, shortcut), (y, branch)):
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(z.sum(), side, retain_graph=True, allow_unused=True)
        slope = torch.zeros_like(side) if slope is None else slope
        if not torch.allclose(slope, factor.expand_as(slope), rtol=1e-9, atol=1e-9):
            raise _NoSum("it is no sum with constant factors: they depend on the token")
    return shortcut, branch


def _exact(factors: Tensor) -> Tensor:
    """A factor that is 0 or 1 up to the rounding of least squares is just that, and changes no weight."""
    near = factors.round().clamp(0, 1)
    return torch.where((factors - near).abs() <= 1e-13, near, factors)


def _inside(scheme: Any, site: Site | None, own: Residual, x: Tensor) -> float:
    """The constant with which a scheme multiplies what enters the sublayer; it may act nowhere else inside."""
    projections = {"q", "k", "v", "o", "up", "down"}  # of which a site has its own
    points = [point for point in scheme.points if site and (point not in projections or point in site.points)]
    if not points:
        return 1.0
    if points != ["in"]:
        raise _NoSum(f"it acts inside the sublayer ({', '.join(points)})")
    y = scheme.inside("in", x)
    factor = float((y / x).mean())
    if not torch.allclose(y, factor * x, rtol=1e-12, atol=0):
        raise _NoSum("it changes what enters the sublayer by more than a constant factor")
    return factor


# ---------------------------------------------------------------------------------------------------- the weights


@dataclass(frozen=True)
class Change:
    """A weight, by its path from a module, and what it is multiplied with: a number, or (D) along its output."""

    root: nn.Module
    edit: Edit
    factor: Tensor

    @property
    def parameter(self) -> nn.Parameter:
        return find(self.root, self.edit.path)


def _changes(host: Host, stack: HostStack, sums: list[tuple[int, Site, Sum]]) -> list[Change]:
    """Which weights take on the factors; a ValueError where there is none that could."""
    changes = []
    for number, site, one in sums:
        layer: Any = stack.layers[number]
        acts = layer.resformer.acts[site.name]
        factor, stream = 1.0, 1.0
        if "post" in acts:
            eps, original = _eps(layer, acts["post"]), _host_eps(layer, acts["post"])
            factor = 1.0 if eps == original else math.sqrt(original / eps)
            stream = factor * float(one.shortcut[0])
            if abs(stream - 1) > 1e-12:
                changes += _on_stream(host, stack, number, site, stream)
            else:
                stream = 1.0
        changes += _at(host, stack, layer, site, "branch", factor * one.branch)
        if "pre" in acts:
            for slot in acts:
                if slot.startswith("pre"):
                    changes += _norm_changes(layer, acts[slot], one.inside)
        else:
            enters = ("q",) if site.name == "cross" else ("q", "k", "v", "up", "gate")
            for role in enters:
                changes += _at(host, stack, layer, site, role, torch.tensor(one.inside / stream, dtype=torch.float64))
            reads = {"q", "k", "v"} if site.name == "attn" else set(enters) & set(site.points)
            if one.inside != stream and not (reads and reads <= set(site.points)):
                raise _refusal(host, f"family {host.family.name!r} does not name the projections that read the stream")
    return changes


def _check_uses(host: Host, changes: list[Change]) -> None:
    uses = Counter(id(p) for _, p in host.model.named_parameters(remove_duplicate=False))
    for change in changes:
        if uses[id(change.parameter)] > 1:
            raise _refusal(host, f"{change.edit.path!r} would take on a factor, and its weights are used elsewhere too")


def _eps(layer: Any, norm: str) -> float:
    return getattr(find(layer, norm), eps_name(find(layer, norm)))


def _host_eps(layer: Any, norm: str) -> float:
    """The eps that a norm has in the host, which the scheme may have multiplied."""
    path = f"{norm}.{eps_name(find(layer, norm))}"
    originals = [edit.original for edit in layer.resformer.edited if edit.path == path]
    return originals[0] if originals else _eps(layer, norm)


def _at(host: Host, stack: HostStack, layer: nn.Module, site: Site, role: str, factor: Tensor) -> list[Change]:
    if bool((factor == 1).all()):
        return []
    if role == "branch" and not names_ends(site):
        raise _refusal(
            host, f"family {host.family.name!r} does not name the projection that site {site.name!r} ends with"
        )
    return [Change(layer, edit, factor) for edit in edits_of(stack, layer, site, role, 1.0)]


def _norm_changes(root: nn.Module, path: str, factor: float) -> list[Change]:
    named = [name for name, _ in find(root, path).named_parameters()]
    if factor == 1:
        return []
    return [
        Change(root, Edit("norm", f"{path}.{name}", 1.0), torch.tensor(factor, dtype=torch.float64)) for name in named
    ]


def _on_stream(host: Host, stack: HostStack, number: int, site: Site, factor: float) -> list[Change]:
    """Scale what a site reads: by the norm that the stream left last."""
    if any(other.when for other in stack.sites(stack.layers[number])):
        raise _refusal(host, "its stream would need another scale, and the layers' cross-attention may be left out")
    sites = stack.sites(stack.layers[number])
    before = sites.index(site) - 1
    if before < 0 and number == 0:
        if not stack.spec.embed_norm:
            raise _refusal(host, "its stream would need another scale, and no norm follows the embeddings")
        return _norm_changes(stack.root, stack.spec.embed_norm, factor)
    layer = stack.layers[number if before >= 0 else number - 1]
    return _norm_changes(layer, sites[before].norms["post"], factor)


@torch.no_grad()
def _carry_out(host: Host, changes: list[Change]) -> Callable[[], None]:
    """Change the weights and give the sites the plain residual; returns how to take all of it back."""
    originals = {id(change.parameter): (change.parameter, change.parameter.clone()) for change in changes}
    replaced: list[tuple[Any, str, Any]] = []
    for layer in host.layers:
        own = getattr(layer, "resformer", None)
        if own is None:
            continue
        for name, acts in own.acts.items():
            if not own.steps_block:
                replaced.append((own, name, getattr(own, name)))
                setattr(own, name, find_scheme("identity", {})(getattr(own, name).place))
            if "post" in acts:
                norm = find(layer, acts["post"])
                name, original = eps_name(norm), _host_eps(layer, acts["post"])
                replaced.append((norm, name, getattr(norm, name)))
                setattr(norm, name, original)
    for change in changes:
        _multiply(change)

    @torch.no_grad()
    def restore() -> None:
        for module, name, value in replaced:
            setattr(module, name, value)
        for parameter, value in originals.values():
            parameter.copy_(value)

    return restore


def _multiply(change: Change) -> None:
    edit, parameter = change.edit, change.parameter
    module, _, name = edit.path.rpartition(".")
    module = find(change.root, module)
    offset = offset_of(module) if name == "weight" else 0.0
    wide = torch.promote_types(parameter.dtype, torch.float32)
    factor = change.factor.to(parameter.device, wide)
    outputs = 1 if isinstance(module, Conv1D) else 0  # the axis of a matrix along which its outputs lie
    if factor.ndim and parameter.ndim == 2 and outputs == 0:
        factor = factor.unsqueeze(1)
    for part in slices_of(change.root, edit):
        exact = part.to(wide)
        scale(exact, factor, offset)
        part.copy_(exact)
