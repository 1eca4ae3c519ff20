"""One run of a study: make the model, look at it before training, train it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from sklearn.model_selection import train_test_split
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from resformer.data.glue import load_task
from resformer.data.tasks import TASKS, Task
from resformer.data.tokenizer import train_tokenizer
from resformer.description import equation
from resformer.diagnostics.gradient_flow import gradient_norms
from resformer.diagnostics.token_cosine import token_cosine
from resformer.encoders import build_encoder
from resformer.sizes import inner_width
from resformer.spelling import parse_scheme
from resformer.study.plan import Condition, Run
from resformer.study.settings import Settings
from resformer.train.finetune import finetune
from resformer.train.load import load_model
from resformer.train.settings import Settings as Training

LOOKED_AT = 64  # validation examples that the diagnostics at initialisation see
VOCABULARY = 8192  # entries at most, for tasks that are not built in
# The slice of the training data on which a learning rate is chosen: a share, but so many examples at least, of data
# that have not so many a larger share at most.
SLICE, FEWEST, LARGEST = 0.05, 500, 0.2


def run(run: Run, directory: Path, micro_batch_size: int | None = None) -> dict[str, Any]:
    """Train the model of one run and leave result.json in its directory.

    Everything random follows from the seed, and each weight also from its own name: runs that differ in the scheme
    alone start from the same host and see the same batches. `micro_batch_size` changes what is computed at once, and
    of the outcome only the rounding.
    """
    settings, task = run.settings, TASKS[run.condition.task]
    data, words = prepare(task.name, settings.data, settings.max_length, tokenized=settings.model is None)
    if settings.train_size is not None:
        data = DatasetDict(data, train=data["train"].select(range(min(settings.train_size, len(data["train"])))))
    if run.tuning:
        data = without_slice(data, task)
    model, tokenizer = start(run.condition, settings, run.seed, words)
    assert run.learning_rate is not None
    return finetune(
        model,
        tokenizer,
        task,
        data,
        directory,
        Training(
            steps=settings.steps,
            epochs=run.config.get("epochs", 1.0),
            batch_size=settings.batch_size,
            micro_batch_size=micro_batch_size,
            learning_rate=run.learning_rate,
            weight_decay=settings.weight_decay,
            beta2=settings.beta2,
            epsilon=settings.epsilon,
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


def start(
    condition: Condition, settings: Settings, seed: int, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a run before training, with its tokenizer; `tokenizer` is that of a new model."""
    name, options = parse_scheme(condition.scheme)
    task = TASKS[condition.task]
    if settings.model is not None:
        return load_model(
            settings.model,
            AutoModelForSequenceClassification,
            task=task,
            scheme=name,
            init=settings.init or "preserve",
            options=options,
            seed=seed,
        )
    assert tokenizer is not None
    inner = inner_width(settings.width, settings.ffn_ratio) + condition.extra_ffn
    torch.manual_seed(seed)
    model = build_encoder(
        depth=condition.depth,
        width=settings.width,
        heads=settings.heads,
        family=settings.family,
        ffn_ratio=inner / settings.width,
        dropout=settings.dropout,
        tokenizer=tokenizer,
        max_length=settings.max_length,
        num_labels=len(task.labels or ("score",)),
        scheme=name,
        init=settings.init or "paper",
        weight_init=condition.weight_init,
        auto=AutoModelForSequenceClassification,
        **options,
    )
    return model, tokenizer


@lru_cache(maxsize=8)
def prepare(
    name: str, folder: str | None, max_length: int, *, tokenized: bool = True
) -> tuple[DatasetDict, PreTrainedTokenizerBase | None]:
    """The data of a task and a tokenizer of its training texts; kept, since a worker runs many cells of a task."""
    task = TASKS[name]
    data = load_task(name, folder)
    if not tokenized:
        return data, None
    texts = [text for column in task.texts for text in data["train"][column]]
    vocabulary = None if task.builtin else VOCABULARY
    return data, train_tokenizer(texts, vocab_size=vocabulary, max_length=max_length)


def without_slice(data: DatasetDict, task: Task) -> DatasetDict:
    """Training data without a slice, and the slice as the only data to be evaluated on: the same for every run."""
    labels = np.asarray(data["train"]["label"])
    size = round(min(max(FEWEST, SLICE * len(labels)), LARGEST * len(labels)))
    classes = None if task.labels is None else labels
    rest, held = train_test_split(np.arange(len(labels)), test_size=max(1, size), random_state=0, stratify=classes)
    split = next(name for name in task.splits if name in data)
    return DatasetDict({"train": data["train"].select(np.sort(rest)), split: data["train"].select(np.sort(held))})


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
