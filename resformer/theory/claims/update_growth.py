"""How much the output moves when the weights do: the law of Admin and DeepNet."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.lines import exponent
from resformer.diagnostics.small_nets import FeedForward, transformer
from resformer.stack import ResidualStack
from resformer.theory.claim import Law, Lines, Values, each, register

DEPTHS = (3, 6, 12, 24, 48)
WIDTH, BATCH, TOKENS = 64, 4, 16
NETS, SENTENCES = 8, 16  # of a seed, for the shape of a curve: single ones bend either way
SIZE, RATE = 1e-3, 1e-4  # of a random change and of a step: small, so that the output moves in proportion
LOG = exponent(DEPTHS, [math.log(2 * depth + 1) for depth in DEPTHS])  # what ln N looks like as a power: 0.31
COHERENT = "the logarithm is for random changes; those of one gradient step agree over the layers and grow much faster"
SIGNS = "the theorem is about SGD; Adam's first steps have the same size for all weights, and move DeepNorm by √L"


@register(
    "update_growth",
    "Liu, Wang",
    "Liu et al. 2020 (Admin), arXiv:2004.08249; Wang et al. 2022 (DeepNet), arXiv:2203.00555",
    (
        Law("feed-forwards in post-LN, random: exponent", 1.0, 0.2, spread=0.3),
        Law("post-LN, random change: exponent of L", 1.0, 0.1, spread=0.44, relation="≥"),
        Law("pre-LN, random change: bend from a + b ln L", 0.0, 0.15, spread=0.11),
        Law("DeepNorm, random change: exponent of L", 0.0, 0.05, spread=0.019),
        Law("post-LN, SGD step: exponent of L", 1.0, 0.0, spread=0.12, relation="≥"),
        Law("DeepNorm, SGD step: exponent of L", 0.0, 0.08, spread=0.038),
        Law("pre-LN, SGD step: exponent, as of √ln N", LOG / 2, 0.3, spread=0.15, popular=COHERENT),
        Law("DeepNorm, sign step: exponent of L", 0.0, 0.2, spread=0.02, popular=SIGNS),
    ),
    seeds=20,  # a sum over the layers of a few directions varies much from net to net
    seconds=20,
    axes=("depth L (layers)", "change of the output"),
    log="xy",
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """A random change of all weights moves the output of a post-LN net in proportion to depth, that of a pre-LN net
    with its logarithm, and that of DeepNorm not more in deep nets than in shallow ones.

    W_Q = W_K = 0, ReLU, inner width D = 64, Xavier, N = 2 L sublayers. Random change: the mean square change of the
    output after the same Gaussian noise on each weight. The derivation takes it that no sublayer magnifies what the
    ones below have changed, which in post-LN is so for feed-forwards alone; with attention, which moves all tokens
    alike, the exponent is higher (1.1 to 1.3) and varies more from net to net. Bend: what the change gains from L = 12
    to 48 less what it gains from 3 to 12, as a share of both, for the mean over 8 nets, whose first L layers are nets
    of L layers: 0 for a + b ln L, 0.33 for √L, 0.6 for L. Steps: root mean square change after θ ← θ - η g and after θ
    ← θ - η sign(g) (Adam's first step), for the loss <r, x_L> of one random direction.
    """
    values: Values = {}
    curves: Lines = {}
    for name, scheme in {"post-LN": "post_ln", "pre-LN": "pre_ln", "DeepNorm": "deepnorm"}.items():
        random, sgd, sign = zip(*(changes(depth, scheme) for depth in DEPTHS), strict=True)
        values[f"{name}, random change: exponent of L"] = exponent(DEPTHS, random)
        values[f"{name}, SGD step: exponent of L"] = exponent(DEPTHS, sgd)
        values[f"{name}, sign step: exponent of L"] = exponent(DEPTHS, sign)
        curves |= {f"{name}, random": (DEPTHS, random), f"{name}, SGD": (DEPTHS, sgd), f"{name}, sign": (DEPTHS, sign)}
    values["pre-LN, SGD step: exponent, as of √ln N"] = values["pre-LN, SGD step: exponent of L"]
    alone = [random_change(feed_forwards(depth)) for depth in DEPTHS]
    values["feed-forwards in post-LN, random: exponent"] = exponent(DEPTHS, alone)
    curves["feed-forwards in post-LN, random"] = (DEPTHS, alone)
    nets = zip(*(changes_along(transformer(DEPTHS[-1], WIDTH, "pre_ln")) for _ in range(NETS)), strict=True)
    values["pre-LN, random change: bend from a + b ln L"] = bend([fmean(changed) for changed in nets])
    return values, curves


def bend(y: Sequence[float]) -> float:
    """Of what was found at the `DEPTHS`: their upper half's rise less the lower one's, as a share of both."""
    return (y[-1] - 2 * y[len(y) // 2] + y[0]) / (y[-1] - y[0])


def feed_forwards(layers: int) -> ResidualStack:
    """Of post-LN, two a layer."""
    return ResidualStack([FeedForward(WIDTH) for _ in range(2 * layers)], WIDTH, "post_ln", layer_size=2)


def random_change(net: ResidualStack) -> float:
    """Mean square change of the output of a net by noise on its weights, over the square of the noise."""
    x, weights = torch.randn(BATCH, TOKENS, WIDTH), list(net.sublayers.parameters())
    return moved(net, x, net(x), weights, noise_on(weights)) / SIZE**2


@torch.no_grad()
def changes_along(net: Any) -> list[float]:
    """The same for the first layers of a pre-LN net, as many as the `DEPTHS` say, each with the final norm."""
    found: list[Tensor] = []
    norms = [*(net.norms[2 * depth]["pre"] for depth in DEPTHS[:-1]), net.final_norm]  # all alike at the start
    hooks = [norm.register_forward_hook(lambda _, given, out: found.append(out)) for norm in norms]
    x, weights = torch.randn(SENTENCES, TOKENS, WIDTH), list(net.sublayers.parameters())
    moved(net, x, net(x), weights, noise_on(weights))
    for hook in hooks:
        hook.remove()
    before, after = found[: len(norms)], found[len(norms) :]
    return [float((b - a).square().mean()) / SIZE**2 for a, b in zip(before, after, strict=True)]


def noise_on(weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(weight) * SIZE / WIDTH**0.5 for weight in weights]


def changes(layers: int, scheme: str) -> tuple[float, float, float]:
    """Mean square change by a random change of the weights; root mean square changes by an SGD step and a sign step."""
    net = transformer(layers, WIDTH, scheme)
    x, direction = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(WIDTH) / WIDTH**0.5
    weights = list(net.sublayers.parameters())
    out = net(x)
    gradients = torch.autograd.grad((out @ direction).sum(1).mean(), weights)
    steps = [noise_on(weights), [-RATE * g for g in gradients], [-RATE * g.sign() for g in gradients]]
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
