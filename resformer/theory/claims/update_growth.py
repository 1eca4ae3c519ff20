"""How much the output moves when the weights do: the law of Admin and DeepNet."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resformer.diagnostics.lines import exponent
from resformer.diagnostics.small_nets import transformer
from resformer.theory.claim import Law, Lines, Values, each, register

DEPTHS = (3, 6, 12, 24, 48)
WIDTH, BATCH, TOKENS = 64, 4, 16
SIZE, RATE = 1e-3, 1e-4  # of a random change and of a step: small, so that the output moves in proportion
LOG = exponent(DEPTHS, [math.log(2 * depth + 1) for depth in DEPTHS])  # what a logarithm of N looks like: 0.31
COHERENT = "the logarithm is for random changes; those of one gradient step agree over the layers and grow much faster"
SIGNS = "the theorem is about SGD; Adam's first steps have the same size for all weights, and move DeepNorm by √L"


@register(
    "update_growth",
    "Liu, Wang",
    "Liu et al. 2020 (Admin), arXiv:2004.08249; Wang et al. 2022 (DeepNet), arXiv:2203.00555",
    (
        Law("post-LN, random change: exponent of L", 1.0, 0.6, spread=0.44),
        Law("post-LN less pre-LN, random: exponent", 0.4, 0.0, spread=0.45, relation="≥"),
        Law("pre-LN, random change: exponent, as of ln N", LOG, 0.3, spread=0.14),
        Law("DeepNorm, random change: exponent of L", 0.0, 0.05, spread=0.019),
        Law("post-LN, SGD step: exponent of L", 1.0, 0.0, spread=0.12, relation="≥"),
        Law("DeepNorm, SGD step: exponent of L", 0.0, 0.08, spread=0.038),
        Law("pre-LN, SGD step: exponent, as of √ln N", LOG / 2, 0.3, spread=0.15, popular=COHERENT),
        Law("DeepNorm, sign step: exponent of L", 0.0, 0.2, spread=0.02, popular=SIGNS),
    ),
    seeds=20,  # a sum over the layers of a few directions varies much from net to net
    seconds=8,
    axes=("depth L (layers)", "change of the output"),
    log="xy",
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """A change of all weights moves the output of a post-LN net in proportion to depth, that of a pre-LN net with its
    logarithm, and that of DeepNorm not more in deep nets than in shallow ones.

    W_Q = W_K = 0, ReLU, inner width D = 64, Xavier, N = 2 L sublayers. Random change: the mean square change of the
    output after the same Gaussian noise on each weight. Steps: root mean square change after θ ← θ - η g and after
    θ ← θ - η sign(g) (Adam's first step), for the loss <r, x_L> of one random direction.
    """
    values: Values = {}
    curves: Lines = {}
    for name, scheme in {"post-LN": "post_ln", "pre-LN": "pre_ln", "DeepNorm": "deepnorm"}.items():
        random, sgd, sign = zip(*(changes(depth, scheme) for depth in DEPTHS), strict=True)
        values[f"{name}, random change: exponent of L"] = exponent(DEPTHS, random)
        values[f"{name}, SGD step: exponent of L"] = exponent(DEPTHS, sgd)
        values[f"{name}, sign step: exponent of L"] = exponent(DEPTHS, sign)
        curves |= {f"{name}, random": (DEPTHS, random), f"{name}, SGD": (DEPTHS, sgd), f"{name}, sign": (DEPTHS, sign)}
    values["pre-LN, random change: exponent, as of ln N"] = values["pre-LN, random change: exponent of L"]
    values["pre-LN, SGD step: exponent, as of √ln N"] = values["pre-LN, SGD step: exponent of L"]
    pair = [values[f"{name}, random change: exponent of L"] for name in ("post-LN", "pre-LN")]
    values["post-LN less pre-LN, random: exponent"] = pair[0] - pair[1]
    return values, curves


def changes(layers: int, scheme: str) -> tuple[float, float, float]:
    """Mean square change by a random change of the weights; root mean square changes by an SGD step and a sign step."""
    net = transformer(layers, WIDTH, scheme)
    x, direction = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(WIDTH) / WIDTH**0.5
    weights = list(net.sublayers.parameters())
    out = net(x)
    gradients = torch.autograd.grad((out @ direction).sum(1).mean(), weights)
    noise = [torch.randn_like(weight) * SIZE / WIDTH**0.5 for weight in weights]
    steps = [noise, [-RATE * g for g in gradients], [-RATE * g.sign() for g in gradients]]
    random, sgd, sign = (moved(net, x, out, weights, step) for step in steps)
    return random / SIZE**2, sgd**0.5 / RATE, sign**0.5 / RATE


@torch.no_grad()
def moved(net: nn.Module, x: Tensor, out: Tensor, weights: Sequence[Tensor], step: Sequence[Tensor]) -> float:
    before = [weight.clone() for weight in weights]
    for weight, change in zip(weights, step, strict=True):
        weight.add_(change)
    found = float((net(x) - out).square().mean())
    for weight, was in zip(weights, before, strict=True):
        weight.copy_(was)
    return found
