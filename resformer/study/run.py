"""One cell of a study: build the encoder, look at it before training, train it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from resformer.data.glue import load_task
from resformer.data.tasks import TASKS, Task
from resformer.data.tokenizer import train_tokenizer
from resformer.description import equation
from resformer.diagnostics.gradient_flow import gradient_norms
from resformer.diagnostics.token_cosine import token_cosine
from resformer.encoders import build_encoder
from resformer.spelling import parse_scheme
from resformer.study.plan import Run
from resformer.train.finetune import finetune
from resformer.train.settings import Settings

LOOKED_AT = 64  # validation examples that the diagnostics at initialisation see
VOCABULARY = 8192  # entries at most, for tasks that are not built in


def run(run: Run, directory: Path) -> dict[str, Any]:
    """Train the encoder of one cell from scratch and leave result.json in its directory.

    Everything random follows from the seed, and each weight from the seed and its name: cells of a seed that differ in
    the scheme start from the same host, those that differ in depth from the same lower layers, embeddings and head; all
    see the same batches.
    """
    settings, task = run.settings, TASKS[run.task]
    data, tokenizer = prepare(run.task, settings.data, settings.max_length)
    if settings.train_size is not None:
        data = DatasetDict(data, train=data["train"].select(range(min(settings.train_size, len(data["train"])))))
    name, options = parse_scheme(run.scheme)
    torch.manual_seed(run.seed)
    model = build_encoder(
        depth=run.depth,
        width=settings.width,
        heads=settings.heads,
        ffn_ratio=(settings.ffn or 4 * settings.width) / settings.width,
        dropout=settings.dropout,
        vocab_size=len(tokenizer),
        max_length=settings.max_length,
        num_labels=len(task.labels or ("score",)),
        scheme=name,
        init=settings.init,
        weight_init=settings.weight_init,
        auto=AutoModelForSequenceClassification,
        **options,
    )
    return finetune(
        model,
        tokenizer,
        task,
        data,
        directory,
        Settings(
            steps=settings.steps,
            batch_size=settings.batch_size,
            learning_rate=run.learning_rate,
            weight_decay=settings.weight_decay,
            scheme_lr_multiplier=settings.scheme_lr_multiplier,
            warmup=settings.warmup,
            schedule=settings.schedule,
            clip=settings.clip,
            precision=settings.precision,
            seed=run.seed,
        ),
        max_length=settings.max_length,
        save_model=False,
        progress=False,
        describe=run.config,
        diagnostics=at_initialisation(model, tokenizer, task, data),
    )


@lru_cache(maxsize=8)
def prepare(name: str, folder: str | None, max_length: int) -> tuple[DatasetDict, PreTrainedTokenizerBase]:
    """The data of a task and a tokenizer of its training texts; kept, since a worker runs many cells of a task."""
    task = TASKS[name]
    data = load_task(name, folder)
    texts = [text for column in task.texts for text in data["train"][column]]
    vocabulary = None if task.builtin else VOCABULARY
    return data, train_tokenizer(texts, vocab_size=vocabulary, max_length=max_length)


def at_initialisation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, data: DatasetDict
) -> dict[str, Any]:
    """The equation in force, and on the first validation examples token cosine and the gradient norm of each layer."""
    split = next(data[name] for name in task.splits if name in data)
    rows = split.select(range(min(LOOKED_AT, len(split))))
    inputs = tokenizer(*(list(rows[text]) for text in task.texts), padding=True, truncation=True, return_tensors="pt")
    kind = torch.float if task.labels is None else torch.long
    return {
        "equation": equation(model),
        "token_cosine": token_cosine(model, dict(inputs)),
        "gradient_norms": gradient_norms(model, {**inputs, "labels": torch.tensor(rows["label"], dtype=kind)}),
    }
