"""Schemes that integrate: a layer as one step of an explicit Runge-Kutta method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resformer.errors import unknown
from resformer.schemes.base import Branch, Norm, Place, Scheme, register


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau without time: k_i = f(x + Σ_j a_ij k_j), x ← x + Σ_i b_i k_i."""

    a: tuple[tuple[float, ...], ...]  # rows of the strictly lower triangle
    b: tuple[float, ...]
    text: str


RK4 = "x + (k_1 + 2 k_2 + 2 k_3 + k_4) / 6, k_1 = f(x), k_2 = f(x + k_1 / 2), k_3 = f(x + k_2 / 2), k_4 = f(x + k_3)"
METHODS = {
    "euler": Tableau(a=((),), b=(1.0,), text="x + f(x)"),
    "rk2": Tableau(a=((), (1.0,)), b=(0.5, 0.5), text="x + ½ (k_1 + k_2), k_1 = f(x), k_2 = f(x + k_1)"),  # Heun
    "rk4": Tableau(a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), text=RK4),
}


@register("ode")
class ODE(Scheme):
    """The layer as a vector field f(x) = layer(x) - x, stepped by a Runge-Kutta method.

    x ← x + Σ_i b_i k_i, k_i = f(x + Σ_j a_ij k_j); rk2: x + ½ (k_1 + k_2), k_2 = f(x + k_1)

    Parameters  none
    Init        none
    Options     method="rk2": euler (the host itself, up to rounding), rk2 (two evaluations a layer), rk4 (four)
    Reference   Li et al. 2022 (ODE Transformer), arXiv:2203.09176
    """

    scope = "block"
    repeats = True

    def __init__(self, place: Place, *, init: str = "preserve", method: str = "rk2"):
        super().__init__(place, init=init)
        if not isinstance(method, str) or method not in METHODS:
            raise unknown("method of scheme 'ode'", method, METHODS)
        self.method = method

    def step(self, s: Tensor, branch: Branch, norm: Norm) -> Tensor:
        tableau = METHODS[self.method]
        slopes: list[Tensor] = []
        for row in tableau.a:
            slopes.append(branch(advance(s, row, slopes)))
        return advance(s, tableau.b, slopes)

    def formula(self) -> str:
        return f"x ← {METHODS[self.method].text}, f(x) = layer(x) - x"

    def can_preserve(self, kind: str) -> bool:
        return self.method == "euler"


def advance(x: Tensor, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """x + Σ w k, leaving out the zero weights."""
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            x = x + weight * slope
    return x
