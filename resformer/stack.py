"""Schemes around plain torch sublayers, without a host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from resformer.errors import unknown
from resformer.schemes import Place, find_scheme, schemes
from resformer.schemes.base import INITS, SLOTS, Branch

SITE_SLOTS = {"pre", "out", "post"}


class ResidualStack(nn.Module):
    """Sublayers connected by a residual scheme.

    x_0 = x; x_{i+1} = scheme(x_i, sublayer_i); with the norms where the scheme or `placement` puts them.

    Args:
        sublayers: modules or functions from (..., D) to (..., D).
        width: D; or for n sublayers the n + 1 widths before, between and after them, which schemes can that project
            the shortcut ("projection"). Sublayer i then goes from (..., D_i) to (..., D_i+1).
        scheme: a name of `resformer.schemes()`.
        norm: makes a norm from the width.
        layer_size: how many sublayers make a layer, for schemes that count them (layer_scale) or act on them (b2t,
            denseformer, ode ...).
        placement: "pre", "post", "sandwich" or "none"; by default the scheme's own, else "pre".
        init: "paper" (the default here: a stack starts from scratch) or "preserve" (the plain residual of this
            placement, exactly; where the width changes, with zeros for new channels).
        options: the scheme's own.

    Raises a ValueError for an unknown scheme, option or placement, for a width below 1 or no sublayers, for widths
    that are too few or that the scheme cannot change, for a layer size that does not divide the number of sublayers,
    and for schemes that act inside sublayers.
    """

    def __init__(
        self,
        sublayers: Iterable[Callable[[Tensor], Tensor]],
        width: int | Sequence[int],
        scheme: str,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        layer_size: int = 1,
        placement: str | None = None,
        init: str = "paper",
        **options: Any,
    ):
        super().__init__()
        sublayers = list(sublayers) if isinstance(sublayers, Iterable) else []
        if not all(callable(one) for one in sublayers):
            raise ValueError(
                f"sublayers are modules or functions, got {[one for one in sublayers if not callable(one)]}"
            )
        widths = list(width) if isinstance(width, Sequence) else [width] * (len(sublayers) + 1)
        if not sublayers or any(type(one) is not int or one < 1 for one in widths):
            raise ValueError(f"a stack needs a width of at least 1 and sublayers, got {width!r} and {len(sublayers)}")
        if len(widths) != len(sublayers) + 1:
            raise ValueError(
                f"{len(sublayers)} sublayers have {len(sublayers) + 1} widths before, between and after them, got "
                f"{len(widths)}: {width!r}"
            )
        if type(layer_size) is not int or layer_size < 1 or len(sublayers) % layer_size:
            raise ValueError(f"layer_size must divide the number of sublayers {len(sublayers)}, got {layer_size!r}")
        cls = find_scheme(scheme, options)
        if init not in INITS:
            raise unknown("init", init, INITS)
        if placement is not None and placement not in SLOTS:
            raise unknown("placement", placement, SLOTS)
        if cls.norms is not None and placement is not None:
            raise ValueError(f"scheme {scheme!r} fixes where the norms act; got placement={placement!r}, leave it out")
        if len(set(widths)) > 1 and not cls.widens:
            able = ", ".join(repr(name) for name, one in schemes().items() if one.widens)
            raise ValueError(f"scheme {scheme!r} keeps its width, got {width!r}; give one number, or take {able}")
        self.placement = placement or (cls.placement if init == "paper" and cls.placement != "native" else "pre")
        self.layer_size = layer_size
        inside = set(cls.points) - {"in"}
        if inside:
            raise ValueError(
                f"scheme {scheme!r} acts inside the sublayers ({', '.join(sorted(inside))}), which plain ones do not "
                "name; patch a model with it"
            )
        made = [cls(place, init=init, **options) for place in _places(widths, layer_size)]
        wanted = [one.norms() if one.norms else SLOTS[self.placement] for one in made]

        self.sublayers = nn.ModuleList(s if isinstance(s, nn.Module) else _Function(s) for s in sublayers)
        self.schemes = nn.ModuleList(made)
        self.norms = nn.ModuleList(
            nn.ModuleDict({slot: norm(before if slot == "pre" else after) for slot in sorted(slots & SITE_SLOTS)})
            for slots, before, after in zip(wanted, widths[:-1], widths[1:], strict=True)
        )
        self.embed_norm = norm(widths[0]) if "embed" in wanted[0] else nn.Identity()
        self.final_norm = norm(widths[-1]) if "final" in wanted[-1] else nn.Identity()
        first: Any = self.schemes[0]
        if init == "preserve":
            kind = "post" if "post" in wanted[0] else "pre"
            if not first.can_preserve(kind) or first.edits():
                raise ValueError(
                    f"scheme {scheme!r} cannot start as the plain {kind}-LN residual here; pass init='paper'"
                )
        elif first.edits():
            gains = ", ".join(f"{role} by {gain:.3g}" for role, gain in first.edits().items())
            warnings.warn(
                f"scheme {scheme!r} also scales initial weights ({gains}); plain sublayers do not say which of "
                "theirs these are: scale them yourself, or patch a model",
                stacklevel=2,
            )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B T D) -> (B T D); mask: (B T), True where a token is text, for schemes that look at several tokens."""
        first: Any = self.schemes[0]
        last: Any = self.schemes[-1]
        s = first.start(self.embed_norm(x))
        for start in range(0, len(self.sublayers), self.layer_size):
            sites = range(start, start + self.layer_size)
            scheme: Any = self.schemes[sites[-1]]
            if scheme.scope == "block":
                s = scheme.step(s, Branch(partial(self._field, sites), mask, partial(self._depends, sites)), _identity)
                continue
            for i in sites:
                s = self._scheme(i).step(s, Branch(partial(self._branch, i), mask), self._norm(i, "post"))
        return last.finish(s, self.final_norm)

    def _scheme(self, i: int) -> Any:
        return self.schemes[i]

    def _norm(self, i: int, slot: str) -> Any:
        norms: Any = self.norms[i]
        return getattr(norms, slot, _identity)

    def _branch(self, i: int, x: Tensor) -> Tensor:
        x = self._norm(i, "pre")(x)
        scheme = self._scheme(i)
        return self._norm(i, "out")(self.sublayers[i](scheme.inside("in", x) if "in" in scheme.points else x))

    def _field(self, sites: range, x: Tensor) -> Tensor:
        """f(x) = layer(x) - x, for solvers."""
        y = x
        for i in sites:
            y = self._norm(i, "post")(y + self._branch(i, y))
        return y - x

    def _depends(self, sites: range) -> list[Tensor]:
        return [p for i in sites for part in (self.sublayers[i], self.norms[i]) for p in part.parameters()]


def _identity(x: Tensor) -> Tensor:
    return x


def _places(widths: list[int], size: int) -> list[Place]:
    sites = len(widths) - 1
    return [
        Place(
            name="block",
            index=i,
            sites=sites,
            layer=i // size,
            layers=sites // size,
            width=widths[i],
            width_out=widths[i + 1] if widths[i + 1] != widths[i] else None,
            first=i % size == 0,
            last=i % size == size - 1,
            opens=i == 0,
            closes=i == sites - 1,
        )
        for i in range(sites)
    ]


class _Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
