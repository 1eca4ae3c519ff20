"""Schemes that put norms or factors inside the branch, between its projections."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from resformer.schemes.base import Norm, Place, Scheme, flag, register

# by site the points before the last projection of each sublayer; cross-attention SubLN and NormFormer leave alone
LAST = {"attn": ("o",), "ffn": ("down",), "both": ("o", "down"), "cross": ()}


def last_points(scheme: Scheme, place: Place) -> tuple[str, ...]:
    points = LAST.get(place.name)
    if points is None or not set(points) <= set(place.widths):
        raise ValueError(
            f"scheme {scheme.name!r} needs the inside point 'o' of a site 'attn' or 'down' of a site 'ffn'; this host "
            f"has a site {place.name!r} with {', '.join(place.widths) or 'none named'}"
        )
    return points


def refuse_both(scheme: Scheme, place: Place) -> None:
    """A `ValueError` for a scheme that does one thing around attention and another around the feed-forward."""
    if place.name == "both":
        raise ValueError(
            f"scheme {scheme.name!r} joins attention in one way and the feed-forward in another, and on this host, "
            "where they stand side by side, their sum is joined at one site; take a scheme that treats them alike "
            "(sub_ln, ln_scaling, sandwich)"
        )


def heads_at(scheme: Scheme, place: Place) -> int:
    if place.heads is None:
        raise ValueError(
            f"scheme {scheme.name!r} needs the number of attention heads, which this host does not tell; name it in "
            "the `heads` of the family's stack: an attribute of the configuration, or a path from the layer"
        )
    return place.heads


@register("sub_ln")
class SubLN(Scheme):
    """Pre-LN with a second norm inside each branch, before its output projection (Magneto).

    x ← x + W_out N'(inner(N(x)))

    Parameters  N': a LayerNorm over the input of W_o (self-attention) or of the down projection (feed-forward)
    Init        N' = LayerNorm at (1, 0); weights of v, o, up and down times √(ln N) for the N sublayers of an only
                stack (N = 2 L) and of a decoder under an encoder (N = 3 M), times √(ln(3 M) ln(2 L) / 3) for an
                encoder of L layers under a decoder of M; cross-attention is plain pre-LN
    Options     none
    Reference   Wang et al. 2022, arXiv:2210.06423
    Differs     the factor multiplies the weights that the host drew; the paper draws them Xavier-normal, and GPT-2
                hosts have the last projections scaled down by depth already. The authors' code scales the initial
                biases of these projections as well
    """

    points = ("o", "down")

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        points = last_points(self, place)
        self.norm = nn.LayerNorm(place.widths[points[0]]) if points else nn.Identity()
        self.down_norm = nn.LayerNorm(place.widths["down"]) if place.name == "both" else None

    def norms(self) -> set[str]:
        return {"pre", "final"}

    def inside(self, point: str, x: Tensor) -> Tensor:
        return self.norm(x) if point == "o" or self.down_norm is None else self.down_norm(x)

    def edits(self) -> dict[str, float]:
        place = self.place
        if place.name == "cross":
            return {}
        size = math.log(place.sites * place.sublayers)
        if place.stack == "encoder" and place.other_layers:
            size = math.log(3 * place.other_layers) * math.log(2 * place.layers) / 3
        return dict.fromkeys(("v", "o", "up", "down"), math.sqrt(size))


@register("normformer")
class NormFormer(Scheme):
    """Pre-LN with a gain for each head, a norm after attention, one inside the feed-forward and a scaled shortcut.

    x ← x + N(W_o [g_h head_h(N(x))]) in attention, x ← λ ⊙ x + W_down N'(inner(N(x))) in the feed-forward

    Parameters  g: (H) in self-attention; N': a LayerNorm over the input of the down projection, λ: (D) in the
                feed-forward
    Init        g = 1, λ = 1, N' = LayerNorm at (1, 0); cross-attention is plain pre-LN
    Options     none
    Reference   Shleifer et al. 2021, arXiv:2110.09456
    Differs     λ (ResScale) is always there; the paper drops it from 1.3 billion parameters. The gains stand before W_o
                as in the paper's equation; its code multiplies slices of W_o's output
    """

    points = ("o", "down")

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        refuse_both(self, place)
        points = last_points(self, place)
        self.gain = nn.Parameter(torch.ones(heads_at(self, place))) if "o" in points else None
        self.shortcut = nn.Parameter(torch.ones(place.width)) if "down" in points else None
        self.norm = nn.LayerNorm(place.widths["down"]) if "down" in points else nn.Identity()

    def norms(self) -> set[str]:
        return {"pre", "final"} if self.gain is None else {"pre", "out", "final"}

    def inside(self, point: str, x: Tensor) -> Tensor:
        if self.gain is None:
            return self.norm(x)
        return (x.unflatten(-1, (len(self.gain), -1)) * self.gain[:, None]).flatten(-2)

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return norm((s if self.shortcut is None else self.shortcut * s) + y)


@register("ln_scaling")
class LNScaling(Scheme):
    """Pre-LN whose norms are scaled down with depth, so that the variance of the stream does not explode.

    x ← x + F(N(x) / √l) in layer l, counted from 1

    Parameters  none; learned: a: (D) for each site
    Init        learned: a = 1 / √l
    Options     learned=False; True is x + F(a ⊙ N(x))
    Reference   Sun et al. 2025, arXiv:2502.05795
    Differs     the paper has no learned form. GPT-2 hosts also draw their last projections scaled down by depth
    """

    points = ("in",)

    def __init__(self, place: Place, *, init: str = "preserve", learned: bool = False):
        super().__init__(place, init=init)
        self.learned = flag("learned", learned)
        start = (place.layer + 1) ** -0.5
        self.a = nn.Parameter(torch.full((place.width,), start)) if self.learned else start

    def formula(self) -> str:
        return "x ← x + F(a ⊙ N(x))" if self.learned else self.card()["equation"]

    def norms(self) -> set[str]:
        return {"pre", "final"}

    def inside(self, point: str, x: Tensor) -> Tensor:
        return self.a * x


@register("hybrid_norm")
class HybridNorm(Scheme):
    """Norms on the queries, keys and values of each head in place of a norm before attention; post-LN around it.

    x ← N(x + Attn'(x)) in attention, x ← x + F(x) in the feed-forward; Attn' normalises q, k and v in each head

    Parameters  g: (3 D/H), the gains of an RMSNorm each for q, k and v, shared by the heads of a site
    Init        g = 1
    Options     none
    Reference   Zhuo et al. 2025, arXiv:2503.04598
    Differs     the paper writes x ← N(y) + F(N(y)) after y = x + Attn'(x): the same. Its HybridNorm*, whose first layer
                is pre-LN, is not here. That heads share their gains could not be checked in its code, and it has no
                cross-attention, which is treated like attention here
    """

    points = ("q", "k", "v")

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        refuse_both(self, place)
        self.attends = set(self.points) <= set(place.widths)
        if not self.attends and "down" not in place.widths:
            raise ValueError(
                f"scheme 'hybrid_norm' needs the inside points 'q', 'k' and 'v', of which site {place.name!r} does not "
                "name all"
            )
        if self.attends:
            self.gain = nn.Parameter(torch.ones(len(self.points), place.widths["q"] // heads_at(self, place)))

    def norms(self) -> set[str]:
        return {"post", "final"} if self.attends else {"final"}

    def inside(self, point: str, x: Tensor) -> Tensor:
        gain = self.gain[self.points.index(point)]
        heads = x.unflatten(-1, (-1, len(gain)))
        return (functional.rms_norm(heads, gain.shape, eps=1e-5) * gain).flatten(-2).to(x.dtype)
