"""The product of shortcut factors: exact along the skip path, and no law for the gradient of a net with norms."""

import torch

from resformer.diagnostics.small_nets import transformer
from resformer.theory.claim import Law, Lines, Values, each, register

LAYERS, WIDTH, BATCH, TOKENS = 24, 64, 4, 16
RETURN = (
    "λ^L holds along the skip path alone; λ < 1 shrinks the stream, and the norm on the branch's input then gives the "
    "branch as much more gain"
)


@register(
    "shortcut_product",
    "He 2016",
    "He et al. 2016, arXiv:1603.05027, equation 6",
    (
        Law("λ=0.5, branches off: gain per sublayer", 0.5, 1e-5, spread=0),
        Law("λ=0.9, branches off: gain per sublayer", 0.9, 1e-5, spread=2.1e-9),
        Law("λ=1.1, branches off: gain per sublayer", 1.1, 1e-5, spread=2.3e-9),
        Law("λ=0.9, τ=0.001: gain per sublayer", 0.9, 0.002, spread=6.9e-5),
        Law("λ=1.1, pre-LN: gain per sublayer", 1.1, 0.03, spread=0.00078),
        Law("λ=0.9, pre-LN: gain per sublayer", 0.9, 0.03, spread=0.0083, popular=RETURN),
        Law("λ=0.5, pre-LN: gain per sublayer", 0.5, 0.1, spread=0.017, popular=RETURN),
    ),
    seconds=2,
    axes=("factor of the shortcut λ", "gain of the gradient per sublayer"),
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """With x ← λ x + τ F(x) the gradient along the skip path is multiplied by λ at each sublayer, exactly.

    Pre-LN Transformer of 24 layers (48 sublayers) and width 64, W_Q = W_K = 0, Xavier, at initialisation; the 48th
    root of |∂loss/∂x_0| / |∂loss/∂x_L|, for a random direction of x_L (before the final norm).
    """
    values: Values = {}
    curves: Lines = {}
    for name, branch in {"branches off": 0.0, "τ=0.001": 1e-3, "pre-LN": 1.0}.items():
        factors = (0.5, 0.7, 0.9, 1.0, 1.1)
        gains = [gain(factor, branch) for factor in factors]
        curves[name] = (factors, gains)
        values |= {f"λ={one:g}, {name}: gain per sublayer": found for one, found in zip(factors, gains, strict=True)}
    return values, curves


def gain(shortcut: float, branch: float) -> float:
    net = transformer(LAYERS, WIDTH, "scaled", placement="pre", shortcut=shortcut, branch=branch)
    net.final_norm = torch.nn.Identity()
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    out = net(x)
    direction = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * direction).sum(), x)
    return float(gradient.norm() / direction.norm()) ** (1 / (2 * LAYERS))
