"""The encoders that are measured, each with its batch, its loss and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, PreTrainedModel

from benchmark.suite import Bench, Size
from resformer.patching import patch
from resformer.sizes import encoder_config
from resformer.train.plan import Plan, plan

Batch = dict[str, Tensor]  # "input_ids" and "labels", (B T) both
Loss = Callable[[Any, Batch], Tensor]

IGNORED = -100
SHARE = 0.15  # of the tokens that are predicted


def stock(size: Size) -> PreTrainedModel:
    """A BERT for masked language modelling as transformers makes it."""
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(
        encoder_config(
            "bert",
            size.depth,
            size.width,
            vocab_size=size.vocabulary,
            max_length=size.length,
            dropout=size.dropout,
        )
    )


def patched(size: Size, scheme: str, **options: Any) -> PreTrainedModel:
    """The same with a scheme in it; the options are those of `patch`."""
    return patch(stock(size), scheme, **options)


def loss_of_model(model: Any, batch: Batch) -> Tensor:
    """Of a model of transformers, which computes it itself."""
    return model(**batch).loss


def loss_of_logits(model: Any, batch: Batch) -> Tensor:
    """The same, of a model that gives logits (B T V)."""
    return cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


def random_batch(size: Size, device: torch.device) -> Batch:
    """Random tokens; 15 % of each row are to be predicted."""
    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(5, size.vocabulary, (size.batch, size.length), generator=numbers)
    order = torch.rand(ids.shape, generator=numbers).argsort(1)
    labels = ids.masked_fill(order >= max(1, round(SHARE * size.length)), IGNORED)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


class Subject:
    """A model in training, in fp32 on a CPU and under bf16 autocast on a GPU."""

    def __init__(self, model: nn.Module, bench: Bench, loss: Loss = loss_of_model):
        self.model, self.size, self.device, self.loss = model.to(bench.device).train(), bench.size, bench.device, loss
        self.precision = "fp32" if bench.device.type == "cpu" else "bf16"
        self.batch = random_batch(bench.size, bench.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def step(self) -> None:
        """Forward, backward and an AdamW step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.loss(self.model, self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @cached_property
    def plan(self) -> Plan:
        """Parameters, saved bytes and operations of a step."""

        def loss(model: Any, rows: int, length: int) -> Tensor:
            return self.loss(model, {name: tensor[:rows] for name, tensor in self.batch.items()})

        size = self.size
        return plan(self.model, batch=size.batch, length=size.length, precision=self.precision, loss=loss)

    @property
    def flops(self) -> float:
        """Of the matrix products of a step."""
        return self.plan.flops_per_token * self.size.batch * self.size.length
