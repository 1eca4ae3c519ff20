"""What is compared in a study, at a place on its axes. Stdlib only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """What the runs of a cell have in common, besides their learning rate."""

    scheme: str  # as `write_scheme` writes it
    depth: int  # layers
    task: str
    weight_init: str = "xavier"  # of the host's fresh weights
    extra_ffn: int = 0  # units added to each feed-forward, for the control that spends a scheme's parameters there
