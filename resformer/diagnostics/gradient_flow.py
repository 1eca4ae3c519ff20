"""Gradient flow: how the gradient of the loss changes from the top of the stack to the bottom."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resformer.host import find_host


def gradient_norms(model: PreTrainedModel, batch: dict[str, Any]) -> list[float]:
    """‖∂loss / ∂s_l‖ for what the layers hand on, s_0 (embedding) to s_L, in the unit of the loss per unit of state.

    s_l is all that is carried from layer l to the next, so with several streams or a history the norm is over all of
    these tensors together. Dropout is off, no parameter keeps a gradient, and the model, of a known family, is left
    as it was. The batch has labels.
    """
    host = find_host(model)
    if len(host.stacks) > 1 or host.stacks[0].shared or host.stacks[0].spec.returns:
        raise ValueError(
            f"gradient_norms is for models of one stack whose layers return their states alone, and family "
            f"{host.family.name!r} is not one of them"
        )
    layers = host.layers
    mode, required = model.training, [(p, p.requires_grad) for p in model.parameters()]
    carried: list[tuple[Tensor, ...]] = []

    def tap(stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # a node of its own for each tensor: of two carried on, one may have been made from the other
        carried.append(tuple(tensor.view_as(tensor) for tensor in stream))
        return carried[-1]

    def after(module: Any, args: Any, output: Any) -> Any:
        # a tuple begins with the readable state, which is not on the way to the loss
        return (output[0], *tap(output[1:])) if isinstance(output, tuple) else tap((output,))[0]

    hooks = [layers[0].register_forward_pre_hook(lambda _, args: (*tap(args[:1]), *args[1:]))]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    model.eval()
    try:
        for p, _ in required:
            p.requires_grad_(True)  # a frozen embedding would cut the graph
        loss = model(**batch).loss
        flat = [tensor for stream in carried for tensor in stream]
        gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in required:
            p.requires_grad_(flag)
        model.train(mode)
    return [_norm([next(gradients) for _ in stream]) for stream in carried]


def _norm(gradients: list[Tensor | None]) -> float:
    """Of all together; a tensor that the loss does not depend on adds nothing."""
    return float(sum(g.double().square().sum() for g in gradients if g is not None)) ** 0.5
