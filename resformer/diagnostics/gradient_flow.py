"""Gradient flow: how the gradient of the loss changes from the top of the stack to the bottom."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def gradient_norms(model: PreTrainedModel, batch: dict[str, Any]) -> list[float]:
    """‖∂loss / ∂h_l‖_F for the hidden states h_0 (embedding) to h_L, in the unit of the loss per unit of state.

    Dropout is off, no parameter keeps a gradient, and the model is left as it was. The batch has labels.
    """
    mode, required = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        for p, _ in required:
            p.requires_grad_(True)  # a frozen embedding would cut the graph
        output = model(**batch, output_hidden_states=True)
        gradients = torch.autograd.grad(output.loss, output.hidden_states, allow_unused=True)
    finally:
        for p, flag in required:
            p.requires_grad_(flag)
        model.train(mode)
    return [0.0 if g is None else float(g.double().norm()) for g in gradients]
