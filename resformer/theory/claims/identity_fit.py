"""F = 0 is easy to learn, the identity is hard: blocks that are trained to output their input."""

from collections.abc import Sequence
from typing import Any

from resformer.diagnostics.identity_fit import final, identity_errors
from resformer.theory.claim import Curve, Law, Measured, register

DEPTHS = (1, 4, 16)
NETS: dict[str, tuple[str, dict[str, Any]]] = {  # scheme, options
    "plain": ("plain", {}),
    "residual, branches 1/√L": ("depth_scaled", {}),
    "residual": ("identity", {}),
}
SCALE = (
    "without norms, 16 branches of full strength multiply the variance about 400 times, and 300 steps go into taking "
    "that back: F = 0 is easy only from where the branches start small"
)


@register(
    "identity_fit",
    "He 2015",
    "He et al. 2015, arXiv:1512.03385, section 3.1",
    (
        Law("plain, L=1: error", 0.15, 0.0, spread=0.021, relation="≥"),
        Law("plain, L=16: error", 0.7, 0.0, spread=0.029, relation="≥"),
        Law("plain, L=16 less L=1: error", 0.4, 0.0, spread=0.037, relation="≥"),
        Law("residual, branches 1/√L, L=1: error", 0.03, 0.0, spread=0.0021, relation="≤"),
        Law("residual, branches 1/√L, L=16: error", 0.03, 0.0, spread=0.00092, relation="≤"),
        Law("residual, L=16: error", 0.1, 0.1, spread=0.14, relation="≤", popular=SCALE),
    ),
    seconds=12,
    axes=("depth L (blocks)", "E|y - x|² / E|x|²"),
    log="x",
)
def measure(seeds: Sequence[int]) -> Measured:
    """A stack of nonlinear layers learns the identity badly, and worse with depth; a residual one only has to bring
    its branches to zero.

    Blocks W_2 ReLU(W_1 x) of width 16 and inner width 32, Xavier, no norms, 300 steps of Adam at 1e-3 on Gaussian
    inputs; the error over the last 20 steps as a share of the input.
    """
    values: dict[str, list[float]] = {}
    curves = {}
    for name, (scheme, options) in NETS.items():
        found = [[final(one) for one in identity_errors(scheme, depth, seeds=seeds, **options)] for depth in DEPTHS]
        values |= {f"{name}, L={depth}: error": errors for depth, errors in zip(DEPTHS, found, strict=True)}
        curves[name] = Curve(DEPTHS, [list(row) for row in zip(*found, strict=True)])
    both = zip(values["plain, L=16: error"], values["plain, L=1: error"], strict=True)
    values["plain, L=16 less L=1: error"] = [deep - shallow for deep, shallow in both]
    return Measured(values, curves)
