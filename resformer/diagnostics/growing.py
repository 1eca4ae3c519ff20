"""What a deep net gains by growing from a shallow one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resformer.diagnostics.measured import Column, Measured, Row
from resformer.encoders import build_encoder
from resformer.growing import grow

WIDTH, WORDS, TOKENS, BATCH = 32, 20, 12, 32

COLUMNS = (Column("loss", "training loss, mean over seeds", "loss"),)


def growing(
    scheme: str = "pre_ln",
    *,
    shallow: int = 2,
    deep: int = 6,
    steps: tuple[int, int] = (50, 50),
    learning_rate: float = 1e-3,
    seeds: Sequence[int] = range(2),
) -> Measured:
    """A shallow net that is made deeper with `resformer.grow` and trained on, against one that is deep from its start.

    BERT of width 32 in a scheme, Xavier, Adam at a constant rate, on which half of 20 words makes up most of a sentence
    of 12. loss: of each step, mean over seeds.

    facts: `jump`, the largest change of the loss on one batch that growing makes, 0 where the function is kept;
    `shallow` before growing, `grown` and `fresh` at the end: means over the last 15 steps.

    Raises a ValueError for an unknown scheme, and as `resformer.grow` does.

    Reference   He et al. 2015, arXiv:1512.03385, section 1 (the construction)
    """
    if not seeds:
        raise ValueError("growing needs at least one seed, got none")
    with torch.random.fork_rng(devices=[]):
        found = [
            grown_against_fresh(
                partial(majority_model, scheme, seed),
                partial(majority_batch, seed),
                shallow=shallow,
                deep=deep,
                steps=steps,
                learning_rate=learning_rate,
            )
            for seed in seeds
        ]
    rows: list[Row] = []
    losses = {"grown": [one.shallow + one.grown for one in found], "fresh": [one.fresh for one in found]}
    for net, several in losses.items():
        rows += [{"net": net, "step": step, "loss": fmean(row)} for step, row in enumerate(zip(*several, strict=True))]
    facts: dict[str, Any] = {"jump": max((one.jump for one in found), key=abs)}
    facts |= {name: fmean(ended(getattr(one, name)) for one in found) for name in ("shallow", "grown", "fresh")}
    return Measured(
        "growing", "Grown against fresh", COLUMNS, rows, facts, keys=("net", "step"), along="step", draws=("loss",)
    )


def majority_model(scheme: str, seed: int, layers: int) -> PreTrainedModel:
    """A fresh BERT that classifies sentences, with weights of a seed."""
    from transformers import AutoModelForSequenceClassification  # takes seconds, in each process

    torch.manual_seed(seed)
    return build_encoder(
        layers,
        WIDTH,
        scheme,
        vocab_size=WORDS,
        weight_init="xavier",
        heads=2,
        dropout=0.0,
        auto=AutoModelForSequenceClassification,
    )


def majority_batch(seed: int, step: int) -> dict[str, Tensor]:
    """Random sentences, and whether words of the first half are most of each."""
    words = torch.randint(WORDS, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1000 * seed + step))
    return {"input_ids": words, "labels": ((words < WORDS // 2).sum(1) > TOKENS // 2).long()}


def ended(losses: Sequence[float]) -> float:
    """The mean over the last 15 steps."""
    return fmean(losses[-15:])


@dataclass(frozen=True)
class Grown:
    """Training losses: `shallow` before growing, `grown` after, `fresh` of a net as deep from its start; `jump` is the
    difference of the loss on one batch that growing makes."""

    shallow: list[float]
    grown: list[float]
    fresh: list[float]
    jump: float


def grown_against_fresh(
    build: Callable[[int], PreTrainedModel],
    batches: Callable[[int], dict[str, Any]],
    *,
    shallow: int,
    deep: int,
    steps: tuple[int, int],
    learning_rate: float = 1e-3,
) -> Grown:
    """Train a shallow model, make it deeper with `resformer.grow`, train on; and a fresh deep one for all of the steps.

    Args:
        build: a patched model of so many layers, with a head. batches: step -> batch with labels.
        shallow, deep: layers. steps: before and after growing. Adam at a constant rate, made anew after growing.
    """
    first, second = steps
    model = build(shallow)
    before = _train(model, [batches(step) for step in range(first)], learning_rate)
    probe = batches(first)
    was = _loss(model, probe)
    grow(model, deep)
    jump = _loss(model, probe) - was
    later = [batches(step) for step in range(first, first + second)]
    after = _train(model, later, learning_rate)
    fresh = _train(build(deep), [batches(step) for step in range(first + second)], learning_rate)
    return Grown(before, after, fresh, jump)


def _train(model: PreTrainedModel, batches: Sequence[dict[str, Any]], learning_rate: float) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses = []
    model.train()
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def _loss(model: PreTrainedModel, batch: dict[str, Any]) -> float:
    model.eval()
    return float(model(**batch).loss)
