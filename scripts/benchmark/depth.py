"""Whether a layer costs the same in deeper nets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from benchmark.measuring import interleaved, ratios
from benchmark.nets import Batch, Subject, patched
from benchmark.suite import Bench, Goal, Row, Suite, Values

TIMES = (1, 2, 4, 8)  # of the depth of the other suites


def loss_of_states(model: Any, batch: Batch) -> Tensor:
    """Without a head, whose cost is no layer's."""
    return model.bert(input_ids=batch["input_ids"])[0].float().square().mean()


def measure(row: Row, bench: Bench) -> Values:
    """All depths in turn; the optimizer's step is part of it."""
    bench.tell("memory")
    subjects: dict[int, Subject] = {}
    for times in TIMES:
        size = replace(bench.size, depth=times * bench.size.depth)
        subjects[times] = Subject(
            patched(size, row.given["scheme"], init="paper"), replace(bench, size=size), loss_of_states
        )
    base, *deeper = TIMES
    saved = {times: one.plan.activations_mib / times for times, one in subjects.items()}
    values: Values = {f"saved x{times}": saved[times] / saved[base] for times in deeper}
    if bench.pairs and not row.given.get("all_before"):
        acts = {str(times): one.step for times, one in subjects.items()}
        taken = interleaved(acts, bench.pairs, bench.device, bench.tell)
        for times in deeper:
            values[f"time x{times}"] = ratios([t / times for t in taken[str(times)]], taken[str(base)])
    return values


TIME = tuple(Goal(f"time x{times}", most=1.05, least=0.95) for times in TIMES[1:])
SAVED = tuple(Goal(f"saved x{times}", most=1.01, least=0.99) for times in TIMES[1:])
SUITE = Suite(
    "depth",
    "time and saved bytes per layer at 2, 4 and 8 times the depth (from 24 layers 48, 96 and 192) over those at "
    "it, of a training step of the encoder without a head",
    ("time x2", "time x4", "time x8", "saved x8"),
    (
        *(
            Row(scheme, (*TIME, *SAVED), {"scheme": scheme})
            for scheme in ("identity", "layer_scale", "highway", "hyper_connections")
        ),
        *(
            Row(scheme, SAVED, {"scheme": scheme, "all_before": True}, "each layer reads all before it, so no time")
            for scheme in ("denseformer", "dlcl", "attn_residual")
        ),
    ),
    measure,
    more=("saved x2", "saved x4"),
)
