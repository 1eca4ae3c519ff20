"""Update size: how far the first steps of training move what each layer hands on."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import (
    Batch,
    check_batch,
    check_depth,
    check_loss,
    loss_of,
    observed,
    sampled,
    text,
    watching,
    wide,
)
from resformer.errors import unknown
from resformer.host import HostStack, find_host

SAMPLE = 1024  # tokens, evenly spaced over the text, whose states are compared
OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

COLUMNS = (
    Column("change", "RMS of the state's change since step 0", "state", log=True),
    Column("relative", "that, over the RMS of the state at step 0", log=True),
)


@torch.inference_mode(False)  # in which nothing could be trained
def update_size(
    model: nn.Module, batch: Batch, *, steps: int = 4, learning_rate: float = 1e-4, optimizer: str = "adam"
) -> Measured:
    """‖f_l(x; θ_t) - f_l(x; θ_0)‖ after the first steps of training on one batch, by layer.

    f_l is the readable state after layer l, f_0 what the first branch reads. A copy of the model takes `steps` steps of
    Adam or SGD at a constant learning rate on the batch, without dropout, decay or clipping, and after each step:

    change = RMS(f_l(x; θ_t) - f_l(x; θ_0)), relative = change / RMS(f_l(x; θ_0)), over at most 1024 tokens, evenly
    spaced over the text.

    The law is about how the last layer's change grows with the number of layers L of the net. For random changes of the
    weights its square grows with L in post-LN, with ln L in pre-LN, not at all in DeepNorm; for a step of SGD
    (optimizer="sgd") DeepNorm does not grow either, while pre-LN grows about as L^0.8. Adam's first steps are of one
    size for all weights, which no theorem covers: with them DeepNorm grows too, about as L^0.5 to L^0.7.

    facts, for each stack: `last`, the relative change of the last layer after one step, and after all, `last_of_all`;
    `losses`, before each step and at the end.

    Memory of a copy, its gradients and the optimizer's state. Raises a ValueError for a model without a loss or without
    parameters to train, fewer than two layers, steps below 1, a learning rate not above 0, an unknown optimizer.

    Reference   Liu et al. 2020 (Admin), arXiv:2004.08249; Wang et al. 2022 (DeepNet), arXiv:2203.00555, section 4
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if not learning_rate > 0 or not math.isfinite(learning_rate):
        raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate!r}")
    if optimizer not in OPTIMIZERS:
        raise unknown("optimizer", optimizer, OPTIMIZERS)
    check_batch(model, batch)
    check_depth(find_host(model), "update_size")
    check_loss(model, batch)
    ours = copy.deepcopy(model)
    trained = [p for p in ours.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"this {type(model).__name__} has no parameter that is trained; all are frozen")
    for p in trained:
        p.grad = None
    moves = OPTIMIZERS[optimizer](trained, lr=learning_rate)
    rows: list[Row] = []
    losses: list[float] = []
    last: dict[str, list[float]] = {}
    start = _states(ours, batch, losses, backward=True)
    for step in range(1, steps + 1):
        moves.step()
        moves.zero_grad()
        now = _states(ours, batch, losses, backward=step < steps)
        for (stack, layer), state in start.items():
            change = _rms(wide(now[stack, layer]) - wide(state))
            relative = change / max(_rms(wide(state)), 1e-300)
            rows.append({"step": step, "stack": stack, "layer": layer, "change": change, "relative": relative})
        for stack in dict.fromkeys(stack for stack, _ in start):
            last.setdefault(stack, []).append([row for row in rows if row["stack"] == stack][-1]["relative"])
    facts: dict[str, Any] = {"losses": " ".join(f"{loss:.4g}" for loss in losses)}
    for stack, values in last.items():
        ahead = f"{stack}_" if len(last) > 1 else ""
        facts |= {f"{ahead}last": values[0], f"{ahead}last_of_all": values[-1]}
    return Measured(
        "update_size",
        "Change of the states in the first steps",
        COLUMNS,
        rows,
        facts,
        keys=("step", "stack", "layer"),
        draws=("change", "relative"),
    )


def _states(model: nn.Module, batch: Batch, losses: list[float], *, backward: bool) -> dict[tuple[str, int], Tensor]:
    """The state that enters each stack and after each layer, by stack and number, with the gradients of the loss."""
    found: dict[tuple[str, int], Tensor] = {}

    def left(stack: HostStack, layer: int, state: Tensor) -> None:
        found[stack.spec.name, layer + 1] = sampled(state.detach(), text(host, stack, batch, state), SAMPLE)

    def see(one: Any) -> None:
        if one.at.index == 0:
            state = one.read.detach()
            found[one.at.name, 0] = sampled(state, text(host, one.at.stack, batch, state), SAMPLE)

    with observed(model, batch) as host, torch.set_grad_enabled(backward):
        with watching(host, see, left):
            loss = loss_of(model, batch)
        losses.append(float(loss.detach()))
        if backward:
            loss.backward()
    order = sorted(found, key=lambda key: (key[0] == "decoder", key[1]))
    return {key: found[key] for key in order}


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
