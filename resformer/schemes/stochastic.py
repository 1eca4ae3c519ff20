"""Schemes that draw: randomness in training, its mean in evaluation."""

from __future__ import annotations

from torch import Tensor

from resformer.schemes.base import Norm, Place, Scheme, number, register


@register("drop_path")
class DropPath(Scheme):
    """Stochastic depth: in training a branch is left out for whole examples, more often the deeper it stands.

    x ← x + (m / q) F(x), m ~ Bernoulli(q) for each example, q = 1 - p (i + 1) / N at site i of N

    Parameters  none
    Init        none; in evaluation the host unchanged, in training the mean of the host
    Options     p=0.1, the rate at the last site
    Reference   Huang et al. 2016, arXiv:1603.09382
    Differs     the paper multiplies by q in evaluation; dividing by q in training has the same mean and leaves
                evaluation alone. Its depth counts residual blocks, which are sites here
    """

    preserves = ("post", "pre")

    def __init__(self, place: Place, *, init: str = "preserve", p: float = 0.1):
        super().__init__(place, init=init)
        self.p = number("p", p, low=0.0, high=0.99)
        self.keep = 1 - self.p * (place.index + 1) / place.sites

    def write(self, s: Tensor, y: Tensor, norm: Norm) -> Tensor:
        if self.training and self.p:
            mask = y.new_empty(y.shape[:1] + (1,) * (y.ndim - 1)).bernoulli_(self.keep)
            y = y * (mask / self.keep)
        return norm(s + y)
