"""The head of a masked language model on the tokens that are predicted, and on no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CLOSE = 1e-3  # relative, between the losses with and without; half precision is not probed


def find_head(model: PreTrainedModel, batch: dict[str, Tensor]) -> nn.Module | None:
    """The module that the last states (B T D) enter on their way to the logits; None where the loss of picked states is
    not that of all. `batch` has "labels" (B T), -100 where a token is not predicted."""
    first: list[nn.Module] = []
    shape = batch["input_ids"].shape

    def entered(module: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 3 and args[0].shape[:2] == shape and not first:
            first.append(module)

    heads = [child for child in model.children() if child is not model.base_model]
    hooks = [child.register_forward_pre_hook(entered) for child in heads]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(**batch).loss
            for hook in hooks:
                hook.remove()
            if not first:
                return None
            with picking(model, first[0]):
                picked = model(**pick(batch)).loss
    except (RuntimeError, ValueError, TypeError, IndexError):  # labels of another shape than it expects
        return None
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return first[0] if abs(float(picked - whole)) <= CLOSE * abs(float(whole)) else None


def pick(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """With "positions" (N), of the predicted tokens in the batch laid out flat, and "labels" (N) of those alone."""
    labels = batch["labels"].flatten()
    positions = (labels != -100).nonzero()[:, 0]
    return batch | {"labels": labels[positions], "positions": positions}


@contextmanager
def picking(model: PreTrainedModel, head: nn.Module) -> Iterator[None]:
    """Within, the model takes "positions" (N) beside its own arguments, and its head computes these states alone."""
    chosen: list[Any] = [None]  # of the forward pass in progress

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        chosen[0] = kwargs.pop("positions", None)
        return args, kwargs

    def narrow(module: nn.Module, args: tuple) -> tuple:
        return args if chosen[0] is None else (args[0].flatten(0, 1)[chosen[0]], *args[1:])

    hooks = [model.register_forward_pre_hook(begin, with_kwargs=True), head.register_forward_pre_hook(narrow)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
