"""The measurements by name: of a given model and batch, and of networks that are built for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resformer.diagnostics.decomposition import decomposition
from resformer.diagnostics.gates import gates
from resformer.diagnostics.gradient_flow import gradient_flow
from resformer.diagnostics.growing import growing
from resformer.diagnostics.identity_fit import identity_fit
from resformer.diagnostics.layer_jacobian import layer_jacobian
from resformer.diagnostics.lesion import lesion
from resformer.diagnostics.measured import Measured
from resformer.diagnostics.paths import paths
from resformer.diagnostics.precision import precision
from resformer.diagnostics.shattered_nets import shattered_nets
from resformer.diagnostics.shattering import shattering
from resformer.diagnostics.shortcut_product import shortcut_product
from resformer.diagnostics.signal_propagation import signal_propagation
from resformer.diagnostics.update_size import update_size

MEASURES: dict[str, Callable[..., Measured]] = {
    one.__name__: one
    for one in (
        gradient_flow,
        signal_propagation,
        decomposition,
        shortcut_product,
        lesion,
        paths,
        shattering,
        layer_jacobian,
        gates,
        precision,
        update_size,
    )
}

# of networks that are built for it: no model and no batch are given
BUILT: dict[str, Callable[..., Measured]] = {one.__name__: one for one in (shattered_nets, identity_fit, growing)}


def summary(name: str) -> str:
    """The first line of what a measurement says of itself."""
    doc: Any = MEASURES[name].__doc__
    return doc.strip().splitlines()[0]
