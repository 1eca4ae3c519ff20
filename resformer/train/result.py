"""What is said of a run in result.json, whatever it trained on."""

from __future__ import annotations

import math
from statistics import fmean, median
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from resformer.optim import scheme_parameters
from resformer.provenance import provenance
from resformer.train.cost import peak_memory_mb
from resformer.train.loop import WINDOW, Step
from resformer.train.run import Job, Outcome

VERSION = 1  # of result.json
SPIKE = 10.0  # times the median norm of the gradient over the window before


def describe_run(
    outcome: Outcome, job: Job, config: dict[str, Any], model: PreTrainedModel, accelerator: Accelerator
) -> dict[str, Any]:
    """Status, losses, score and metrics of the last evaluation, the best one, cost and provenance.

    `train_loss` is the mean of the last 25 steps, `loss_curve` [last step, mean loss] of each window of 25 steps; the
    window in which a run diverged is left out.
    """
    losses = [step.loss for step in outcome.steps]
    last = outcome.last if outcome.status == "ok" else None
    unit, each = job.units
    return {
        "version": VERSION,
        "config": config,
        "status": outcome.status,
        "flags": ["gradient_spikes"] if _spikes(outcome.steps) else [],
        "notes": outcome.notes,
        "score": last.score if last else None,
        "metrics": last.metrics if last else {},
        "best": outcome.best,
        "train_loss": fmean(losses[-WINDOW:]) if losses else None,
        "loss_curve": _curve(losses),
        "cost": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "scheme_parameters": sum(parameter.numel() for parameter in scheme_parameters(model)),
            "steps": len(outcome.steps),
            "seconds": outcome.seconds,  # of training, with evaluations on the way, over all sittings
            f"{unit}_per_second": len(outcome.steps) * each / outcome.seconds if outcome.seconds else None,
            "peak_memory_mb": peak_memory_mb(accelerator.device),
        },
        "provenance": provenance() | {"device": _device(accelerator), "processes": accelerator.num_processes},
    }


def merged(describe: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Both, if they agree; else a `ValueError`."""
    wrong = [
        f"{key} {value!r}, the run has {config[key]!r}"
        for key, value in describe.items()
        if config.get(key, value) != value
    ]
    if wrong:
        raise ValueError(f"describe contradicts the run: {'; '.join(wrong)}")
    return describe | config


def _spikes(steps: list[Step]) -> bool:
    """Whether any gradient, after the first windows, was far larger than those before it."""
    norms = [step.grad_norm for step in steps]
    return any(
        norms[i] > SPIKE * median(norms[i - WINDOW : i])
        for i in range(2 * WINDOW, len(norms))
        if math.isfinite(norms[i])
    )


def _curve(losses: list[float]) -> list[list[float]]:
    windows = [(end, losses[end - WINDOW : end]) for end in range(WINDOW, len(losses) + 1, WINDOW)]
    if len(losses) % WINDOW:
        windows.append((len(losses), losses[-(len(losses) % WINDOW) :]))
    return [[end, fmean(window)] for end, window in windows if all(map(math.isfinite, window))]


def _device(accelerator: Accelerator) -> str:
    import torch

    cuda = accelerator.device.type == "cuda"
    return torch.cuda.get_device_name(accelerator.device) if cuda else f"{accelerator.device.type}"
