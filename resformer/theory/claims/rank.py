"""Rank degeneration: what is left of the dimensions of the tokens, and of the Jacobian, in deep plain nets."""

from collections.abc import Callable

import torch
from torch import Tensor

import resformer
from resformer.diagnostics.signal_propagation import effective_rank
from resformer.diagnostics.small_nets import perceptrons
from resformer.theory.claim import Law, Lines, Values, each, register

DEPTHS = (4, 16)
JACOBIAN_DEPTHS = (2, 8, 24)
WIDTH, TOKENS, WORDS, INPUTS = 32, 16, 100, 8


@register(
    "rank",
    "Dong 2021",
    "tokens: Dong et al. 2021, arXiv:2103.03404; Jacobians: Orhan and Pitkow 2018, arXiv:1701.09175",
    (
        Law("tokens, plain, L=16: effective rank", 1.0, 0.02, spread=1e-6),
        Law("tokens, pre-LN, L=16: effective rank", 5.0, 0.0, spread=0.81, relation="≥"),
        Law("tokens, DeepNorm, L=16: effective rank", 10.0, 0.0, spread=0.21, relation="≥"),
        Law("Jacobian, plain, L=24: effective rank", 4.0, 0.0, spread=0.24, relation="≤"),
        Law("Jacobian, residual, L=24: effective rank", 12.0, 0.0, spread=0.81, relation="≥"),
        Law("plain, two equal units: their gradients differ", 0.0, 1e-5, spread=0.0),
        Law("residual, two equal units: the same", 0.1, 0.0, spread=0.64, relation="≥"),
    ),
    seconds=5,
    axes=("depth L", "effective rank"),
    log="x",
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """Without shortcuts the tokens of a sentence fall into one direction, and so do the gradients: shortcuts keep rank;
    and they break the symmetry by which equal units of a plain net stay equal.

    exp of the entropy of the singular values over their sum. Tokens: the last hidden states (16 tokens, width 32) of
    BERT drawn by Xavier, at initialisation, not centred. Jacobian: ∂x_L/∂x_0 of perceptrons of width 32 with
    LayerNorm, W ~ N(0, 2 / D), mean over 8 inputs. Equal units: two of the first of 2 such sublayers with equal weights
    in and out, |g_i - g_j|² / (|g_i|² + |g_j|²) of the gradients of their weights: 1 if unrelated.
    """
    words = torch.randint(WORDS, (4, TOKENS))
    values: Values = {}
    curves: Lines = {}
    for name, scheme in {"plain": "plain", "pre-LN": "pre_ln", "DeepNorm": "deepnorm"}.items():
        found = [token_rank(seed, words, depth, scheme) for depth in DEPTHS]
        curves[f"tokens, {name}"] = (DEPTHS, found)
        values[f"tokens, {name}, L=16: effective rank"] = found[-1]
    for name, scheme in {"plain": "plain", "residual": "identity"}.items():
        found = [jacobian_rank(perceptrons(depth, WIDTH, scheme, placement="pre")) for depth in JACOBIAN_DEPTHS]
        curves[f"Jacobian, {name}"] = (JACOBIAN_DEPTHS, found)
        values[f"Jacobian, {name}, L=24: effective rank"] = found[-1]
    values["plain, two equal units: their gradients differ"] = asymmetry("plain")
    values["residual, two equal units: the same"] = asymmetry("identity")
    return values, curves


@torch.no_grad()
def token_rank(seed: int, words: Tensor, depth: int, scheme: str) -> float:
    torch.manual_seed(seed)
    model = resformer.build_encoder(depth, WIDTH, scheme, vocab_size=WORDS, weight_init="xavier", heads=2, dropout=0.0)
    return sum(effective_rank(states) for states in model.eval()(words).last_hidden_state) / len(words)


def jacobian_rank(net: Callable[[Tensor], Tensor]) -> float:
    inputs = torch.randn(INPUTS, WIDTH)
    jacobians = torch.func.vmap(torch.func.jacrev(net))(inputs)
    return sum(effective_rank(one.detach()) for one in jacobians) / INPUTS


def asymmetry(scheme: str) -> float:
    """How far the gradients of two units differ that have equal weights in and out."""
    net = perceptrons(2, WIDTH, scheme, placement="pre")
    first, second = (weight for name, weight in net.named_parameters() if name.startswith("sublayers"))
    with torch.no_grad():
        first[1], second[:, 1] = first[0], second[:, 0]
    out = net(torch.randn(INPUTS, WIDTH)) @ torch.randn(WIDTH)
    (gradient,) = torch.autograd.grad(out.sum(), first)
    a, b = gradient[0], gradient[1]
    return float((a - b).square().sum() / (a.square().sum() + b.square().sum()))
