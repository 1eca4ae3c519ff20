"""Token collapse: how alike the token states of one sentence have become."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def token_cosine(model: PreTrainedModel, batch: dict[str, Any]) -> float:
    """Mean cosine between the last hidden states of two different tokens of a sentence, over a batch; in [-1, 1].

    1 means that all tokens have become one vector, from which no layer above can tell them apart. Padding is left
    out, and so are sentences of a single token. Measured in evaluation mode; the model is left as it was.

    Reference   rank collapse: Dong et al. 2021, arXiv:2103.03404
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"token_cosine is for models of one stack, and this {type(model).__name__} has two; measure its encoder: "
            "token_cosine(model.get_encoder(), batch)"
        )
    mode = model.training
    model.eval()
    try:
        hidden = model.base_model(**batch).last_hidden_state
    finally:
        model.train(mode)
    return mean_cosine(hidden.double(), batch["attention_mask"])


def mean_cosine(hidden: Tensor, mask: Tensor) -> float:
    """(B T D), (B T) -> the mean over sentences of the mean cosine over pairs of different tokens."""
    return mean_product(torch.nn.functional.normalize(hidden, dim=-1), mask)


def mean_product(unit: Tensor, mask: Tensor) -> float:
    """The same of states that are unit vectors."""
    unit = unit * mask[..., None]
    tokens = mask.sum(1).to(unit.dtype)
    # the sum over all pairs, a token with itself included, is the square of the sum of unit vectors
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
    cosine = pairs / (tokens * (tokens - 1)).clamp_min(1)
    return float(cosine[tokens > 1].mean())
