"""What a scheme costs that has work to do, against the plain host."""

from __future__ import annotations

from typing import Any

from benchmark.overhead import AGAIN, measure
from benchmark.steps import MORE, SHOWN
from benchmark.suite import Goal, Row, Suite

POST, PRE = 'init="paper", on the host\'s post-LN', 'init="paper", which is pre-LN'


def _row(name: str, note: str, time: float | None = None, saved: float | None = None, **options: Any) -> Row:
    goals = [Goal(quantity, most=most) for quantity, most in (("time", time), ("saved", saved)) if most is not None]
    return Row(name, tuple(goals), {"scheme": name.split()[0], "init": "paper", **options}, note)


SUITE = Suite(
    "schemes",
    "a training step (forward, backward, AdamW) of a patched BERT against the same BERT of transformers, which is "
    "post-LN",
    SHOWN,
    (
        AGAIN,
        _row("pre_ln", "the host with its norms moved, as most of the others have them"),
        _row("highway", POST, 1.13, 1.17),
        _row("hyper_connections", f"{PRE}; 4 streams", 1.06, 1.15),
        _row("hyper_connections dynamic", f"{PRE}; 4 streams", 1.20, 1.30, dynamic=True),
        _row("mhc", f"{PRE}; 4 streams, 20 iterations", 1.35, 1.30),
        _row("denseformer", POST, 1.08, 1.12),
        _row("dlcl", PRE, 1.08, 1.12),
        _row("attn_residual", PRE, 1.50, 1.40),
        _row("attn_residual blocks=8", PRE, 1.15, 1.15, blocks=8),
        _row("static_mix", f"{POST}; the control of denseformer: the same sums with constants"),
    ),
    measure,
    more=MORE,
)
