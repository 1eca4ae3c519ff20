"""The gradient of f: R -> R along the line: white noise for deep plain nets, brown for shallow and residual ones."""

import torch

from resformer.diagnostics.shattered_nets import Line, autocorrelation, brown_noise, line_gradient, white_noise
from resformer.diagnostics.small_nets import BatchNorm, perceptrons
from resformer.theory.claim import Law, Lines, Values, each, register

LAGS, NETS, WIDTH, POINTS = 15, 4, 200, 256
CASES = {
    "plain, L=2": ("plain", 2, {}),
    "plain, L=8": ("plain", 8, {}),
    "plain, L=24": ("plain", 24, {}),
    "residual, β=1, L=24": ("scaled", 24, {}),
    "residual, β=0.1, L=24": ("scaled", 24, {"branch": 0.1}),
}


@register(
    "white_noise",
    "Balduzzi 2017",
    "Balduzzi et al. 2017, arXiv:1702.08591",
    (
        Law("white noise", 0.0, 0.03, spread=0.023),
        Law("plain, L=24", 0.0, 0.05, spread=0.039),
        Law("plain, L=8", 0.0, 0.08, spread=0.041),
        Law("plain, L=2", 0.8, 0.0, spread=0.034, relation="≥"),
        Law("residual, β=1, L=24", 0.15, 0.0, spread=0.055, relation="≥"),
        Law("residual, β=0.1, L=24", 0.9, 0.05, spread=0.028, relation="≥"),
        Law("brown noise", 0.9, 0.05, spread=0.025, relation="≥"),
    ),
    seconds=5,
    axes=("lag, in steps of the grid", "autocorrelation of df/dx"),
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """The gradient of a deep plain net along a line resembles white noise, that of a shallow one or of a residual one
    brown noise.

    f: R -> R of width 200 with batch norm, on 256 points of [-2, 2] and with biases in the first layer; the
    autocorrelation of df/dx at a distance of 5 points (the plot: up to 15), over 4 nets a seed.
    """
    generator = torch.Generator().manual_seed(seed)
    signals = {"white noise": white_noise(NETS, POINTS, generator), "brown noise": brown_noise(NETS, POINTS, generator)}
    for name, (scheme, depth, options) in CASES.items():
        lines = [
            line_gradient(
                Line(perceptrons(depth, WIDTH, scheme, norm=BatchNorm, placement="pre", **options), WIDTH), POINTS
            )
            for _ in range(NETS)
        ]
        signals[name] = torch.stack([line / line.std() for line in lines])  # else the largest net speaks for all
    found = {name: autocorrelation(rows, LAGS).tolist() for name, rows in signals.items()}
    return {name: one[5] for name, one in found.items()}, {name: (range(LAGS + 1), one) for name, one in found.items()}
