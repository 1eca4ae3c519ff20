"""Vanishing gradients as the reason why deep plain nets fail: not so, once there are norms."""

from typing import Any

import torch
from torch import Tensor

from resformer.diagnostics.shattering import gradient_correlation, input_gradients
from resformer.diagnostics.small_nets import perceptrons
from resformer.theory.claim import Law, Lines, Values, each, register

DEPTH, WIDTH, INPUTS = 48, 32, 128
KEPT = (
    "the net that fails in the claim degradation has gradients of full size at the start; what is lost is their "
    "correlation between inputs"
)


@register(
    "vanishing",
    "He 2015, here",
    "He et al. 2015, arXiv:1512.03385, section 4.1, which finds healthy gradients; the reverse is often said",
    (
        Law("plain: gradient kept per sublayer", 0.9, 0.05, spread=0.038, popular=KEPT),
        Law("plain: correlation between inputs", 0.0, 0.05, spread=0.0046),
        Law("residual: gradient kept per sublayer", 1.0, 0.06, spread=0.004),
        Law("residual: correlation between inputs", 0.12, 0.0, spread=0.047, relation="≥"),
    ),
    seconds=0.5,
    axes=("sublayers passed", "gradient norm over that at the top"),
    log="y",
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """Deep plain nets do not fit because their gradients vanish: false for nets with norms.

    The nets of the claim degradation at 48 sublayers, at initialisation: the 48th root of |∂y/∂x_0| / |∂y/∂x_L|, root
    mean squares over 128 inputs, and the mean cosine between the gradients of two inputs.
    """
    values: Values = {}
    curves: Lines = {}
    for name, scheme in {"plain": "plain", "residual": "identity"}.items():
        norms, gradients = backward(perceptrons(DEPTH, WIDTH, scheme, placement="pre"))
        values[f"{name}: gradient kept per sublayer"] = (norms[-1] / norms[0]) ** (1 / (DEPTH - 1))
        values[f"{name}: correlation between inputs"] = gradient_correlation(gradients)
        curves[name] = (range(DEPTH), [norm / norms[0] for norm in norms])
    return values, curves


def backward(net: Any) -> tuple[list[float], Tensor]:
    """Gradient norms in the states that the sublayers are given, from the top down; and the gradients in the inputs."""
    readout, x = torch.randn(WIDTH), torch.randn(INPUTS, WIDTH, requires_grad=True)
    states = []
    hooks = [site["pre"].register_forward_pre_hook(lambda _, given: states.append(given[0])) for site in net.norms]
    out = net(x) @ readout
    norms = [float(g.norm()) for g in torch.autograd.grad(out.sum(), states)][::-1]
    for hook in hooks:
        hook.remove()
    return norms, input_gradients(lambda given: net(given) @ readout, x)
