"""The training loop: one, on accelerate, for whatever returns a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import is_bf16_available, send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from resformer.errors import unknown
from resformer.schedule import progress, set_progress
from resformer.train.batches import Encoded, ordered, share

PRECISIONS = {"fp32": "no", "no": "no", "bf16": "bf16", "fp16": "fp16"}  # ours -> accelerate's
WINDOW = 25  # steps between looks at the loss: each look waits for the device and for the other processes

# A part of a step's batch that one process computes at once, and its share in the mean loss of the step. The shares of
# all parts of all processes add up to 1.
Part = tuple[dict[str, Tensor], float]


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step."""

    step: int  # from 1
    loss: float  # mean over the whole batch, before the step
    learning_rate: float  # of the first parameter group
    grad_norm: float  # of all gradients together, before clipping


def make_accelerator(precision: str) -> Accelerator:
    """An accelerator for "fp32", "bf16" or "fp16" (autocast; weights stay fp32) on the device that accelerate finds.

    Raises `ValueError` for another precision, or for one that the device lacks.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision == "bf16" and not is_bf16_available():
        raise ValueError("precision 'bf16' is not supported by this device; use precision='fp32'")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision 'fp16' needs a CUDA device; use precision='bf16' or 'fp32'")
    # accelerate keeps one precision for the life of a process and refuses another, but runs here are independent.
    # The process group is kept elsewhere and stays.
    if AcceleratorState._shared_state.get("_mixed_precision") != PRECISIONS[precision]:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=PRECISIONS[precision])


def windows(
    model: nn.Module,
    batches: Iterable[list[Part]],
    optimizer: Optimizer,
    set_rate: Callable[[int], None],
    *,
    steps: int,
    begin: int = 0,
    seed: int = 0,
    accelerator: Accelerator,
    clip: float | None = 1.0,
    look: Callable[[int], bool] = lambda step: step % WINDOW == 0,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[list[Step]]:
    """Take optimizer steps `begin` + 1 to `steps` on `model(**batch).loss`, and give those taken since the last look.

    model      prepared by accelerate, as is `optimizer`
    batches    for each step this process's parts of its batch, as many for every process; their gradients add up to
               that of the mean loss over the whole batch, however it is divided
    set_rate   called with the steps taken, before the next one
    seed       dropout draws at each step from (seed, step, process) alone, so that a run can go on from any step; the
               caller keeps the generators of torch as they were
    clip       largest norm of the gradient; None: not clipped
    look       after which steps all wait for the device and agree on the losses; always after the last

    A window whose last loss is not finite is the last one; it ends with the first such step. The schedule of a scheme,
    if it has one, goes on from where it stands.
    """
    model.train()
    processes = accelerator.num_processes
    before = progress(model)
    pending: list[tuple[Tensor, Tensor, float]] = []
    taken = begin
    for step, parts in zip(range(begin + 1, steps + 1), batches, strict=False):
        torch.manual_seed(_seed(seed, step, accelerator.process_index))
        set_rate(step - 1)
        losses = []
        for number, (batch, part) in enumerate(parts, 1):
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            if number < len(parts):
                with accelerator.no_sync(model):
                    losses.append(_backward(model, batch, part, processes, accelerator))
            else:
                losses.append(_backward(model, batch, part, processes, accelerator))
        norm = accelerator.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of a model that is sharded
        pending.append((torch.stack(losses).sum(), norm.detach(), optimizer.param_groups[0]["lr"]))
        optimizer.step()
        optimizer.zero_grad()
        if before is not None:
            set_progress(model, before + step - begin)
        if on_step:
            on_step(step)
        if look(step) or step == steps:
            window = _settle(pending, taken, accelerator)
            taken += len(window)
            pending.clear()
            yield window
            if not math.isfinite(window[-1].loss):
                return
            model.train()  # whoever looked may have evaluated
    if taken < steps:
        raise RuntimeError(f"the batches ended after step {taken} of {steps}")


def _backward(
    model: nn.Module, batch: dict[str, Tensor], part: float, processes: int, accelerator: Accelerator
) -> Tensor:
    loss = model(**batch).loss * part
    accelerator.backward(loss * processes)  # gradients of several processes are averaged
    return loss.detach().float()


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _settle(pending: list[tuple[Tensor, Tensor, float]], taken: int, accelerator: Accelerator) -> list[Step]:
    """The pending steps as numbers that all processes agree on, up to the first loss that is not finite."""
    losses, norms, rates = zip(*pending, strict=True)
    losses = accelerator.reduce(torch.stack(losses), "sum").tolist()
    norms = accelerator.reduce(torch.stack(norms).float(), "mean").tolist()
    settled = []
    for number, loss, norm, rate in zip(range(taken + 1, taken + 1 + len(rates)), losses, norms, rates, strict=True):
        settled.append(Step(number, loss, rate, norm))
        if not math.isfinite(loss):
            break
    return settled


@torch.no_grad()
def predict(model: nn.Module, encoded: Encoded, *, batch_size: int, accelerator: Accelerator) -> np.ndarray:
    """The logits of every example, (examples, classes) float32, in the order of `encoded`, on every process.

    Examples travel with their numbers and are put back by them, so that copies which fill the last batch
    count once and nothing depends on how many processes there are. Batches are of 4 `batch_size` examples: without
    gradients the activations of one layer are held, not of all.
    """
    model.eval()
    answers: dict[int, np.ndarray] = {}
    for batch in ordered(encoded.lengths, 4 * batch_size):
        index = share(batch, accelerator.process_index, accelerator.num_processes)
        inputs = send_to_device(encoded.collate(index), accelerator.device)
        logits = model(**inputs).logits.float()
        numbers, logits = accelerator.gather((torch.from_numpy(index).to(accelerator.device), logits))
        answers.update(zip(numbers.tolist(), logits.cpu().numpy(), strict=True))
    assert len(answers) == len(encoded)
    return np.stack([answers[i] for i in range(len(encoded))])
