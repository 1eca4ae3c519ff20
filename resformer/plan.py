"""What patching is going to hang on each layer: schemes, norms and flags, made without touching the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from resformer.drawing import seeded
from resformer.edits import EPS, check_edits
from resformer.errors import unknown
from resformer.host import Host, HostStack, heads_of, width_of
from resformer.hosts.family import Projection, Site, class_name
from resformer.layer import Residual, find
from resformer.schemes import Place, Scheme, find_scheme, schemes
from resformer.schemes.base import INITS, PLACEMENTS, SLOTS
from resformer.shapes import check_shapes
from resformer.swap import host_class

LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")  # what configurations call it
Layers = range | slice | Sequence[int] | None
Chosen = dict[str, list[int]]  # of each stack, the layers to patch


@dataclass(frozen=True)
class StackPlan:
    """What to hang on the layers of one stack."""

    stack: HostStack
    residuals: dict[int, Residual]  # by layer; of a layer called more than once, by call
    final_norm: str  # of the host: "kept", "unused", or "moved" into the scheme's readout


@dataclass(frozen=True)
class Plan:
    """What to hang on each layer, made without touching the model."""

    placement: str
    stacks: tuple[StackPlan, ...]

    @property
    def residuals(self) -> list[Residual]:
        return [own for part in self.stacks for own in part.residuals.values()]


def choose_layers(host: Host, layers: Layers | dict[str, Layers]) -> Chosen:
    """The layers to patch: of each stack all, or the range that was asked for; else a ValueError."""
    names = [stack.spec.name for stack in host.stacks]
    if isinstance(layers, dict):
        for name in layers:
            if name not in names:
                raise unknown("stack", name, names, of=f"family {host.family.name!r}")
        if not layers:
            raise ValueError(f"layers names no stack; allowed are {', '.join(names)}")
    elif layers is not None and len(names) > 1:
        raise ValueError(
            f"this {type(host.model).__name__} has two stacks; say of which the layers are, such as "
            f"layers={{'decoder': range(0, {len(host.stacks[-1].layers)})}}; got {layers!r}"
        )
    wanted = layers if isinstance(layers, dict) else dict.fromkeys(names, layers)
    stacks = {stack.spec.name: stack for stack in host.stacks if stack.spec.name in wanted}
    return {name: _range(stack, wanted[name]) for name, stack in stacks.items()}


def _range(stack: HostStack, layers: Layers) -> list[int]:
    depth = len(stack.layers)
    wanted = f"layers must be a contiguous range within 0 to {depth - 1}, the layers of the {stack.spec.name}, got"
    if layers is not None and stack.shared:
        raise ValueError(
            f"the layers of this {type(stack.root).__name__} share their weights and can only be patched all at once; "
            "leave layers out"
        )
    given = layers
    if layers is None:
        layers = range(depth)
    elif isinstance(layers, slice):
        layers = range(depth)[layers]
    numbers = list(layers) if isinstance(layers, range | list | tuple) else []
    if not numbers or any(type(n) is not int or not 0 <= n < depth for n in numbers) or numbers != sorted(set(numbers)):
        raise ValueError(f"{wanted} {given!r}")
    fitting = stack.fitting
    between = [n for n in range(numbers[0], numbers[-1]) if n not in numbers]
    if any(n in fitting for n in between):
        raise ValueError(f"{wanted} {given!r}")
    if others := [n for n in numbers if n not in fitting]:
        kinds = {class_name(host_class(stack.layers[n])).rpartition(".")[2] for n in others}
        raise ValueError(
            f"layers {others} are of class {', '.join(sorted(kinds))}, which is not that of the family (layers are "
            f"matched by their exact class); to patch the others alone: layers={fitting}"
        )
    return numbers


def make_plan(
    host: Host,
    name: str,
    init: str,
    placement: str | None,
    chosen: Chosen,
    options: dict[str, Any],
    *,
    check: bool = True,
    seed: int = 0,
) -> Plan:
    """The schemes, norms and flags of every layer, or a ValueError; the model stays as it is.

    seed  from which, with the place where it stands, follows what a scheme draws
    """
    cls = find_scheme(name, options)
    placement = _settled(cls, init, placement)
    if check:
        check_shapes(host)
    made = tuple(
        _plan_stack(host, stack, cls, init, placement, chosen, options, check, seed)
        for stack in host.stacks
        if stack.spec.name in chosen
    )
    return Plan(placement, made)


def _plan_stack(
    host: Host,
    stack: HostStack,
    cls: type[Scheme],
    init: str,
    placement: str,
    chosen: Chosen,
    options: dict[str, Any],
    check: bool,
    seed: int,
) -> StackPlan:
    name, numbers, spec = cls.name, chosen[stack.spec.name], stack.spec

    def make(place: Place, number: int) -> Scheme:
        with seeded(seed, f"{spec.name}.{number}.resformer.{place.name}"):
            return cls(place, init=init, **options)

    places = [_places(stack, chosen, position) for position in range(len(numbers))]
    made = [[make(place, number) for place, _ in pairs] for number, pairs in zip(numbers, places, strict=True)]
    kept = {
        slot
        for ones, pairs in zip(made, places, strict=True)
        for one, (_, site) in zip(ones, pairs, strict=True)
        for slot in _wanted(one, placement, stack, site)
    }
    final_norm, makes_final_norm = _final_norm(cls, stack, numbers, "final" in kept)
    if cls.streams() or makes_final_norm or final_norm == "moved":
        check_all_layers_run(name, stack, numbers)

    if not stack.shared and any(one.edits() or set(one.points) - {"in", "values"} for ones in made for one in ones):
        _check_own_weights(name, stack, numbers)

    residuals = {}
    for number, pairs, ones in zip(numbers, places, made, strict=True):
        layer = stack.layers[number]
        by_name = {site.name: one for one, (_, site) in zip(ones, pairs, strict=True)}
        if cls.scope == "block":
            by_name = {site.name: find_scheme("identity", {})(place) for place, site in pairs}
            by_name["block"] = make(replace(pairs[0][0], name="block", last=True), number)
        if check and init == "preserve":
            _check_preserves(host, next(reversed(by_name.values())), placement)
            for one, (_, site) in zip(ones, pairs, strict=True):
                _check_keeps_norms(host, one, site, _wanted(one, placement, stack, site))
        for one in by_name.values():
            check_edits(host.family, stack, stack.sites(layer), one)
        _check_points(host, stack, cls, [site for _, site in pairs])
        norms: dict[str, nn.Module] = {}
        acts: dict[str, dict[str, str]] = {}
        frozen: list[str] = []
        for one, (_, site) in zip(ones, pairs, strict=True):
            wanted = _wanted(one, placement, stack, site) - {"embed", "final"}
            acts[site.name], unused = _arrange(host, stack, layer, site, wanted, norms, cls.opens_as_given)
            frozen += [f"{path}.{key}" for path in unused for key, _ in find(layer, path).named_parameters()]
        opens, closes = number == numbers[0], number == numbers[-1]
        if opens and "embed" in kept and not spec.embed_norm:
            norms["embed_norm"] = _new_norm(host, stack, layer)
        if closes and makes_final_norm:
            norms["final_norm"] = _new_norm(host, stack, layer)
        own = Residual(by_name, norms, acts)
        own.opens, own.closes, own.frozen = opens, closes, frozen
        parameter = max(layer.parameters(), key=lambda p: p.ndim)  # DeBERTa makes some vectors in float32 always
        residuals[number] = own.to(parameter.device, parameter.dtype).train(layer.training)
    for number, own in residuals.items():  # what another call of the same layer uses is trained
        calls = [other for n, other in residuals.items() if stack.layers[n] is stack.layers[number]]
        own.frozen = [path for path in own.frozen if all(path in other.frozen for other in calls)]
    return StackPlan(stack, residuals, final_norm)


def _check_own_weights(name: str, stack: HostStack, numbers: list[int]) -> None:
    """A `ValueError` for schemes that scale or enter the projections of each layer, where layers share some."""
    owner: dict[int, int] = {}
    for number in numbers:
        for path, parameter in stack.layers[number].named_parameters():
            first = owner.setdefault(id(parameter), number)
            if first != number:
                raise ValueError(
                    f"scheme {name!r} scales weights or acts inside the sublayers of each layer, and layers {first} "
                    f"and {number} of this {type(stack.root).__name__} share {path!r}; take a scheme that acts around "
                    "them"
                )


def _check_points(host: Host, stack: HostStack, cls: type[Scheme], sites: list[Site]) -> None:
    """A `ValueError` where a scheme acts inside sublayers of which it cannot get hold."""
    inside = [point for point in cls.points if point not in ("in", "values")]
    if stack.shared and inside:
        raise ValueError(
            f"scheme {cls.name!r} acts inside the sublayers ({', '.join(inside)}), which all layers of this "
            f"{type(stack.root).__name__} share; take a scheme that acts around them"
        )
    if "values" in cls.points and not any(attends(part) for site in sites for part in site.parts or (site,)):
        raise ValueError(
            f"scheme {cls.name!r} acts on the values of self-attention, and family {host.family.name!r} names no site "
            "'attn' that hands its attention all arguments (`extra`); add one, or take another scheme"
        )


def _settled(cls: type[Scheme], init: str, placement: str | None) -> str:
    """Where the host's norms are to act, or a ValueError where that, or the init, is not to be had."""
    if init not in INITS:
        raise unknown("init", init, INITS)
    if placement is not None and placement not in PLACEMENTS:
        raise unknown("placement", placement, PLACEMENTS)
    if cls.norms is not None:
        if placement not in (None, "native"):
            raise ValueError(
                f"scheme {cls.name!r} fixes where the norms act; got placement={placement!r}, leave it out"
            )
        return "native"
    placement = placement or (cls.placement if init == "paper" else "native")
    if cls.scope == "block" and placement != "native":
        raise ValueError(
            f"scheme {cls.name!r} steps over whole layers; got placement={placement!r}, allowed is 'native'"
        )
    return placement


def _final_norm(cls: type[Scheme], stack: HostStack, numbers: list[int], wanted: bool) -> tuple[str, bool]:
    """What becomes of the host's final norm ("kept", "unused" or "moved"), and whether the scheme is made one."""
    ends = numbers[-1] == len(stack.layers) - 1 and bool(stack.spec.final_norm)
    if not ends:
        # a pre-LN host goes on with layers that have norms of their own; only a readout needs one before them
        return "kept", wanted and (stack.spec.kind == "post" or (cls.readout and cls.norms is not None))
    return ("moved" if cls.readout else "kept") if wanted else "unused", False


def check_all_layers_run(name: str, stack: HostStack, numbers: list[int]) -> None:
    """A `ValueError` for schemes that carry a stream, where a layer may be left out or something stands between two."""
    for key in LAYERDROP:
        if key.startswith(("encoder", "decoder")) and not key.startswith(stack.spec.name):
            continue
        if rate := getattr(stack.config, key, 0):
            raise ValueError(
                f"scheme {name!r} needs every layer of a forward pass, and config.{key} = {rate} leaves layers out in "
                "training; set it to 0.0"
            )
    if rate := getattr(stack.root, "layerdrop", 0):  # of the configuration, when the model was made
        raise ValueError(
            f"scheme {name!r} needs every layer of a forward pass, and this {type(stack.root).__name__} was made with "
            f"layerdrop = {rate}, which leaves layers out in training; set its `layerdrop` to 0.0 as well"
        )
    if len(numbers) != numbers[-1] - numbers[0] + 1:
        raise ValueError(
            f"scheme {name!r} carries a stream from layer to layer, and layers of other classes stand between "
            f"{numbers}; take a contiguous range, or a scheme that acts on each sublayer alone"
        )
    for path, after in stack.spec.between.items():
        if numbers[0] <= after < numbers[-1] and find(stack.root, path) is not None:
            raise ValueError(
                f"scheme {name!r} carries a stream from layer to layer, and in this {type(stack.root).__name__} "
                f"{path!r} acts between layers {after} and {after + 1}; patch those above it alone, "
                f"layers=range({after + 1}, {len(stack.layers)}), or take a scheme that acts on each sublayer alone"
            )


def _places(stack: HostStack, chosen: Chosen, position: int) -> list[tuple[Place, Site]]:
    """The sites of one layer, each with what a scheme may know of it."""
    numbers = chosen[stack.spec.name]
    layer = stack.layers[numbers[position]]
    sites = stack.sites(layer)
    first, total = position * len(sites), len(numbers) * len(sites)
    others = sum(len(layers) for name, layers in chosen.items() if name != stack.spec.name)
    places = [
        Place(
            name=site.name,
            index=first + i,
            sites=total,
            layer=position,
            layers=len(numbers),
            width=width_of(stack, layer),
            stack="decoder" if stack.decodes else "encoder",
            other_layers=others,
            first=i == 0,
            last=i == len(sites) - 1,
            opens=first + i == 0,
            closes=first + i == total - 1,
            widths={point: width_at(layer, point, projection) for point, projection in site.points.items()},
            heads=heads_of(stack, layer),
            sublayers=len(site.parts) or 1,
        )
        for i, site in enumerate(sites)
    ]
    return list(zip(places, sites, strict=True))


def width_at(layer: nn.Module, point: str, projection: Projection) -> int:
    """The width where a scheme acts inside: the input of "o" and "down", else the output."""
    module = find(layer, projection.path)
    outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    return inputs if point in ("o", "down") else outputs // projection.parts


def _wanted(scheme: Scheme, placement: str, stack: HostStack, site: Site) -> set[str]:
    if scheme.norms is not None:
        wanted = scheme.norms()
    elif placement == "native":
        wanted = set(site.norms) | ({"final"} if stack.spec.kind == "pre" else set())
    else:
        wanted = set(SLOTS[placement])
    return wanted | {slot for slot in site.norms if slot.startswith("pre_") and "pre" in wanted}


def _arrange(
    host: Host,
    stack: HostStack,
    layer: nn.Module,
    site: Site,
    wanted: set[str],
    norms: dict[str, nn.Module],
    as_given: bool,
) -> tuple[dict[str, str], list[str]]:
    """Slot -> path of the norm that acts there: the host's own, moved ones, new ones; and the paths left unused.

    Of ModernBERT's first layer the norm before attention is an `nn.Identity`, for its input comes from a norm; where
    that input is not read `as_given`, it counts as missing.
    """
    absent = {path for path in site.norms.values() if isinstance(find(layer, path), nn.Identity)}
    free = [path for slot, path in site.norms.items() if slot not in wanted and path not in absent]
    acts = {slot: path for slot, path in site.norms.items() if slot in wanted and (as_given or path not in absent)}
    for slot in sorted(wanted - set(acts)):
        if free:
            acts[slot] = free.pop(0)
        else:
            key = f"{site.name}_{slot}_norm"
            norms[key] = _new_norm(host, stack, layer)
            acts[slot] = f"resformer.{key}"
    return acts, free


def _new_norm(host: Host, stack: HostStack, layer: nn.Module) -> nn.Module:
    """A fresh norm of the host's own class and settings."""
    paths = [path for site in stack.sites(layer) for path in site.norms.values()]
    candidates = [find(layer, path) for path in paths]
    sample: Any = next((norm for norm in candidates if not isinstance(norm, nn.Identity)), None)
    if sample is None:
        raise ValueError(f"the layers of family {host.family.name!r} have no norm after which to make a new one")
    if isinstance(sample, nn.LayerNorm):
        affine = sample.elementwise_affine
        bias = affine and sample.bias is not None
        return nn.LayerNorm(sample.normalized_shape, eps=sample.eps, elementwise_affine=affine, bias=bias)
    try:
        norm = host_class(sample)(width_of(stack, layer))
    except TypeError as error:
        raise ValueError(
            f"a new norm is needed, and a {host_class(sample).__name__} of family {host.family.name!r} cannot be made "
            f"from the width alone ({error}); give its other arguments defaults, or take a scheme that makes no norms"
        ) from None
    for name in EPS:
        if hasattr(sample, name):
            setattr(norm, name, getattr(sample, name))
    if isinstance(host.model, PreTrainedModel):
        host.model._init_weights(norm)
    return norm


def _check_preserves(host: Host, scheme: Scheme, placement: str) -> None:
    family = host.family
    kind = f"{family.kind}-LN"
    able = [name for name, cls in schemes().items() if family.kind in cls.preserves]
    if not scheme.can_preserve(family.kind):
        reason = f"on a {kind} host ({family.name})" if scheme.preserves else "on any host"
        raise ValueError(
            f"scheme {scheme.name!r} cannot keep what the model computes {reason}; pass init='paper' to patch it all "
            "the same (the function changes, so train from scratch or expect to re-train), or take one of those that "
            f"keep {kind} hosts: {', '.join(able)}"
        )
    if placement not in ("native", family.kind):
        raise ValueError(
            f"init='preserve' keeps what the model computes, and placement={placement!r} moves the norms of this "
            f"{kind} host; leave placement out, or pass init='paper'"
        )


def _check_keeps_norms(host: Host, scheme: Scheme, site: Site, wanted: set[str]) -> None:
    """A `ValueError` for schemes that are to keep what the host computes, and fix its norms elsewhere."""
    acting = wanted - {"embed", "final"}
    if acting != set(site.norms):
        raise ValueError(
            f"scheme {scheme.name!r} cannot keep what the model computes on {host.family.name!r} hosts, whose norms "
            f"act at {', '.join(sorted(site.norms))} of site {site.name!r}, for it has them at "
            f"{', '.join(sorted(acting)) or 'none'}; pass init='paper' to patch it all the same, or take a scheme that "
            "leaves the norms where they are"
        )


def attends(site: Site) -> bool:
    """Whether a scheme can act on the values of this site: self-attention that passes on what it does not know."""
    return site.name == "attn" and site.extra
