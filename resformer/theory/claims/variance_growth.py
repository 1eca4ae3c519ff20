"""How the stream grows with depth: linearly in pre-LN, far more slowly with scaled norms, not at all in post-LN."""

from typing import Any

import torch
from torch import Tensor

from resformer.diagnostics.lines import exponent
from resformer.diagnostics.small_nets import transformer
from resformer.theory.claim import Law, Lines, Values, each, register

LAYERS, WIDTH, BATCH, TOKENS, FIRST = 48, 64, 4, 16, 4


@register(
    "variance_growth",
    "Sun 2025",
    "Sun et al. 2025, arXiv:2502.05795; the linear growth at the start: Xiong et al. 2020, arXiv:2002.04745",
    (
        Law("pre-LN: exponent of the layer", 1.0, 0.2, spread=0.075),
        Law("ln_scaling: exponent of the layer", 0.4, 0.0, spread=0.046, relation="≤"),
        Law("post-LN: exponent of the layer", 0.0, 0.05, spread=1.9e-7),
        Law("pre-LN over ln_scaling, after layer 48", 4.0, 0.0, spread=2.3, relation="≥"),
    ),
    seconds=1,
    axes=("layer", "mean square of the stream"),
    log="xy",
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """The variance of a pre-LN stream grows with depth, so that late branches count for little; norms scaled by 1/√l
    slow that down.

    Transformers of 48 layers and width 64, W_Q = W_K = 0, Xavier, Gaussian tokens, at initialisation; exponents over
    the layers 4 to 48. In training the growth can become exponential (Sun et al.); that is not measured here.
    """
    values: Values = {}
    curves: Lines = {}
    for name, scheme in {"pre-LN": "pre_ln", "ln_scaling": "ln_scaling", "post-LN": "post_ln"}.items():
        found = growth(transformer(LAYERS, WIDTH, scheme))
        values[f"{name}: exponent of the layer"] = exponent(range(FIRST, LAYERS), found[FIRST:])
        curves[name] = (range(1, LAYERS), found[1:])
    values["pre-LN over ln_scaling, after layer 48"] = curves["pre-LN"][1][-1] / curves["ln_scaling"][1][-1]
    return values, curves


@torch.no_grad()
def growth(net: Any) -> list[float]:
    """The mean square of what each layer is given."""
    squares: list[float] = []

    def read(s: Tensor) -> Tensor:
        squares.append(float(s.square().mean()))
        return s

    for site in net.schemes[::2]:
        site.read = read  # a layer's first site reads the stream as it stands, norms not yet applied
    net(torch.randn(BATCH, TOKENS, WIDTH))
    return squares
