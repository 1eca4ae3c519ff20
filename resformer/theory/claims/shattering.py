"""The shattered gradients of Balduzzi et al.: 2^-L without shortcuts, (1 + β² L)^-½ with them."""

from typing import Any

from resformer.diagnostics.lines import exponent
from resformer.diagnostics.shattered_nets import net_correlation
from resformer.diagnostics.small_nets import BatchNorm
from resformer.theory.claim import Law, Lines, Values, each, register

DEPTHS = (2, 4, 8, 24, 50)
INPUTS, WIDTH = 128, 256
UNCENTRED = (
    "the laws need inputs that are centred over the batch at every layer, as BatchNorm does; without it, and with "
    "LayerNorm, the inputs drift to a common direction"
)
SMALL_BETA = "the square root holds while β² L is small; with β = 1 the correlation falls faster, about as L^-0.6"
STEP = "LayerNorm does not centre over the batch: gradients keep more in common, and fall as about L^-0.3"


@register(
    "shattering",
    "Balduzzi 2017",
    "Balduzzi et al. 2017, arXiv:1702.08591",
    (
        Law("plain + BN, L=2: 2^-L", 2.0**-2, 0.03, spread=0.012),
        Law("plain + BN, L=4: 2^-L", 2.0**-4, 0.015, spread=0.0067),
        Law("plain + BN, L=8: 2^-L", 2.0**-8, 0.003, spread=0.0014),
        Law("plain + BN, L=24: 2^-L", 2.0**-24, 0.001, spread=0.00089),
        Law("residual + BN, β=0.1, L=8: (1 + β² L)^-½", (1 + 0.01 * 8) ** -0.5, 0.01, spread=0.0023),
        Law("residual + BN, β=0.1, L=24: (1 + β² L)^-½", (1 + 0.01 * 24) ** -0.5, 0.02, spread=0.0071),
        Law("residual + BN, β=0.1, L=50: (1 + β² L)^-½", (1 + 0.01 * 50) ** -0.5, 0.03, spread=0.013),
        Law("residual + BN, β=1, L=4: (1 + β² L)^-½", 5**-0.5, 0.05, spread=0.018),
        Law("residual + BN, β=1, L=50: (1 + β² L)^-½", 51**-0.5, 0.03, spread=0.012, popular=SMALL_BETA),
        Law("residual, no norm, L=2: (3/4)^L", 0.75**2, 0.04, spread=0.017),
        Law("residual, no norm, L=8: (3/4)^L", 0.75**8, 0.04, spread=0.021, popular=UNCENTRED),
        Law("residual + LN, β=1: exponent of L", -0.5, 0.1, spread=0.019, popular=STEP),
        Law("plain + LN, L=8: 2^-L", 2.0**-8, 0.02, spread=0.013, popular=UNCENTRED),
    ),
    seconds=7,
    axes=("depth L (sublayers)", "correlation of the gradients of two inputs"),
    log="x",
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """Gradients of two inputs become unrelated with depth: their correlation is 2^-L without shortcuts, (3/4)^L with
    them, and with batch norm and branches of strength β (1 + β² L)^-½.

    x ← W ReLU(N(x)) against x ← x + β W ReLU(N(x)) of width 256, W ~ N(0, 2 / D), 128 Gaussian inputs, at
    initialisation; batch statistics are constants for the gradient; mean cosine over all pairs.
    """
    batch = {"norm": BatchNorm, "placement": "pre"}
    nets: dict[str, tuple[str, dict[str, Any]]] = {
        "plain + BN": ("plain", batch),
        "residual + BN, β=1": ("scaled", batch),
        "residual + BN, β=0.1": ("scaled", batch | {"branch": 0.1}),
        "residual, no norm": ("scaled", {"placement": "none"}),
        "plain + LN": ("plain", {"placement": "pre"}),
        "residual + LN, β=1": ("scaled", {"placement": "pre"}),
    }
    values: Values = {}
    curves: Lines = {}
    for name, (scheme, options) in nets.items():
        found = [correlation(depth, scheme, options) for depth in DEPTHS]
        for depth, one in zip(DEPTHS, found, strict=True):
            law = "(1 + β² L)^-½" if "β" in name else "(3/4)^L" if "residual" in name else "2^-L"
            values[f"{name}, L={depth}: {law}"] = one
        curves[name] = (DEPTHS, found)
        if name.startswith("residual + LN"):
            values[f"{name}: exponent of L"] = exponent(DEPTHS, found)
    curves["theory: 2^-L"] = (DEPTHS[:3], [2.0**-depth for depth in DEPTHS[:3]])
    curves["theory: (1 + L)^-½"] = (DEPTHS, [(1 + depth) ** -0.5 for depth in DEPTHS])
    curves["theory: (1 + 0.01 L)^-½"] = (DEPTHS, [(1 + 0.01 * depth) ** -0.5 for depth in DEPTHS])
    return values, curves


def correlation(depth: int, scheme: str, options: dict[str, Any]) -> float:
    return net_correlation(depth, WIDTH, scheme, INPUTS, **options)
