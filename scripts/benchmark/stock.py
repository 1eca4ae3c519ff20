"""The training loops that people use now, written out: what ours are measured against."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
    set_seed,
)

from resformer.data.tasks import Task
from resformer.train.loop import make_accelerator

UNDECAYED = ("bias", "LayerNorm.weight")


def glue_epoch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data: DatasetDict,
    *,
    seed: int,
    batch_size: int = 32,
    max_length: int = 128,
    learning_rate: float = 5e-5,
) -> tuple[float, np.ndarray]:
    """One epoch of transformers' `run_glue_no_trainer.py` in fp32, and its predictions on the evaluation split.

    Batches are random and padded to their longest example, the optimizer is torch's AdamW as it comes (without decay),
    and the rate falls linearly from the first step on. The seconds are those of the epoch alone, batching included,
    tokenising and evaluation not.
    """
    torch.set_float32_matmul_precision("highest")
    set_seed(seed)
    accelerator = make_accelerator("fp32")

    def preprocess(rows: dict[str, Any]) -> Any:
        encoded = tokenizer(*(rows[text] for text in task.texts), max_length=max_length, truncation=True)
        return encoded | {"labels": rows["label"]}

    names = ("train", task.splits[0])
    train, held = (data[n].map(preprocess, batched=True, remove_columns=data[n].column_names) for n in names)
    collate = DataCollatorWithPadding(tokenizer)
    train_loader = DataLoader(train, shuffle=True, collate_fn=collate, batch_size=batch_size)
    held_loader = DataLoader(held, collate_fn=collate, batch_size=batch_size)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if not any(part in n for part in UNDECAYED)], "weight_decay": 0.0},
        {"params": [p for n, p in named if any(part in n for part in UNDECAYED)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=len(train_loader))
    model, optimizer, train_loader, held_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, held_loader, scheduler
    )
    model.train()
    start = time.perf_counter()
    for batch in train_loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    taken = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        answers = [model(**batch).logits.argmax(-1).cpu().numpy() for batch in held_loader]
    return taken, np.concatenate(answers)


def mlm_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[np.ndarray],
    *,
    batch_size: int,
    precision: str,
    at_once: int = 1,
    learning_rate: float = 1e-4,
) -> Iterator[None]:
    """Steps of masked language modelling without end, `at_once` at a time: transformers' collator, autocast, and
    torch's AdamW as they come.

    `samples` hold the ids of full-length inputs, special tokens included.
    """
    special = tokenizer.all_special_ids
    rows = [
        {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * len(ids),
            "special_tokens_mask": np.isin(ids, special).astype(int).tolist(),
        }
        for ids in samples
    ]
    loader = DataLoader(
        rows, shuffle=True, batch_size=batch_size, collate_fn=DataCollatorForLanguageModeling(tokenizer)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    device = model.device
    model.train()
    for epoch in count():
        for number, batch in enumerate(loader, epoch * len(loader) + 1):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number % at_once == 0:
                yield
