"""The measurements by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resformer.diagnostics.decomposition import decomposition
from resformer.diagnostics.gates import gates
from resformer.diagnostics.gradient_flow import gradient_flow
from resformer.diagnostics.layer_jacobian import layer_jacobian
from resformer.diagnostics.lesion import lesion
from resformer.diagnostics.measured import Measured
from resformer.diagnostics.precision import precision
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
        layer_jacobian,
        gates,
        precision,
        update_size,
    )
}


def summary(name: str) -> str:
    """The first line of what a measurement says of itself."""
    doc: Any = MEASURES[name].__doc__
    return doc.strip().splitlines()[0]
