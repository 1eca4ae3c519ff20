"""Schemes that add, each side with a factor: constants, a scalar, a vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from resformer.schemes.base import Branch, Norm, Place, Scheme, Stream, flag, number, register, scalar
from resformer.schemes.sums import plus


@register("scaled")
class Scaled(Scheme):
    """A factor on the shortcut and one on the branch, constant or learned.

    x ← λ x + τ F(x)

    Parameters  none, λ and τ are constants; learned: λ: (1) and τ: (1) for each site
    Init        paper: as the options say; preserve: the branch's last projection is scaled by λ / τ, and the eps
                of the norm after the add by λ², so that a post-LN host is kept (a pre-LN host: only for λ = 1)
    Options     shortcut=1.0 (λ), branch=1.0 (τ, not 0), learned=False: train both from there
    Reference   constant shortcuts: He et al. 2016, arXiv:1603.05027; small τ: Szegedy et al. 2016, arXiv:1602.07261
    """

    preserves = ("post", "pre")

    def __init__(
        self,
        place: Place,
        *,
        init: str = "preserve",
        shortcut: float = 1.0,
        branch: float = 1.0,
        learned: bool = False,
    ):
        super().__init__(place, init=init)
        self.shortcut, self.branch = number("shortcut", shortcut), number("branch", branch)
        self.learned = flag("learned", learned)
        if init == "preserve" and not (self.branch > 0 and self.shortcut > 0):
            raise ValueError(
                f"scheme 'scaled' keeps a host only for shortcut > 0 and branch > 0, got {shortcut!r} and {branch!r}; "
                "use init='paper' to have these factors without keeping the host's function"
            )
        self.lam: Any = scalar(self.shortcut) if learned else self.shortcut
        self.tau: Any = scalar(self.branch) if learned else self.branch

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        kept = s if self.shortcut == 1 and not self.learned else self.lam * s
        return norm(plus(kept, y, self.tau))

    def edits(self) -> dict[str, float]:
        if self.init == "paper":
            return {}
        gains = {"branch": self.shortcut / self.branch, "sum": self.shortcut}
        return {role: gain for role, gain in gains.items() if gain != 1}

    def can_preserve(self, kind: str) -> bool:
        return kind == "post" or self.shortcut == 1


class ScaledBranch(Scheme):
    """x ← x + a F(x), with a the constant or the parameter that a preset makes."""

    preserves = ("post", "pre")
    a: Any

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return norm(plus(s, y, self.a))


@register("depth_scaled")
class DepthScaled(ScaledBranch):
    """Branches scaled down by the depth, so that their sum does not grow with it.

    x ← x + N^-p F(x)

    Parameters  none; N is the number of sites
    Init        paper: pre-LN; preserve: the branch's last projection times N^p, which keeps the host exactly
    Options     power=0.5 (p): 0.5 bounds the variance of the sum (Stable ResNet, Depth-μP), 1 is CompleteP's
    Reference   Hayou et al. 2021 (Stable ResNet), arXiv:2010.12859; Yang et al. 2024 (Depth-μP), arXiv:2310.02244;
                Dey et al. 2025 (CompleteP), arXiv:2505.01618
    Differs     Depth-μP and CompleteP count layers of two sites, which is a constant factor; their rules for learning
                rate, decay and eps of the optimizer at other depths are the training's, not done here
    """

    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve", power: float = 0.5):
        super().__init__(place, init=init)
        self.power = number("power", power, low=0.0, high=1.0)
        self.a = place.sites**-self.power

    def edits(self) -> dict[str, float]:
        return {"branch": 1 / self.a} if self.init == "preserve" and self.a != 1 else {}


@register("skip_init")
class SkipInit(ScaledBranch):
    """A learned scalar on each branch, closed at the start.

    x ← x + a F(x)

    Parameters  a: (1) one scalar a site
    Init        paper: a = 0, no norm, the network is the identity; preserve: a = 1, the host unchanged
    Options     none
    Reference   De & Smith 2020, arXiv:2002.10444
    Differs     the paper is about convolutional nets; it also adds dropout and biases, which hosts have
    """

    placement = "none"

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        self.a = scalar(0.0 if init == "paper" else 1.0)


@register("layer_scale")
class LayerScale(ScaledBranch):
    """A learned factor for each channel of the branch, small at the start.

    x ← x + a ⊙ F(x)

    Parameters  a: (D) one vector a site
    Init        paper: a = 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 above, pre-LN; preserve: a = 1
    Options     none
    Reference   Touvron et al. 2021 (CaiT), arXiv:2103.17239
    """

    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        small = 0.1 if place.layers <= 18 else 1e-5 if place.layers <= 24 else 1e-6
        self.a = nn.Parameter(torch.full((place.width,), small if init == "paper" else 1.0))


class SharedScalar(Scheme):
    """One scalar a for the sublayers of a layer: it rides in the stream from the first to the last."""

    def __init__(self, place: Place, init: str, start: float):
        super().__init__(place, init=init)
        self.first, self.last = place.first, place.last
        if place.first:
            self.a = scalar(start)

    def join(self, x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        raise NotImplementedError

    def read(self, s: Any) -> Tensor:
        return s if self.first else s[0]

    def write(self, s: Any, y: Tensor, norm: Norm) -> Stream:
        x, a = (s, self.a) if self.first else s
        x = norm(self.join(x, y, a))
        return x if self.last else (x, a)


@register("rezero")
class ReZero(SharedScalar):
    """A learned scalar on the branches of each layer, closed at the start.

    x ← x + a F(x)

    Parameters  a: (1) one scalar a layer, shared by its sublayers
    Init        paper: a = 0, no norm, the network is the identity; preserve: a = 1, the host unchanged
    Options     none
    Reference   Bachlechner et al. 2020, arXiv:2003.04887
    """

    preserves = ("post", "pre")
    placement = "none"

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init, 0.0 if init == "paper" else 1.0)

    def join(self, x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        return x + a * y


@register("gpas")
class GPAS(SharedScalar):
    """Scales the stream of a pre-LN net down as it goes, while gradients pass as if it did not.

    x ← x + F(x) - SiLU(a) sg(x + F(x)), sg the identity that stops gradients

    Parameters  a: (1) one scalar a layer, shared by its sublayers
    Init        a = 0: the host unchanged; paper: pre-LN
    Options     none
    Reference   Chen et al. 2025, arXiv:2506.22049
    Differs     the rule for pre-LN and sandwich hosts; the authors' code gates the shortcut of a post-LN host instead.
                Their code can also clip the norm of the gradients of all a to 0.01, which is the training's
    """

    preserves = ("pre",)
    placement = "pre"
    exact_gradient = False

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init, 0.0)

    def join(self, x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        z, taken = x + y, functional.silu(a)
        self.show(silu=taken)
        return z - taken * z.detach()


@register("x0_mix")
class X0Mix(Scheme):
    """Before each layer the stream is mixed with what the stack was given: a shortcut from the embeddings to all.

    x ← x + F(x), before a layer's first sublayer also x ← λ x + μ x_0

    Parameters  λ: (1), μ: (1) for each layer
    Init        paper: λ from 1.15 in the first layer to 1.05 in the last, μ from 0.20 to 0.05, linear; pre-LN;
                preserve: (1, 0), the host unchanged
    Options     none
    Reference   code without a paper: Karpathy 2026 (nanochat), after Jordan et al. 2024 (modded-nanogpt); of graph nets
                the initial residual, Chen et al. 2020 (GCNII), arXiv:2007.02133
    Differs     nanochat normalises x_0 and takes a share of the middle layer off the output ("backout"); neither is
                done here, and λ and μ learn at the scheme's rate, where it gives λ a hundredth of μ's
    """

    preserves = ("post", "pre")
    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        self.first = place.first
        if place.first:
            share = place.layer / max(1, place.layers - 1)
            lam, mu = (1.15 - 0.10 * share, 0.20 - 0.15 * share) if init == "paper" else (1.0, 0.0)
            self.lam, self.mu = scalar(lam), scalar(mu)

    def start(self, h: Tensor) -> Stream:
        return h, h

    def step(self, s: Any, branch: Branch, norm: Norm) -> Stream:
        x, start = s
        if self.first:
            x = self.lam * x + self.mu * start
        return norm(x + branch(x)), start

    def finish(self, s: Any, norm: Norm) -> Tensor:
        return norm(s[0])
