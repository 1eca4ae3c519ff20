"""What is measured of a net before it is trained, and may or may not tell whether it will."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resformer.data.tasks import TASKS, Task
from resformer.diagnostics.gradient_flow import gradient_norms
from resformer.diagnostics.lines import fit
from resformer.diagnostics.token_cosine import token_cosine
from resformer.diagnostics.update_size import update_size
from resformer.study.plan import Run
from resformer.study.run import load_once, looked_at, start, vocabulary

EXAMPLES = 16  # of the validation split
RATE = 1e-6  # so small that the change is in proportion to it in all schemes; at 1e-4 that of post-LN levels off
PREDICTORS = {
    "token_cosine": "mean cosine between the last states of two tokens of a sentence",
    "update_size": "relative change of the last states by one step of Adam, for a step of 1e-3",
    "gradient_spread": "decades between the largest and the smallest gradient norm of the states",
}


def at_start(run: Run) -> dict[str, float]:
    """The predictors on the net that a run of fresh weights starts from, and `gradient_rate`, the factor by which the
    gradient changes from a layer to the one below; infinite where a net gives no finite number.

    token_cosine     mean over pairs of tokens of a sentence of cos(s_i, s_j), last states
    update_size      1e-3 / η RMS(s_L(θ_1) - s_L(θ_0)) / RMS(s_L(θ_0)) after one step of Adam at η = 1e-6 on the
                     loss of the task
    gradient_spread  log10 of max_l ‖∂loss/∂s_l‖ / min_l ‖∂loss/∂s_l‖ over what the layers 0 ... L hand on
    gradient_rate    exp of the slope of ln ‖∂loss/∂s_l‖ over l, from the top down

    All on the first 16 validation examples, in evaluation mode. Raises a `ValueError` for a run whose weights are not
    drawn, and for families of several stacks.
    """
    model, tokenizer, task, rows = fresh(run)
    batch = looked_at(tokenizer, task, rows, EXAMPLES)
    norms = gradient_norms(model, batch)
    change = update_size(model, batch, steps=1, learning_rate=RATE).facts["last"]
    found = {
        "token_cosine": token_cosine(model, {name: value for name, value in batch.items() if name != "labels"}),
        "update_size": 1e-3 / RATE * change,
        "gradient_spread": spread(norms),
        "gradient_rate": rate(norms),
    }
    return {name: value if math.isfinite(value) else math.inf for name, value in found.items()}


def fresh(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Task, Any]:
    """The net that a run starts from, with its tokenizer, its task and the task's splits."""
    settings, task = run.settings, TASKS[run.condition.task]
    if settings.model is not None or run.encoder is not None:
        raise ValueError(f"{run}: it starts from trained weights; what is measured here is of nets with fresh ones")
    words = vocabulary(task.name, settings.data, settings.max_length)
    with torch.random.fork_rng(devices=[]):
        model, tokenizer = start(run, None, words)
    return model, tokenizer, task, load_once(task.name, settings.data)


def spread(norms: list[float]) -> float:
    """log10 of the largest over the smallest; infinite where one is zero or not finite."""
    if not all(map(math.isfinite, norms)) or min(norms) <= 0:
        return math.inf
    return math.log10(max(norms) / min(norms))


def rate(norms: list[float]) -> float:
    """The factor of a layer from the top down, by least squares in logarithms; infinite as in `spread`."""
    if spread(norms) == math.inf:
        return math.inf
    line = fit(range(len(norms)), [math.log(norm) for norm in norms])
    return 1.0 if line is None else math.exp(-line.slope)
