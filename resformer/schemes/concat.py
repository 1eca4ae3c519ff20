"""Schemes that concatenate stream and branch and project back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from resformer.schemes.base import Norm, Place, Scheme, flag, register


@register("concat")
class Concat(Scheme):
    """Concatenate and project, with ESIM's enhancement: difference and product beside the two sides.

    x ← W [x; F(x); x - F(x); x ⊙ F(x)] + b

    Parameters  W: (D 4D), or (D 2D) without the enhancement, b: (D), for each site
    Init        paper: W Xavier-uniform, b = 0; preserve: W = [I I 0 0], b = 0, which is x + F(x)
    Options     enhance=True; False is W [x; F(x)] + b
    Reference   Chen et al. 2017 (ESIM), arXiv:1609.06038, equations 14 to 16
    Differs     ESIM follows the projection by a ReLU; a residual stream has to keep its sign, so there is none here
    """

    preserves = ("post", "pre")

    def __init__(self, place: Place, *, init: str = "preserve", enhance: bool = True):
        super().__init__(place, init=init)
        self.enhance = flag("enhance", enhance)
        parts = 4 if self.enhance else 2
        eye = torch.eye(place.width)
        self.weight = nn.Parameter(torch.cat([eye, eye, *[torch.zeros_like(eye)] * (parts - 2)], dim=1))
        self.shift = nn.Parameter(torch.zeros(place.width))
        if init == "paper":
            nn.init.xavier_uniform_(self.weight)

    def formula(self) -> str:
        return self.card()["equation"] if self.enhance else "x ← W [x; F(x)] + b"

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        parts = [s, y, s - y, s * y] if self.enhance else [s, y]
        return norm(functional.linear(torch.cat(parts, dim=-1), self.weight, self.shift))
