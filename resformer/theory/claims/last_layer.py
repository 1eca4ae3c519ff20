"""Xiong's lemma: how the gradient of the last layer depends on depth, and on how large the stream has become."""

import math
from typing import Any

import torch
from torch import Tensor

from resformer.diagnostics.lines import exponent, slope
from resformer.diagnostics.small_nets import transformer
from resformer.theory.claim import Law, Lines, Values, each, register

DEPTHS = (2, 4, 8, 16, 32, 64)
WIDTH, BATCH, TOKENS = 64, 4, 16


@register(
    "last_layer",
    "Xiong 2020",
    "Xiong et al. 2020, arXiv:2002.04745; DeepNorm: derived from β/α of arXiv:2203.00555",
    (
        Law("post-LN: exponent of L", 0.0, 0.04, spread=0.032),
        Law("pre-LN: exponent of L", -0.5, 0.07, spread=0.037),
        Law("pre-LN: exponent of |x_L|²", -0.5, 0.05, spread=0.033),
        Law("DeepNorm: exponent of L", -0.5, 0.03, spread=0.0078),
        Law("post-LN: |x + F|²/D, L=64", 1.5, 0.35, spread=0.26),
        Law("pre-LN: |x_L|²/D over 1 + L/2, L=64", 1.0, 0.0, spread=0.36, relation="≥"),
        Law("pre-LN: |x_L|²/D over 1 + 3L/2, L=64", 1.0, 0.1, spread=0.12, relation="≤"),
    ),
    seconds=3,
    axes=("depth L (layers)", "gradient of the last feed-forward, of one token"),
    log="xy",
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """The gradient of the last layer does not depend on the depth in post-LN, falls as 1/√L in pre-LN, because the
    stream grows, and in DeepNorm, because its factors say so.

    The lemma's conditions: W_Q = W_K = 0, ReLU, inner width D = 64, Xavier, Gaussian tokens, at initialisation.
    Root mean square over the tokens of |∂loss/∂W_2| of the last feed-forward, from a random direction of the output
    for each token. The lemma is about single tokens: in post-LN the gradient that all give together, from one direction
    ("summed" in the plot), grows a little, as L^0.1, since tokens become alike and their gradients add up.
    """
    values: Values = {}
    curves: Lines = {}
    for name, scheme in {"post-LN": "post_ln", "pre-LN": "pre_ln", "DeepNorm": "deepnorm"}.items():
        token, summed, square = zip(*(gradients(depth, scheme) for depth in DEPTHS), strict=True)
        values[f"{name}: exponent of L"] = exponent(DEPTHS, token)
        curves[name] = (DEPTHS, token)
        if name == "post-LN":
            values["post-LN: |x + F|²/D, L=64"] = square[-1]
            curves["post-LN, summed"] = (DEPTHS, summed)
        if name == "pre-LN":
            values["pre-LN: exponent of |x_L|²"] = slope([math.log(s) for s in square], [math.log(t) for t in token])
            values["pre-LN: |x_L|²/D over 1 + L/2, L=64"] = square[-1] / (1 + DEPTHS[-1] / 2)
            values["pre-LN: |x_L|²/D over 1 + 3L/2, L=64"] = square[-1] / (1 + 3 * DEPTHS[-1] / 2)
    return values, curves


def gradients(layers: int, scheme: str) -> tuple[float, float, float]:
    """Of the last W_2: the root mean square of the norms by token, the norm of the sum; and |x_L|²/D before the norm
    that follows it."""
    net: Any = transformer(layers, WIDTH, scheme)
    seen: dict[str, Any] = {}
    last = net.requires_grad_(False).sublayers[-1]
    last.down.weight.requires_grad_()  # the layers below need no graph
    last.down.register_forward_hook(lambda _, given, out: seen.update(given=given[0].detach(), out=out))
    norm = net.norms[-1]["post"] if "post" in net.norms[-1] else net.final_norm  # noqa: SIM401
    norm.register_forward_pre_hook(lambda _, given: seen.update(stream=given[0].detach()))
    x = torch.randn(BATCH, TOKENS, WIDTH)
    out = net(x)
    (delta,) = torch.autograd.grad((out * torch.randn_like(out)).sum() / WIDTH**0.5, seen["out"], retain_graph=True)
    (whole,) = torch.autograd.grad((out @ torch.randn(WIDTH)).sum() / WIDTH**0.5, last.down.weight)
    by_token = token_norms(seen["given"], delta).square()
    return float(by_token.mean().sqrt()), float(whole.norm()), float(seen["stream"].square().mean())


def token_norms(given: Tensor, delta: Tensor) -> Tensor:
    """(... D), (... D) -> (...), the norm of each token's own gradient of a matrix, which is the outer product of what
    came in and the gradient of what went out."""
    return given.norm(dim=-1) * delta.norm(dim=-1)
