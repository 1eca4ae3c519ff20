"""Precision: how far the stream drifts in bf16 from what it is in full precision."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.lines import fit_log
from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import (
    Batch,
    Seen,
    check_batch,
    check_depth,
    observed,
    sampled,
    text,
    watching,
    wide,
)
from resformer.host import HostStack, find_host

SAMPLE = 1024  # tokens, evenly spaced over the text, that are compared
LOW = (torch.bfloat16, torch.float16, torch.float32)
Key = tuple[str, int, str]

COLUMNS = (
    Column("state", "of what the branch reads: error over size", log=True),
    Column("branch", "of what it gives: error over size", log=True),
    Column("error", "of what the branch reads", "state", shown=False, log=True),
)


@torch.inference_mode(False)  # in which copies would be of tensors that take no part in gradients
@torch.no_grad()
def precision(model: nn.Module, batch: Batch, *, dtype: torch.dtype = torch.bfloat16) -> Measured:
    """Relative error of the states when weights and activations are in bf16, by layer and site.

    With x in the model's own precision, or in fp32 if that is lower, and x' of a copy in `dtype`, both with the same
    inputs (embeddings that are given rounded as the weights are): state = ‖x' - x‖ / ‖x‖ for what the branch of a site
    reads, branch the same for what it gives, error = RMS(x' - x); over at most 1024 tokens, evenly spaced over the
    text. A row "end" has what leaves the stack.

    facts, for each stack: `final`, the error of the end; `power`, the slope of log state against log(1 + l) over sites,
    l in layers: 1/2 where roundings of equal size add up independently, 0 where the stream forgets them; `unit`, half
    the distance of 1 to the next number of `dtype`.

    Two forward passes, of copies of the model one after the other where its precision has to change. Raises a
    ValueError for a dtype other than bfloat16, float16, float32, fewer than two layers and a batch of other keys, and
    `NotFiniteError` where float16 overflows.

    Reference   accumulation of rounding: Higham 2002, Accuracy and Stability of Numerical Algorithms, chapter 4
    """
    if dtype not in LOW:
        raise ValueError(f"dtype must be one of {', '.join(map(str, LOW))}, got {dtype!r}")
    check_batch(model, batch)
    check_depth(find_host(model), "precision")
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    whole = model if floats <= {torch.float32, torch.float64} else copy.deepcopy(model).float()
    exact, (names, depths) = _states(whole, batch)
    del whole
    rounded, _ = _states(copy.deepcopy(model).to(dtype), batch)
    rows: list[Row] = []
    for key, (read, wrote) in exact.items():
        row: Row = dict(zip(("stack", "layer", "site"), key, strict=True))
        row["state"], row["error"] = _distance(rounded[key][0], read)
        row["branch"] = None if wrote is None else _distance(rounded[key][1], wrote)[0]
        rows.append(row)
    facts: dict[str, Any] = {"unit": torch.finfo(dtype).eps / 2}
    for name in names:
        here = [row for row in rows if row["stack"] == name]
        ahead = f"{name}_" if len(names) > 1 else ""
        facts[f"{ahead}final"] = here[-1]["state"]
        sites = max(1, len(here) - 1) / depths[name]
        line = fit_log([math.log1p(i / sites) for i in range(len(here) - 1)], [row["state"] for row in here[:-1]])
        facts[f"{ahead}power"] = None if line is None else line.slope
    return Measured("precision", f"Drift in {str(dtype)[6:]}", COLUMNS, rows, facts, draws=("state", "branch"))


def _states(
    model: nn.Module, batch: Batch
) -> tuple[dict[Key, tuple[Tensor, Tensor | None]], tuple[list[str], dict[str, int]]]:
    """By connection what its branch read and gave, and what left each stack; the stacks that ran, and their depths."""
    found: dict[Key, tuple[Tensor, Tensor | None]] = {}
    ends: dict[str, Tensor] = {}

    def see(one: Seen) -> None:
        mask = text(host, one.at.stack, batch, one.read)
        found[one.at.key] = sampled(one.read, mask, SAMPLE), sampled(one.wrote, mask, SAMPLE)

    def left(stack: HostStack, layer: int, state: Tensor) -> None:
        if layer == len(stack.layers) - 1:
            ends[stack.spec.name] = sampled(state, text(host, stack, batch, state), SAMPLE)

    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    given = {
        name: value.to(own) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    with observed(model, given) as host:
        with watching(host, see, left):
            model(**given)
        depths = {stack.spec.name: len(stack.layers) for stack in host.stacks}
    ordered: dict[Key, tuple[Tensor, Tensor | None]] = {}
    for name, state in ends.items():
        ordered |= {key: value for key, value in found.items() if key[0] == name}
        ordered[name, depths[name], "end"] = state, None
    return ordered, (list(ends), depths)


def _distance(found: Any, exact: Tensor) -> tuple[float, float]:
    """Relative to the size of `exact`, and as a root mean square."""
    x, y = wide(found), wide(exact)
    error = float((x - y).norm())
    return error / max(float(y.norm()), 1e-300), error / math.sqrt(max(1, y.numel()))
