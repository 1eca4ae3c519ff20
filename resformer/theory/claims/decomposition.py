"""The output as the sum of the branches: exact in pre-LN, false in post-LN, where each norm rescales all before it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resformer.diagnostics.small_nets import transformer
from resformer.theory.claim import Law, Lines, Values, each, register

LAYERS, WIDTH, BATCH, TOKENS = 12, 64, 4, 16
RESCALED = (
    "each norm after an add divides all earlier terms by its σ (last row: exact with σ frozen); the sum is one of "
    "pre-LN nets"
)


@register(
    "decomposition",
    "He 2016",
    "He et al. 2016, arXiv:1603.05027, equation 4; frozen norms: Liu et al. 2020, arXiv:2004.08249",
    (
        Law("pre-LN: |x_L - x_0 - Σ F| / |x_L|", 0.0, 1e-5, spread=0),
        Law("post-LN: |x_L - x_0 - Σ F| / |x_L|", 0.0, 0.1, spread=0.22, popular=RESCALED),
        Law("post-LN, frozen norms: the same", 0.0, 1e-5, spread=7e-9),
    ),
    seconds=0.3,
    axes=("branch", "share of the output along its own direction"),
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """x_L = x_l + Σ F(x_i): every layer is added to what the layers below have made, and nothing is multiplied.

    Transformers of 12 layers (24 branches) and width 64, W_Q = W_K = 0, Xavier, Gaussian tokens, float32. Frozen
    norms: each term passes the norms after it as a linear map, less its mean, divided by the σ of the whole sum. The
    plot: each branch's share <F, x_L> / |x_L|².
    """
    values: Values = {}
    curves: Lines = {}
    for name, scheme in {"pre-LN": "pre_ln", "post-LN": "post_ln"}.items():
        net: Any = transformer(LAYERS, WIDTH, scheme)
        start, branches, out = trace(net)
        values[f"{name}: |x_L - x_0 - Σ F| / |x_L|"] = error(out, [start, *branches])
        terms = [start, *branches]
        if name == "post-LN":
            terms = through_norms(start, branches, net.norms[0]["post"].eps)
            values["post-LN, frozen norms: the same"] = error(out, terms)
        shares = [float((term * out).sum() / out.square().sum()) for term in terms]
        curves[name] = (range(len(terms)), shares)
    return values, curves


@torch.no_grad()
def trace(net: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """x_0, what each branch adds, and x_L before a final norm."""
    branches = []
    for sublayer in net.sublayers:
        sublayer.register_forward_hook(lambda _, __, out: branches.append(out))
    net.final_norm = torch.nn.Identity()
    x = torch.randn(BATCH, TOKENS, WIDTH)
    return x, branches, net(x)


def error(out: Tensor, terms: Sequence[Tensor]) -> float:
    return float((out - sum(terms)).norm() / out.norm())


def through_norms(start: Tensor, branches: Sequence[Tensor], eps: float) -> list[Tensor]:
    """The terms whose sum is the output of a post-LN net: each centred and divided at every norm that it passes."""
    terms = [start]
    for branch in branches:
        terms.append(branch)
        sigma = (torch.stack(terms).sum(0).var(-1, correction=0, keepdim=True) + eps).sqrt()
        terms = [(term - term.mean(-1, keepdim=True)) / sigma for term in terms]
    return terms
