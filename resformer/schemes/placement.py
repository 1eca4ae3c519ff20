"""Schemes that differ in where the norms act: nothing is learned but the norms themselves."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from resformer.schemes.base import Branch, Norm, Place, Scheme, Stream, number, register
from resformer.schemes.sums import plus


@register("identity")
class Identity(Scheme):
    """The host's own residual connection, through the patched path: the control of every comparison.

    x ← x + F(x)

    Parameters  none
    Init        none: the host, bit for bit
    Options     none
    Reference   He et al. 2015, arXiv:1512.03385; Vaswani et al. 2017, arXiv:1706.03762
    """

    preserves = ("post", "pre")


@register("plain")
class Plain(Scheme):
    """No residual connection: what depth does without a shortcut.

    x ← F(x)

    Parameters  none
    Init        none
    Options     none
    Reference   the plain nets of He et al. 2015, arXiv:1512.03385; rank collapse: Dong et al. 2021, arXiv:2103.03404
    """

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return norm(y)


class Placed(Scheme):
    """The plain residual with its norms in fixed slots."""

    slots: ClassVar[tuple[str, ...]]

    def norms(self) -> set[str]:
        return set(self.slots)


@register("post_ln")
class PostLN(Placed):
    """Norm after the add, none at the end: the original Transformer, BERT.

    x ← N(x + F(x))

    Parameters  none
    Init        none
    Options     none
    Reference   Vaswani et al. 2017, arXiv:1706.03762
    """

    preserves = ("post",)
    slots = ("post",)


@register("pre_ln")
class PreLN(Placed):
    """Norm on the branch's input, a clean shortcut, one norm at the end: GPT-2, ModernBERT.

    x ← x + F(N(x))

    Parameters  none
    Init        none
    Options     none
    Reference   Xiong et al. 2020, arXiv:2002.04745
    """

    preserves = ("pre",)
    slots = ("pre", "final")


@register("res_post_norm")
class ResPostNorm(Placed):
    """Norm on the branch's output, before the add: the shortcut stays clean and each branch adds a bounded amount.

    x ← x + N(F(x))

    Parameters  none
    Init        none
    Options     none
    Reference   Liu et al. 2021 (Swin v2), arXiv:2111.09883; OLMo 2, arXiv:2501.00656
    """

    slots = ("out", "final")


@register("sandwich")
class Sandwich(Placed):
    """Norms on both sides of the branch: CogView's Sandwich-LN.

    x ← x + N(F(N(x)))

    Parameters  none
    Init        none
    Options     none
    Reference   Ding et al. 2021 (CogView), arXiv:2105.13290
    """

    slots = ("pre", "out", "final")


@register("peri_ln")
class PeriLN(Placed):
    """Norms on both sides of the branch and on the embeddings, so that no part of the stream starts unnormalised.

    x ← x + N(F(N(x))), x_0 ← N(x_0)

    Parameters  none
    Init        none
    Options     none
    Reference   Kim et al. 2025, arXiv:2502.02732
    Differs     the paper calls the norm of the embeddings optional; here it is always there
    """

    slots = ("embed", "pre", "out", "final")


@register("mix_ln")
class MixLN(Scheme):
    """Post-LN in the first layers, pre-LN in the rest: strong gradients at both ends.

    x ← N(x + F(x)) in the first floor(share L) layers, x ← x + F(N(x)) in the rest

    Parameters  none
    Init        none
    Options     share=0.25, the part of the layers that is post-LN (none of fewer than four)
    Reference   Li et al. 2024, arXiv:2412.13795
    """

    def __init__(self, place: Place, *, init: str = "preserve", share: float = 0.25):
        super().__init__(place, init=init)
        self.share = number("share", share, low=0.0, high=1.0)

    def norms(self) -> set[str]:
        return {"post" if self.place.layer < math.floor(self.share * self.place.layers) else "pre", "final"}


@register("keel")
class Keel(Scheme):
    """Post-LN with a shortcut as strong as the net is deep, and a second norm on the branch's input.

    x ← N(α x + F(N(x)))

    Parameters  none; α = N, the number of sites
    Init        none
    Options     none
    Reference   Chen and Wei 2026, arXiv:2601.19895
    Differs     α = N and the rule itself are taken from descriptions of the paper, not from its text (whether it treats
                its first layer otherwise is not known); the paper's norms are RMSNorms, here they are of the host's
                kind
    """

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        self.alpha = float(place.sites)

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return norm(plus(y, s, self.alpha))

    def norms(self) -> set[str]:
        return {"pre", "post"}


@register("post_activation")
class PostActivation(Scheme):
    """The first ResNet: a ReLU after the add, on the shortcut as on the branch.

    x ← ReLU(x + F(x))

    Parameters  none
    Init        none
    Options     none
    Reference   He et al. 2015, arXiv:1512.03385
    Differs     the batch norms of ResNet have no counterpart here: there are no norms at all
    """

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        return functional.relu(norm(s + y))

    def norms(self) -> set[str]:
        return set()


@register("resi_dual")
class ResiDual(Scheme):
    """A post-LN stream that the branches read, and beside it their plain sum, as in pre-LN; read out together.

    p ← N(p + F(p)), q ← q + F(p); the output is p + N(q)

    Parameters  none
    Init        p and q start as the embeddings
    Options     none
    Reference   Xie et al. 2023, arXiv:2304.14802
    Differs     the authors' code can scale p in the output and all that is added to q, against overflow in float16;
                both factors are 1 there by default, and here always
    """

    readout = True

    def start(self, h: Tensor) -> Stream:
        return h, h

    def read(self, s: tuple[Tensor, Tensor]) -> Tensor:
        return s[0]

    def write(self, s: tuple[Tensor, Tensor], y: Tensor, norm: Norm) -> Stream:
        p, q = s
        return norm(p + y), q + y

    def finish(self, s: tuple[Tensor, Tensor], norm: Norm) -> Tensor:
        p, q = s
        return p + norm(q)

    def norms(self) -> set[str]:
        return {"post", "final"}


@register("siamese_norm")
class SiameseNorm(Scheme):
    """A post-LN stream and a pre-LN stream that share their branches: each branch reads both and adds to both.

    x ← N_x(x), z = F(N(x + N_y(y))), then x ← x + z / √(2 l), y ← y + z in layer l; the output is N(N_x(x) + N_y(y))

    Parameters  N_x, N_y: a LayerNorm each, at each site and once more after the last; N is the norm of the host
    Init        LayerNorms at (1, 0); x and y start as the embeddings
    Options     none
    Reference   Li et al. 2026, arXiv:2602.08064
    Differs     written after the authors' code for DeiT, the variant "post-pre"; their "hybrid-pre" is not here
    """

    opens_as_given = False

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        self.gain = 1 / math.sqrt(2 * (place.layer + 1))
        self.post_norm, self.pre_norm = nn.LayerNorm(place.width), nn.LayerNorm(place.width)
        if place.closes:
            self.last_post_norm, self.last_pre_norm = nn.LayerNorm(place.width), nn.LayerNorm(place.width)

    def start(self, h: Tensor) -> Stream:
        return h, h

    def step(self, s: tuple[Tensor, Tensor], branch: Branch, norm: Norm) -> Stream:
        x, y = self.post_norm(s[0]), s[1]
        z = branch(x + self.pre_norm(y))
        return x + self.gain * z, y + z

    def finish(self, s: tuple[Tensor, Tensor], norm: Norm) -> Tensor:
        x, y = s
        return norm(self.last_post_norm(x) + self.last_pre_norm(y)) if self.place.closes else x

    def norms(self) -> set[str]:
        return {"pre", "final"}


@register("b2t")
class B2T(Scheme):
    """Post-LN with a shortcut from the bottom of each layer to its top, around both norms.

    x_mid ← N(x + F(x)), x ← N(x + x_mid + F(x_mid))

    Parameters  none
    Init        the weights of all projections divided by √L, as in the authors' code
    Options     none
    Reference   Takase et al. 2022, arXiv:2206.00330
    Differs     the factor multiplies the weights that the host drew; the paper's are drawn Xavier-uniform
    """

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__(place, init=init)
        if place.first and place.last:
            raise ValueError("scheme 'b2t' bridges the sublayers of a layer; here each layer has only one")
        self.first, self.last = place.first, place.last

    def read(self, s: Any) -> Tensor:
        return s if self.first else s[0]

    def write(self, s: Any, y: Tensor, norm: Norm) -> Stream:
        h, bottom = (s, s) if self.first else s
        return norm(bottom + h + y) if self.last else (norm(h + y), bottom)

    def norms(self) -> set[str]:
        return {"post"}

    def edits(self) -> dict[str, float]:
        return dict.fromkeys(("q", "k", "v", "o", "up", "down"), self.place.layers**-0.5)
