"""Schemes that look back: a layer's input is made of the outputs of earlier layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resformer.schemes.base import Norm, Place, Scheme, Stream, count, register

History = tuple[Tensor, ...]


@register("denseformer")
class DenseFormer(Scheme):
    """Depth-weighted average: after a layer, a learned mixture of all layer outputs so far.

    x ← Σ_j a_ij X_j, j ≤ i, where X_0 is the embedding and X_i the output of layer i

    Parameters  a_i: (i + 1) after layer i; L (L + 3) / 2 in all with dilation and period 1
    Init        a_ii = 1 and 0 elsewhere: the host, bit for bit, with either init
    Options     dilation=1: only every k-th earlier output, counted back from i; period=1: only after every p-th layer
    Reference   Pagliardini et al. 2024, arXiv:2402.02622
    """

    preserves = ("post", "pre")

    def __init__(self, place: Place, *, init: str = "preserve", dilation: int = 1, period: int = 1):
        super().__init__(place, init=init)
        self.dilation, self.period = count("dilation", dilation), count("period", period)
        self.a: nn.Parameter | None = None
        layer = place.layer + 1  # outputs are numbered from 1; 0 is the embedding
        if place.last and layer % self.period == 0:
            sources = layer // self.dilation + 1
            self.a = nn.Parameter(torch.eye(sources)[-1])

    def start(self, h: Tensor) -> Stream:
        return h, h  # the stream proper, then the history X_0 ...

    def read(self, s: History) -> Tensor:
        return s[0]

    def write(self, s: History, y: Tensor, norm: Norm) -> Stream:
        x, history = norm(s[0] + y), s[1:]
        if not self.place.last:
            return x, *history
        history = (*history, x)
        if self.a is not None:
            sources = history[::-1][:: self.dilation][::-1]  # X_i, X_i-k, X_i-2k ..., oldest first
            x = sum(a * past for a, past in zip(self.a, sources, strict=True))
        return x, *history

    def finish(self, s: History, norm: Norm) -> Tensor:
        return norm(s[0])
