"""Schemes around plain torch sublayers, without a host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from resformer.errors import unknown
from resformer.schemes import Place, find_scheme
from resformer.schemes.base import INITS, SLOTS


class ResidualStack(nn.Module):
    """Sublayers of one width, connected by a residual scheme.

    x_0 = x; x_{i+1} = scheme(x_i, sublayer_i); with the norms where the scheme or `placement` puts them.

    Args:
        sublayers: modules or functions from (..., D) to (..., D).
        width: D.
        scheme: a name of `resformer.schemes()`.
        norm: makes a norm from the width.
        placement: "pre", "post", "sandwich" or "none"; by default the scheme's own, else "pre".
        init: "paper" (the default here: a stack starts from scratch) or "preserve" (the plain residual of this
            placement, exactly).
        options: the scheme's own.

    Raises a ValueError for an unknown scheme, option or placement, and for a width below 1 or no sublayers.
    """

    def __init__(
        self,
        sublayers: Iterable[Callable[[Tensor], Tensor]],
        width: int,
        scheme: str,
        *,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        placement: str | None = None,
        init: str = "paper",
        **options: Any,
    ):
        super().__init__()
        sublayers = list(sublayers)
        if width < 1 or not sublayers:
            raise ValueError(f"a stack needs a width of at least 1 and sublayers, got {width!r} and {len(sublayers)}")
        cls = find_scheme(scheme, options)
        if init not in INITS:
            raise unknown("init", init, INITS)
        if placement is not None and placement not in SLOTS:
            raise unknown("placement", placement, SLOTS)
        if cls.norms is not None and placement is not None:
            raise ValueError(f"scheme {scheme!r} fixes where the norms act; got placement={placement!r}, leave it out")
        self.placement = placement or (cls.placement if init == "paper" and cls.placement != "native" else "pre")
        wanted = [cls.norms(p) if cls.norms else SLOTS[self.placement] for p in _places(len(sublayers), width)]

        self.sublayers = nn.ModuleList(s if isinstance(s, nn.Module) else _Function(s) for s in sublayers)
        self.schemes = nn.ModuleList(cls(p, init=init, **options) for p in _places(len(sublayers), width))
        self.norms = nn.ModuleList(
            nn.ModuleDict({slot: norm(width) for slot in sorted(slots & {"pre", "out", "post"})}) for slots in wanted
        )
        self.embed_norm = norm(width) if "embed" in wanted[0] else nn.Identity()
        self.final_norm = norm(width) if "final" in wanted[-1] else nn.Identity()
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

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        first: Any = self.schemes[0]
        last: Any = self.schemes[-1]
        s = first.start(self.embed_norm(x))
        for sublayer, scheme, norms in zip(self.sublayers, self.schemes, self.norms, strict=True):
            s = self._site(s, sublayer, scheme, norms)
        return last.finish(s, self.final_norm)

    def _site(self, s: Any, sublayer: nn.Module, scheme: Any, norms: Any) -> Any:
        def branch(x: Tensor) -> Tensor:
            x = norms["pre"](x) if "pre" in norms else x
            y = sublayer(scheme.inside("in", x) if "in" in scheme.points else x)
            return norms["out"](y) if "out" in norms else y

        post = norms["post"] if "post" in norms else nn.Identity()
        if scheme.scope == "site":
            return scheme.step(s, branch, post)
        return scheme.step(s, lambda x: post(x + branch(x)) - x, nn.Identity())


def _places(sites: int, width: int) -> list[Place]:
    return [
        Place(
            name="block",
            index=i,
            sites=sites,
            layer=i,
            layers=sites,
            width=width,
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
