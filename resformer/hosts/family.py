"""A family is data about a host: the names of its layers, branches, norms and projections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Names = Mapping[str, str]


@dataclass(frozen=True)
class Projection:
    """A linear map of a sublayer, by its path from the layer; of a fused one, which of its equal output slices."""

    path: str
    part: int = 0
    parts: int = 1
    by_head: bool = False  # each head has its slices side by side (GPT-NeoX), else each slice has its heads


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
    return Site("both", norms=norms, points=points, parts=parts)


@dataclass(frozen=True)
class Stack:
    """A row of layers of one class, and what stands before and after it. Paths start at `root`."""

    layer: str  # the full name of the layer's class; exactly this class is patched
    layers: str  # path of the list of layers; "a.*.b" for the lists b of all members of a
    sites: tuple[Site, ...]
    name: str = "encoder"  # or "decoder"
    root: str = ""  # path from the base model
    final_norm: str = ""
    embed_norm: str = ""
    embeddings: tuple[str, ...] = ()  # the tables whose sum opens the stack
    heads: str = "num_attention_heads"  # of the configuration
    # what the layer returns after its states, if it returns a tuple: (site, which element its first call returned)
    returns: tuple[tuple[str, int], ...] = ()
    order: Callable[[Any], list[int]] | None = None  # configuration -> the layer of each call, where they are shared
    # the arguments of the layer's forward by name -> (B T), True where text is, where "attention_mask" is no common one
    real: Callable[[dict[str, Any]], Tensor] | None = None
    between: str = ""  # an attribute beside the layers, not None where something reads the states between two of them

    @property
    def kind(self) -> str:
        """ "post" if a norm follows the add, else "pre" (a sandwich counts as pre)."""
        return "post" if any("post" in site.norms for site in self.sites) else "pre"


@dataclass(frozen=True)
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
    note: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """That of its stacks, which is the same for all."""
        return self.stacks[0].kind


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known, so that `patch` finds models whose layers are of its class.

    Raises a ValueError if its name is taken, if a family of the same layers (and the same `only`) is known, or if it
    is not one family: no stack or no site, or norms after the add in one stack and not in the other.
    """
    if not family.stacks or not all(stack.sites for stack in family.stacks):
        raise ValueError(f"family {family.name!r} needs at least one stack, and each stack a site")
    if len({stack.kind for stack in family.stacks}) > 1:
        raise ValueError(f"family {family.name!r} has norms after the add in one stack only; make it two families")
    layers = {stack.layer for stack in family.stacks}
    for known in _FAMILIES.values():
        same = layers & {stack.layer for stack in known.stacks} and dict(family.only) == dict(known.only)
        if family.name == known.name or same:
            raise ValueError(
                f"family {family.name!r} ({', '.join(sorted(layers))}) is registered already, as {known.name!r}"
            )
    _FAMILIES[family.name] = family
    return family


def families() -> dict[str, Family]:
    """All registered families, by name."""
    return dict(_FAMILIES)
