"""Schemes whose point is how large branch and shortcut are at the start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from resformer.schemes.base import Norm, Place, Scheme, count, flag, register, scalar
from resformer.schemes.sums import plus


@register("deepnorm")
class DeepNorm(Scheme):
    """Post-LN with an up-scaled shortcut and down-scaled initial weights, for a thousand layers.

    x ← N(α x + F(x))

    Parameters  none. α = N^¼, β = (4 N)^-¼ for the N sublayers of an only stack (N = 2 L: the paper's (2 L)^¼,
                (8 L)^-¼) and of a decoder under an encoder (N = 3 M); α = 0.81 (L⁴ M)^1/16, β = 0.87 (L⁴ M)^-1/16 for
                an encoder of L layers under a decoder of M
    Init        paper: weights of v, o, up and down times β, q and k as they are; preserve: the branch's last
                projection times α and the norm's eps times α², which keeps a post-LN host exactly
    Options     none
    Reference   Wang et al. 2022, arXiv:2203.00555
    Differs     β multiplies the weights that the host drew, whatever their distribution; the paper draws them
                Xavier-normal with gain β, which is the same for hosts drawn so (`weight_init="xavier"`). The authors'
                code scales biases too, and has 1.15 in place of 0.87. A stack that is patched by itself counts alone.
                Where attention and the feed-forward stand side by side N is 2 L too: what the paper bounds is a sum
                over sublayers, however many of them a site adds
    """

    preserves = ("post",)

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        if place.stack == "encoder" and place.other_layers:
            size = (place.layers**4 * place.other_layers) ** (1 / 16)
            self.alpha, self.beta = 0.81 * size, 0.87 / size
        else:
            n = place.sites * place.sublayers
            self.alpha, self.beta = n**0.25, (4 * n) ** -0.25

    def norms(self) -> set[str]:
        return {"post"}

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return norm(plus(y, s, self.alpha))

    def edits(self) -> dict[str, float]:
        if self.init == "paper":
            return dict.fromkeys(("v", "o", "up", "down"), self.beta)
        return {"branch": self.alpha, "sum": self.alpha}


@register("admin")
class Admin(Scheme):
    """Post-LN with a learned factor for each channel of the shortcut, large where much has been added before.

    x ← N(w ⊙ x + F(x))

    Parameters  w: (D) for each site
    Init        paper: w² = 1 at the first site, then Var(w x) + Var(F(x)) at the site before, over one batch
                (`resformer.calibrate`; w = 1 until then); preserve: w = 1, a post-LN host unchanged
    Options     profile=True; False: w = sqrt((N + 1) / ln(N + 1) - 1) everywhere, for N sublayers, without a batch
    Reference   Liu et al. 2020, arXiv:2004.08249; profile=False: the authors' later package admin-torch
    Differs     the batch is seen in evaluation mode and without its padding, which the authors' code counts, with
                dropout on
    """

    preserves = ("post",)

    def __init__(self, place: Place, *, init: str = "preserve", profile: bool = True):
        super().__init__(place, init=init)
        self.profile = flag("profile", profile)
        self.calibrates = self.profile and init == "paper"
        n = place.sites * place.sublayers + 1
        fixed = init == "paper" and not self.profile
        self.w = nn.Parameter(torch.full((place.width,), math.sqrt(n / math.log(n) - 1) if fixed else 1.0))

    def norms(self) -> set[str]:
        return {"post"}

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return norm(self.w * s + y)

    def calibrate(self, s: Tensor, y: Tensor, real: Tensor | None, carried: Tensor | None) -> Tensor:
        """`carried` is w² of this site."""
        if carried is None:
            carried = torch.ones((), device=s.device)
        self.w.fill_(carried.sqrt())
        return variance(self.w * s, real) + variance(y, real)

    def uncalibrated(self) -> bool:
        return self.calibrates and bool((self.w == 1).all())


def variance(x: Tensor, real: Tensor | None) -> Tensor:
    """Of all numbers at real tokens together, in float32 at least."""
    x = x if real is None else x[real.expand(x.shape[:-1])]
    return x.to(torch.promote_types(x.dtype, torch.float32)).var(correction=0)


class WarmedBranch(Scheme):
    """x ← x + a F(x), with a = min(1, t / T) after t steps; T is `horizon`, which a preset gives."""

    alpha: Tensor

    def __init__(self, place: Place, init: str, horizon: int):
        super().__init__(place, init=init)
        self.horizon = horizon
        self.scheduled = init == "paper"
        # a buffer and not a number, so that a compiled forward follows it; a itself and not t, which bf16 would round
        self.register_buffer("alpha", torch.tensor(0.0 if self.scheduled else 1.0))

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return norm(s + self.alpha * y)

    def set_progress(self, step: int) -> None:
        self.alpha.fill_(min(1.0, step / self.horizon))

    def progress(self) -> int:
        return round(self.alpha.item() * self.horizon)


@register("branch_norm")
class BranchNorm(WarmedBranch):
    """Post-LN whose branches come in over the first steps of training: at first the identity, at last post-LN.

    x ← N(x + a F(x)), a = min(1, t / T) after t steps

    Parameters  none; a is a buffer, moved by `resformer.set_progress` (`finetune` does it)
    Init        paper: a = 0; preserve: a = 1 and stays, a post-LN host unchanged
    Options     warmup=4000 (T, in steps)
    Reference   Liu et al. 2023, arXiv:2305.02790
    Differs     the paper's text was not at hand: that a rises linearly, and T, are taken from descriptions of it
    """

    preserves = ("post",)

    def __init__(self, place: Place, *, init: str = "preserve", warmup: int = 4000):
        super().__init__(place, init, count("warmup", warmup))
        self.warmup = warmup

    def norms(self) -> set[str]:
        return {"post"}


@register("pro_res")
class ProRes(WarmedBranch):
    """Branches come in one layer after the other: the deeper a layer, the longer its warm-up.

    x ← x + a F(x), a = min(1, t / (T l)) after t steps, in layer l = 1 ... L

    Parameters  none; a is a buffer, moved by `resformer.set_progress` (`finetune` does it)
    Init        paper: a = 0, pre-LN; preserve: a = 1 and stays, the host unchanged
    Options     warmup=1000 (T, in steps): of the first layer; the last of L layers takes T L
    Reference   Chen et al. 2026, arXiv:2603.05369
    """

    preserves = ("post", "pre")
    placement = "pre"

    def __init__(self, place: Place, *, init: str = "preserve", warmup: int = 1000):
        super().__init__(place, init, count("warmup", warmup) * (place.layer + 1))
        self.warmup = warmup


@register("fixup")
class Fixup(Scheme):
    """No norm at all: branches that start at zero, with weights scaled down by the depth, and three scalars.

    x ← x + s F(x + b) + b'

    Parameters  s: (1), b: (1), b': (1) for each site
    Init        s = 1, b = b' = 0. paper: no norm; with M sublayers in both stacks together, the weights of q, k and v
                times M^-1/6 and of up times M^-1/2 (M^(-1 / (2 m - 2)) for m weights in a row), those of o and down 0;
                preserve: the host unchanged
    Options     none
    Reference   Zhang et al. 2019, arXiv:1901.09321
    Differs     the paper has a scalar bias before every layer inside a branch: there the host's biases stand in, and
                those of o and down are not set to zero. b' is of its ResNets, the authors' Transformer has none, but a
                scale and a bias after each stack. The factors multiply the weights that the host drew. The classifier's
                weights, which the paper starts at zero, belong to the model's head and are left to you; norms on
                embeddings stay. A stack that is patched by itself counts alone
    """

    points = ("in",)
    preserves = ("post", "pre")
    placement = "none"

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        self.scale = scalar(1.0)
        self.before, self.after = scalar(0.0), scalar(0.0)

    def inside(self, point: str, x: Tensor) -> Tensor:
        return x + self.before

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return norm(s + self.scale * y + self.after)

    def edits(self) -> dict[str, float]:
        if self.init == "preserve":
            return {}
        others = self.place.other_layers * (3 if self.place.stack == "encoder" else 2)
        m = self.place.sites * self.place.sublayers + others
        return dict.fromkeys(("q", "k", "v"), m ** (-1 / 6)) | {"up": m**-0.5, "o": 0.0, "down": 0.0}


@register("t_fixup")
class TFixup(Scheme):
    """A Transformer without norms and without warm-up, by the scale of its first weights alone.

    x ← x + F(x)

    Parameters  none
    Init        no norm. paper: weights of v, o, up and down times 0.67 L^-1/4 in an encoder of L layers and (9 L)^-1/4
                in a decoder, embeddings times (9 L)^-1/4 (not if the layers patched start above the first)
    Options     none
    Reference   Huang et al. 2020, ICML, PMLR 119:4475; after Fixup, arXiv:1901.09321
    Differs     the factors multiply the weights that the host drew; the paper draws Xavier-uniform weights, and
                embeddings of standard deviation D^-1/2 that enter times sqrt(D), so with a deviation of 1. Its decoders
                have cross-attention; for those without, the same factor is kept. The authors' code has another sqrt(2)
                on v, which undoes a gain of fairseq's; a host that draws v like its other weights does not need it.
                Learned positions are scaled like the words (the paper's are fixed), and embeddings tied to the LM head
                there too; where the host has a norm on them, that stays and undoes their factor
    """

    def norms(self) -> set[str]:
        return set()

    def edits(self) -> dict[str, float]:
        if self.init == "preserve":
            return {}
        layers = self.place.layers
        gain = 0.67 * layers**-0.25 if self.place.stack == "encoder" else (9 * layers) ** -0.25
        embeddings = {"embed": (9 * layers) ** -0.25} if self.place.opens else {}
        return dict.fromkeys(("v", "o", "up", "down"), gain) | embeddings
