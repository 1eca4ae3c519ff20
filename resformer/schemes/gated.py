"""Schemes that gate: how much passes is decided by stream and branch themselves, channel by channel."""

from __future__ import annotations

import math

import torch
from einops import einsum, reduce
from torch import Tensor, nn
from torch.nn.functional import linear

from resformer.schemes.base import Branch, Norm, Place, Scheme, count, flag, number, register
from resformer.schemes.sums import blend


class Gate(nn.Module):
    """g = σ(W x + b), with W: (D D) zero and b: (D) constant at the start.

    W starts at zero, where the papers draw it at random: all gates open equally by σ(b), whatever the width.
    """

    def __init__(self, width: int, bias: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.shift = nn.Parameter(torch.full((width,), bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(linear(x, self.weight, self.shift))


def doubled(gain: float, rule: str) -> str:
    """The rule as it is written with a gain of 1 or 2."""
    return f"2 ({rule})" if gain == 2 else rule


@register("highway")
class Highway(Scheme):
    """A learned gate divides between transforming and carrying.

    x ← T ⊙ F(x) + (1 - T) ⊙ x, T = σ(W x + b)

    Parameters  W: (D D), b: (D) for each site; uncoupled: as many again for the carry gate C in place of 1 - T
    Init        W = 0; paper: b = bias; preserve: b = 0 and the sum is doubled, 2 (½ F + ½ x), which is the host exactly
    Options     bias=-2.0 (the paper's examples are -1 to -3), coupled=True
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
        if self.carry is None:
            self.show(T=t, C=lambda: 1 - t)
            return norm(self.gain * blend(s, y, t))
        c = self.carry(s)
        self.show(T=t, C=c)
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
        self.show(g=g)
        return norm(self.gain * blend(s, y, g))


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
        g = self.gate(s)
        self.show(g=g)
        return norm(y + self.gain * (1 - g) * s)


@register("gru_gate")
class GRUGate(Scheme):
    """A gated recurrent unit over depth: the stream is its state, the branch its input (GTrXL).

    x ← (1 - z) ⊙ x + z ⊙ tanh(V y + U (r ⊙ x)), r = σ(V_r y + U_r x), z = σ(V_z y + U_z x - b), y = ReLU(F(N(x)))

    Parameters  V_r, V_z, V and U_r, U_z, U: six (D D), in two (3 D D), b: (D), for each site
    Init        b = bias, which opens z by about σ(-bias); the matrices Xavier-uniform, with either init
    Options     bias=2.0 (paper)
    Reference   Parisotto et al. 2019 (GTrXL), arXiv:1910.06764, section 3.2
    Differs     Xavier is one choice of public implementations; the paper's own was not found, nor whether it has the
                norm that stands here after the last site
    """

    def __init__(self, place: Place, *, init: str = "preserve", bias: float = 2.0):
        super().__init__(place, init=init)
        self.bias = number("bias", bias)
        self.branch_weight = nn.Parameter(torch.empty(3, place.width, place.width))
        self.stream_weight = nn.Parameter(torch.empty(3, place.width, place.width))
        self.shift = nn.Parameter(torch.full((place.width,), self.bias))
        for matrix in (*self.branch_weight, *self.stream_weight):
            nn.init.xavier_uniform_(matrix)

    def norms(self) -> set[str]:
        return {"pre", "final"}

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        y = torch.relu(y)
        (v_r, v_z, v), (u_r, u_z, u) = self.branch_weight, self.stream_weight
        r = torch.sigmoid(linear(y, v_r) + linear(s, u_r))
        z = torch.sigmoid(linear(y, v_z) + linear(s, u_z) - self.shift)
        self.show(r=r, z=z)
        h = torch.tanh(linear(y, v) + linear(r * s, u))
        return norm((1 - z) * s + z * h)


@register("sparse_gate")
class SparseGate(Scheme):
    """A hard gate: each channel of each token takes the branch or does without it.

    x ← m ⊙ F(x) + (1 - m) ⊙ x, m = 1[σ(W x + b) > τ]

    Parameters  W: (D D), b: (D) for each site
    Init        paper: W Xavier-uniform, σ(b) = τ, which opens about half of the gates (W = 0 would open all or none);
                preserve: W = 0, b one above that, so that all are open, and the shortcut is kept: x + m ⊙ F(x)
    Options     threshold=0.5 (τ)
    Reference   the straight-through gradient of the step: Bengio et al. 2013, arXiv:1308.3432
    Differs     no paper has quite this rule; the gradient passes the step as if it were p = σ(W x + b), m + p - sg(p)
    """

    preserves = ("post", "pre")
    exact_gradient = False

    def __init__(self, place: Place, *, init: str = "preserve", threshold: float = 0.5):
        super().__init__(place, init=init)
        self.threshold = number("threshold", threshold, low=0.01, high=0.99)
        border = math.log(self.threshold / (1 - self.threshold))
        # no further above the border: σ is flat there, and no gradient would reach W
        self.gate = Gate(place.width, border if init == "paper" else border + 1)
        if init == "paper":
            nn.init.xavier_uniform_(self.gate.weight)

    def formula(self) -> str:
        shortcut = "(1 - m) ⊙ x" if self.init == "paper" else "x"
        return f"x ← m ⊙ F(x) + {shortcut}, m = 1[σ(W x + b) > {self.threshold:g}]"

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        p = self.gate(s)
        m = (p > self.threshold).to(p.dtype) + (p - p.detach())  # the second term is exactly 0 and has p's gradient
        self.show(m=m)
        return norm(m * y + (1 - m) * s) if self.init == "paper" else norm(s + m * y)


@register("se_gate")
class SEGate(Scheme):
    """Squeeze and excitation: the branch's mean over the text decides how much each of its channels counts.

    x ← x + s ⊙ F(x), s = σ(W_2 ReLU(W_1 z + b_1) + b_2), z the mean of F(x) over the tokens that are not padding

    Parameters  W_1: (D/r D), b_1: (D/r), W_2: (D D/r), b_2: (D) for each site; D/r is at least 8
    Init        b_1 = b_2 = 0, W_1 drawn as for ReLU (He); paper: W_2 too; preserve: W_2 = 0 and the gate is doubled,
                2 s = 1
    Options     reduction=16 (r)
    Reference   Hu et al. 2017, arXiv:1709.01507
    Differs     the paper's two layers have no biases, and its mean is over pixels in place of tokens. Encoders only:
                over a text still being written it would look ahead, and it could not follow a KV cache. The least D/r
                keeps narrow hosts from dead hidden units
    """

    preserves = ("post", "pre")
    stacks = ("encoder",)

    def __init__(self, place: Place, *, init: str = "preserve", reduction: int = 16):
        super().__init__(place, init=init)
        self.reduction = count("reduction", reduction)
        self.gain = 1.0 if init == "paper" else 2.0
        hidden = max(8, place.width // self.reduction)
        self.squeeze = nn.Parameter(torch.empty(hidden, place.width))
        self.squeeze_shift = nn.Parameter(torch.zeros(hidden))
        self.excite = nn.Parameter(torch.zeros(place.width, hidden))
        self.excite_shift = nn.Parameter(torch.zeros(place.width))
        nn.init.kaiming_normal_(self.squeeze, nonlinearity="relu")
        if init == "paper":
            nn.init.kaiming_normal_(self.excite, nonlinearity="relu")

    def formula(self) -> str:
        equation = self.card()["equation"]
        return equation if self.gain == 1 else equation.replace("s ⊙ F", "2 s ⊙ F")

    def step(self, s: Tensor, branch: Branch, norm: Norm) -> Tensor:
        y, real = branch(s), branch.real()
        if real is None:
            z = reduce(y, "B ... D -> B D", "mean")
        else:  # shares before the sum, which half precision could not hold
            share = real.to(y.dtype) / real.sum(dim=-1, keepdim=True).clamp_min(1)
            z = einsum(share, y, "B T, B T D -> B D")
        hidden = torch.relu(linear(z, self.squeeze, self.squeeze_shift))
        gate = self.gain * torch.sigmoid(linear(hidden, self.excite, self.excite_shift))
        self.show(s=gate)
        return norm(s + einsum(gate, y, "B D, B ... D -> B ... D"))
