"""A family is data about a host: the names of its layers, branches, norms and projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from resformer.errors import unknown
from resformer.hosts.typed import check_types
from resformer.swap import forget

Names = Mapping[str, str]
POINTS = ("q", "k", "v", "o", "up", "down", "gate")
# what `Residual`, on which the scheme of each site hangs by the site's name, has of its own
TAKEN = (
    "acts", "block", "bypassed", "by_call", "closes", "edited", "embed_norm", "difference", "final_norm", "frozen",
    "norm", "opens", "scheme_names", "schemes", "settings", "steps_block", "streams", "switched_off_cache", "trained",
    "training",
)  # fmt: skip


@dataclass(frozen=True)
class Projection:
    """A linear map of a sublayer, by its path from the layer; of a fused one, which of its equal output slices."""

    path: str
    part: int = 0
    parts: int = 1
    by_head: bool = False  # each head has its slices side by side (GPT-NeoX), else each slice has its heads
    also: tuple[str, ...] = ()  # paths of maps that do the same for some of the tokens (Longformer's global ones)

    @property
    def every(self) -> list[Projection]:
        """This one, and one for each path in `also`."""
        return [replace(self, path=path, also=()) for path in (self.path, *self.also)]


@dataclass(frozen=True)
class Site:
    """One residual connection of a layer: the sublayer inside it and the norms around it.

    The branch is what `calls` names, one after the other: modules, or numbers that are rates of dropout. The first is
    given the arguments of the layer's forward that `passes` names (parameter of the module: argument of the layer)
    and, with `extra`, all those that the layer's signature does not name; of a tuple the first element goes on.
    """

    name: str  # "attn" | "cross" | "ffn" | "both", for which see `parallel`
    calls: tuple[str, ...] = ()  # paths from the layer
    norms: Names = field(default_factory=dict)  # slot -> path: "pre" on the input, "out" on the output, "post" after
    passes: Names = field(default_factory=dict)
    extra: bool = False
    when: str = ""  # the argument that must be given for this site to run (cross-attention: the encoder's states)
    chunks: str = ""  # the layer's attribute that says into how many tokens the branch is cut, 0 for none
    points: Mapping[str, Projection] = field(default_factory=dict)  # inside points, weight roles: q k v o up gate down
    # the module inside the first call whose output is the branch's, where that call also adds and norms (ALBERT, T5)
    ends: str = ""
    after: Callable[[Tensor], Tensor] | None = None  # what the host does last (T5 clamps half precision)
    parts: tuple[Site, ...] = ()  # sublayers side by side


def parallel(*parts: Site, norms: Names) -> Site:
    """Sublayers that read the same stream and whose sum is added to it: one site, "both".

    Of the norms, "pre" acts on the input of all parts but those that have one of their own, "pre_<name of the part>".
    """
    points = {name: projection for part in parts for name, projection in part.points.items()}
    return Site("both", norms=norms, points=points, parts=tuple(replace(part, norms={}) for part in parts))


@dataclass(frozen=True)
class Stack:
    """A row of layers of one class, and what stands before and after it. Paths start at `root`."""

    layer: str | type[nn.Module]  # the layer's class or its full name; exactly this class is patched
    layers: str  # path of the list of layers; "a.*.b" for the lists b of all members of a
    sites: tuple[Site, ...]
    name: str = "encoder"  # or "decoder"
    root: str = ""  # path from the base model
    final_norm: str = ""
    embed_norm: str = ""
    embed_projection: str = ""  # what may stand between that norm and the layers, whose input then has no norm
    embeddings: tuple[str, ...] = ()  # the tables whose sum opens the stack
    heads: str = "num_attention_heads"  # the number of heads: of the configuration, or else a path from the layer
    by_layer: tuple[str, ...] = ()  # of the configuration, what may be a list with an entry for each layer
    # what the layer returns after its states, if it returns a tuple: (site, which element its first call returned)
    returns: tuple[tuple[str, int], ...] = ()
    order: Callable[[Any], list[int]] | None = None  # configuration -> the layer of each call, where they are shared
    # the arguments of the layer's forward by name -> (B T), True where text is, where "attention_mask" is no common one
    real: Callable[[dict[str, Any]], Tensor] | None = None
    # what changes the states between two layers, where it is not None: its path -> the layer after which it stands
    between: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """ "post" if a norm follows the add, else "pre" (a sandwich counts as pre)."""
        return "post" if any("post" in site.norms for site in self.sites) else "pre"

    @property
    def layer_name(self) -> str:
        """The full name of the layer's class."""
        return self.layer if isinstance(self.layer, str) else class_name(self.layer)

    def is_of(self, cls: type) -> bool:
        """Whether the layers are of exactly this class; a subclass may change the forward."""
        return self.layer == (class_name(cls) if isinstance(self.layer, str) else cls)


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@dataclass(frozen=True, eq=False)
class Family:
    """How one kind of model is built.

    Args:
        name: what `resformer hosts` calls it.
        stacks: its rows of layers; of an encoder-decoder both. A model has at least one of them.
        only: values of its configuration, where the layers of one class are connected in several ways.
        config: the transformers configuration class, from which the tests build a tiny host.
        example: what else that host is configured with, where `only` follows from other values.
        probe: model -> what it computes from some fixed input, for models that are not called as those of
            transformers are. Patching is checked with it.
        note: what a user should know.
    """

    name: str
    stacks: tuple[Stack, ...]
    only: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    example: Mapping[str, Any] = field(default_factory=dict)
    probe: Callable[[nn.Module], Tensor] | None = None
    note: str = ""

    @property
    def kind(self) -> str:
        """That of its stacks, which is the same for all."""
        return self.stacks[0].kind


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family, *, replace: bool = False) -> Family:
    """Make a family known, so that `patch` finds models whose layers are of its class.

    Args:
        family: the spec; what can be checked without a model is checked here, the rest when a model is patched.
        replace: take the place of the family of that name, as when its spec was wrong. Unpatch its models first.

    Raises a ValueError if its name is taken, if a family of the same layers (and the same `only`) is known, or if the
    spec contradicts itself.
    """
    if not isinstance(family, Family):
        raise ValueError(f"register_family takes a resformer.hosts.Family, got {type(family).__name__}")
    _check_family(family)
    layers = {stack.layer for stack in family.stacks}
    for known in _FAMILIES.values():
        if replace and family.name == known.name:
            continue
        same = layers & {stack.layer for stack in known.stacks} and dict(family.only) == dict(known.only)
        if family.name == known.name or same:
            names = ", ".join(sorted(stack.layer_name for stack in family.stacks))
            raise ValueError(
                f"family {family.name!r} ({names}) is registered already, as {known.name!r}"
                + (
                    "; give yours another name, or, to correct that one: register_family(..., replace=True)"
                    if family.name == known.name
                    else ""
                )
            )
    forget("layer", family.name)
    _FAMILIES[family.name] = family
    return family


def families() -> dict[str, Family]:
    """All registered families, by name."""
    return dict(_FAMILIES)


def _check_family(family: Family) -> None:
    """A `ValueError` for a spec that no model can fit."""
    who = f"family {family.name!r}"
    if not isinstance(family.name, str) or not family.name:
        raise ValueError(f"a family needs a name, a string, got {family.name!r}")
    check_types(family, who, skip=("layer",))
    if not family.stacks or not all(stack.sites for stack in family.stacks):
        raise ValueError(f"{who} needs at least one stack, and each stack a site")
    if len({stack.kind for stack in family.stacks}) > 1:
        raise ValueError(f"{who} has norms after the add in one stack only; make it two families")
    _check_unlike(f"the stacks of {who}", [stack.name for stack in family.stacks])
    # also of the other stack: T5's encoder returns None where its decoder returns something of cross-attention
    names = {part.name: None for stack in family.stacks for site in stack.sites for part in site.parts or (site,)}
    for stack in family.stacks:
        if stack.name not in ("encoder", "decoder"):
            raise unknown("stack", stack.name, ("encoder", "decoder"), of=who)
        is_class = isinstance(stack.layer, type) and issubclass(stack.layer, nn.Module)
        if not is_class and not (isinstance(stack.layer, str) and "." in stack.layer):
            raise ValueError(
                f"the layer of {who} must be a class of modules, or its full name such as 'package.module.Block', got "
                f"{stack.layer!r}"
            )
        if not stack.layers:
            raise ValueError(f"{who} needs `layers`, the path of the list of layers from the model")
        _check_unlike(f"the sites of {who}", [site.name for site in stack.sites])
        parts = [part for site in stack.sites for part in site.parts or (site,)]
        _check_unlike(f"the first calls of the sites of {who}", [part.calls[0] for part in parts if part.calls])
        for site in stack.sites:
            _check_site(who, site)
        for name, element in stack.returns:
            if name not in names:  # of a site that the other stack alone has, it is None
                raise unknown("site", name, names, of=f"`returns` of {who}")
            if type(element) is not int or element < 1:
                raise ValueError(
                    f"`returns` of {who} names an element of what site {name!r} returned after the states, from 1 on; "
                    f"got {element!r}"
                )


def _check_unlike(what: str, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{what} must differ from each other, and {', '.join(map(repr, twice))} is there twice")


def _check_site(who: str, site: Site) -> None:
    where = f"site {site.name!r} of {who}"
    if not site.name.isidentifier() or site.name in TAKEN or hasattr(nn.Module, site.name) or site.name[0] == "_":
        raise ValueError(f"{where}: a site is called 'attn', 'cross', 'ffn', 'both' or by a name that is not taken")
    slots = ["pre", "out", "post", *(f"pre_{part.name}" for part in site.parts)]
    for slot in site.norms:
        if slot not in slots:
            raise unknown("slot", slot, slots, of=f"`norms` of {where}")
    _check_unlike(f"the norms of {where}", list(site.norms.values()))
    _check_unlike(f"the parts of {where}", [part.name for part in site.parts])
    for part in site.parts or (site,):
        if not part.calls:
            raise ValueError(f"{where} needs `calls`, a tuple of paths from the layer, such as ('attention',)")
        if part.ends:
            inner = f"{part.calls[0]}."
            ends = (part.ends, next(iter(part.norms.values()), ""))
            if not all(path.startswith(inner) and "." not in path.removeprefix(inner) for path in ends):
                raise ValueError(
                    f"{where}: `ends` and the norm must be children of its first call {part.calls[0]!r}, which adds "
                    f"and norms by itself; got {part.ends!r} and {ends[1]!r}"
                )
    for point, projection in site.points.items():
        if point not in POINTS:
            raise unknown("point", point, POINTS, of=where)
        if not 0 <= projection.part < projection.parts:
            raise ValueError(
                f"{where}: point {point!r} is part {projection.part} of {projection.parts}; parts are counted from 0"
            )
