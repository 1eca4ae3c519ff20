"""He's variants of the shortcut in deep pre-LN nets: which of them train, and in which order."""

from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor

from resformer.theory.claim import Curve, Law, Measured, register
from resformer.theory.teacher import Classifier, Examples, train

DEPTH, SIZE, RATES, STEPS, LAST = 24, 1024, (1e-3, 3e-3), 150, 20
# scheme, options, test error in per cent of a ResNet-110 on CIFAR-10 in table 1 of the paper, 20 for those that failed
VARIANTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "identity": ("identity", {"placement": "pre"}, 6.61),
    "shortcut gate, b=-6": ("shortcut_gate", {"bias": -6.0}, 6.91),
    "exclusive gate, b=-6": ("exclusive_gate", {"bias": -6.0}, 8.70),
    "1 x 1 projection": ("projection", {}, 12.22),
    "½ and ½": ("scaled", {"shortcut": 0.5, "branch": 0.5, "placement": "pre"}, 12.35),
    "shortcut gate, b=0": ("shortcut_gate", {"bias": 0.0}, 12.86),
    "exclusive gate, b=0": ("exclusive_gate", {"bias": 0.0}, 20.0),
    "½ and 1": ("scaled", {"shortcut": 0.5, "placement": "pre"}, 20.0),
    "dropout shortcut": ("dropout_shortcut", {"inverted": False}, 20.0),
    "no shortcut": ("plain", {"placement": "pre"}, 20.0),
}
GATED = (
    "a gate at b=-6 also starts the branches at 0.25 % of their strength, as SkipInit does, and is level with the "
    "identity when each has the better of two rates; at the lower rate alone it is worse"
)


@register(
    "shortcuts",
    "He 2016",
    "He et al. 2016, arXiv:1603.05027, table 1",
    (
        Law("rank correlation with the paper's errors", 0.6, 0.0, spread=0.062, relation="≥"),
        Law("½ and ½ less identity: training loss", 0.1, 0.0, spread=0.053, relation="≥"),
        Law("exclusive gate, b=0 less b=-6: the same", 0.07, 0.0, spread=0.057, relation="≥"),
        Law("1 x 1 projection less identity: the same", 0.02, 0.0, spread=0.03, relation="≥"),
        Law("dropout shortcut less identity: the same", 0.4, 0.0, spread=0.032, relation="≥"),
        Law("exclusive gate, b=-6 less identity", 0.05, 0.015, spread=0.025, relation="≥", popular=GATED),
    ),
    seconds=75,
    axes=("error of the paper's ResNet-110 (%)", "training loss at the end"),
)
def measure(seeds: Sequence[int]) -> Measured:
    """Of all shortcuts the identity trains deep nets best: gates, scaling, dropout and projections hamper them.

    Pre-LN perceptrons of 24 sublayers and width 32, 1024 examples of a random teacher, 150 steps of Adam, for each
    variant the better of the rates 1e-3 and 3e-3; cross-entropy over the last 20 steps. The rank correlation is
    Kendall's τ-b over ten variants, those that failed in the paper tied.
    """
    examples = Examples(seeds, SIZE)
    ends = {name: best(scheme, options, examples, seeds) for name, (scheme, options, _) in VARIANTS.items()}
    errors = [error for _, _, error in VARIANTS.values()]
    found = torch.stack(list(ends.values())).T
    values = {
        "rank correlation with the paper's errors": [kendalltau(errors, row.tolist()).statistic for row in found],
        "½ and ½ less identity: training loss": (ends["½ and ½"] - ends["identity"]).tolist(),
        "exclusive gate, b=-6 less identity": (ends["exclusive gate, b=-6"] - ends["identity"]).tolist(),
        "exclusive gate, b=0 less b=-6: the same": (
            ends["exclusive gate, b=0"] - ends["exclusive gate, b=-6"]
        ).tolist(),
    }
    for name in ("1 x 1 projection", "dropout shortcut"):
        values[f"{name} less identity: the same"] = (ends[name] - ends["identity"]).tolist()
    order = sorted(range(len(errors)), key=errors.__getitem__)
    return Measured(values, {"variants": Curve([errors[i] for i in order], found[:, order].tolist())})


def best(scheme: str, options: dict[str, Any], examples: Examples, seeds: Sequence[int]) -> Tensor:
    """(S) the final training losses at the rate whose mean over the seeds is lowest."""
    ends = [
        train(lambda: Classifier(DEPTH, scheme, **options), examples, seeds, STEPS, rate)[1][-LAST:].mean(0)
        for rate in RATES
    ]
    return min(ends, key=lambda losses: float(losses.mean()))
