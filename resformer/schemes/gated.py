"""Schemes that gate: what passes is decided by the stream itself, token by token and channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from resformer.schemes.base import Norm, Place, Scheme, flag, number, register


class Gate(nn.Module):
    """g = σ(W x + b), with W: (D D) zero and b: (D) constant at the start.

    W starts at zero, where the papers draw it at random: all gates open equally by σ(b), whatever the width.
    """

    def __init__(self, width: int, bias: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.shift = nn.Parameter(torch.full((width,), bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(functional.linear(x, self.weight, self.shift))


def doubled(gain: float, rule: str) -> str:
    """The rule as it is written with a gain of 1 or 2."""
    return f"2 ({rule})" if gain == 2 else rule


@register("highway")
class Highway(Scheme):
    """A learned gate divides between transforming and carrying.

    x ← T ⊙ F(x) + (1 - T) ⊙ x, T = σ(W x + b)

    Parameters  W: (D D), b: (D) for each site; uncoupled: as many again for the carry gate C in place of 1 - T
    Init        W = 0; paper: b = bias; preserve: b = 0 and the sum is doubled, 2 (½ F + ½ x), which is the host exactly
    Options     bias=-2.0 (paper), coupled=True
    Reference   Srivastava et al. 2015, arXiv:1505.00387
    Differs     the paper draws W at random around zero; an uncoupled carry gate starts at σ(-b)
    """

    preserves = ("post", "pre")

    def __init__(self, place: Place, *, init: str = "preserve", bias: float = -2.0, coupled: bool = True):
        super().__init__(place, init=init)
        self.bias, self.coupled = number("bias", bias), flag("coupled", coupled)
        start = self.bias if init == "paper" else 0.0
        self.gain = 1.0 if init == "paper" else 2.0
        self.transform = Gate(place.width, start)
        self.carry = None if coupled else Gate(place.width, -start)

    def formula(self) -> str:
        carry, where = ("(1 - T)", "") if self.coupled else ("C", ", C = σ(V x + c)")
        return f"x ← {doubled(self.gain, f'T ⊙ F(x) + {carry} ⊙ x')}, T = σ(W x + b){where}"

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        t = self.transform(s)
        c = 1 - t if self.carry is None else self.carry(s)
        return norm(self.gain * (t * y + c * s))


@register("exclusive_gate")
class ExclusiveGate(Scheme):
    """A gate opens the branch by as much as it closes the shortcut: the highway of He's study of shortcuts.

    x ← g ⊙ F(x) + (1 - g) ⊙ x, g = σ(W x + b)

    Parameters  W: (D D), b: (D) for each site
    Init        W = 0; paper: b = bias, pre-LN; preserve: b = 0 and the sum is doubled, which is the host exactly
    Options     bias=-6.0 (the best of the paper's sweep; 0 is the half/half gate, which fails in deep pre-LN nets)
    Reference   He et al. 2016, arXiv:1603.05027, section 3.1
    Differs     the paper draws W at random around zero
    """

    preserves = ("post", "pre")
    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve", bias: float = -6.0):
        super().__init__(place, init=init)
        self.bias = number("bias", bias)
        self.gate = Gate(place.width, self.bias if init == "paper" else 0.0)
        self.gain = 1.0 if init == "paper" else 2.0

    def formula(self) -> str:
        return f"x ← {doubled(self.gain, 'g ⊙ F(x) + (1 - g) ⊙ x')}, g = σ(W x + b)"

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        g = self.gate(s)
        return norm(self.gain * (g * y + (1 - g) * s))


@register("shortcut_gate")
class ShortcutGate(Scheme):
    """The gate scales the shortcut alone; the branch is always open.

    x ← F(x) + (1 - g) ⊙ x, g = σ(W x + b)

    Parameters  W: (D D), b: (D) for each site
    Init        W = 0; paper: b = bias, pre-LN; preserve: b = 0 and the shortcut is doubled, 2 (1 - g) = 1
    Options     bias=-6.0 (the paper's best; at 0 the shortcut is halved at every site)
    Reference   He et al. 2016, arXiv:1603.05027, section 3.1
    Differs     the paper draws W at random around zero
    """

    preserves = ("post", "pre")
    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve", bias: float = -6.0):
        super().__init__(place, init=init)
        self.bias = number("bias", bias)
        self.gate = Gate(place.width, self.bias if init == "paper" else 0.0)
        self.gain = 1.0 if init == "paper" else 2.0

    def formula(self) -> str:
        return f"x ← F(x) + {'2 ' if self.gain == 2 else ''}(1 - g) ⊙ x, g = σ(W x + b)"

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return norm(y + self.gain * (1 - self.gate(s)) * s)
