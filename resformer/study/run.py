"""One run of a study: make the model, look at it before training, train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from sklearn.model_selection import train_test_split
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from resformer.data.corpus import read_corpus
from resformer.data.glue import load_task
from resformer.data.packing import Packed
from resformer.data.tasks import TASKS, Task
from resformer.data.tokenizer import train_subwords, train_tokenizer
from resformer.description import equation
from resformer.diagnostics.gradient_flow import gradient_norms
from resformer.diagnostics.token_cosine import token_cosine
from resformer.encoders import build_encoder
from resformer.sizes import inner_width
from resformer.spelling import parse_scheme
from resformer.study.plan import Condition, Run
from resformer.study.pretraining import Encoder, Pretraining
from resformer.study.settings import Settings
from resformer.train.batches import Encoded, encode
from resformer.train.finetune import finetune
from resformer.train.folder import CHECKPOINTS
from resformer.train.load import load_model
from resformer.train.pretrain import pack, pretrain
from resformer.train.settings import Settings as Training

LOOKED_AT = 64  # validation examples that the diagnostics at initialisation see
VOCABULARY = 8192  # entries at most, for tasks that are not built in
# The slice of the training data on which a learning rate is chosen: a share, but so many examples at least, of data
# that have not so many a larger share at most.
SLICE, FEWEST, LARGEST = 0.05, 500, 0.2
HELD_OUT = 512  # samples on which an encoder's loss is measured
Parts = tuple[PreTrainedModel, PreTrainedTokenizerBase, Task, DatasetDict, Training]
SAVED = 500  # steps between an encoder's checkpoints, from which it goes on after a stop


def run(run: Run | Encoder, directory: Path, micro_batch_size: int | None = None) -> dict[str, Any]:
    """Train the model of one run and leave result.json in its directory, of an `Encoder` also the model.

    Everything random follows from the seed, and each weight also from its own name: runs that differ in the scheme
    alone start from the same host and see the same batches. `micro_batch_size` changes what is computed at once, and
    of the outcome only the rounding. A run that starts from an encoder finds it in the directory beside its own.
    """
    if isinstance(run, Encoder):
        model, tokenizer, packed, training = encoder_parts(run, micro_batch_size)
        return pretrain(
            model,
            tokenizer,
            packed,
            directory,
            training,
            held_out=HELD_OUT,
            overwrite=not (directory / CHECKPOINTS).is_dir(),  # the configuration that the study has left there
            progress=False,
            describe=run.config,
        )
    beside = None if run.encoder is None else directory.parent / run.encoder / "model"
    model, tokenizer, task, data, training = parts(run, beside, micro_batch_size)
    return finetune(
        model,
        tokenizer,
        task,
        data,
        directory,
        training,
        max_length=run.settings.max_length,
        overwrite=True,  # the configuration that the study has left there
        save_model=False,
        progress=False,
        describe=run.config,
        diagnostics=at_initialisation(model, tokenizer, task, data),
        encode=encoding(run),
    )


def parts(run: Run, encoder: Path | None = None, micro_batch_size: int | None = None) -> Parts:
    """What `finetune` takes for a run that starts from the model in `encoder`, or from that of its settings."""
    settings, task = run.settings, TASKS[run.condition.task]
    data = examples(task.name, settings.data, settings.train_size, run.tuning)
    fresh = settings.model is None and encoder is None
    words = vocabulary(task.name, settings.data, settings.max_length) if fresh else None
    model, tokenizer = start(run, encoder, words)
    assert run.learning_rate is not None
    training = Training(
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
    )
    return model, tokenizer, task, data, training


def start(
    run: Run, encoder: Path | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a run before training, with its tokenizer; `tokenizer` is that of fresh weights.

    Raises `ValueError` for what cannot be built, and where the encoder's folder has no model.
    """
    task, settings = TASKS[run.condition.task], run.settings
    if encoder is not None:
        if not (encoder / "config.json").is_file():
            raise ValueError(f"{encoder} holds no model: bring it from where the encoder was pre-trained")
        return load_model(str(encoder), AutoModelForSequenceClassification, task=task, seed=run.seed)
    name, options = parse_scheme(run.condition.scheme)
    if settings.model is not None:
        return load_model(
            settings.model,
            AutoModelForSequenceClassification,
            task=task,
            scheme=name,
            init=settings.init or "preserve",
            options=options,
            seed=run.seed,
        )
    assert tokenizer is not None
    classes = len(task.labels or ("score",))
    auto, longest = AutoModelForSequenceClassification, settings.max_length
    model = fresh_model(run.condition, settings, run.seed, tokenizer, auto, longest, num_labels=classes)
    return model, tokenizer


def fresh_model(
    shape: Condition,
    settings: Settings,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    auto: Any,
    max_length: int,
    **more: Any,
) -> PreTrainedModel:
    """A new model of a scheme, a depth and a weight initialisation, and so many units more in its feed-forward."""
    name, options = parse_scheme(shape.scheme)
    inner = inner_width(settings.width, settings.ffn_ratio) + shape.extra_ffn
    torch.manual_seed(seed)
    return build_encoder(
        depth=shape.depth,
        width=settings.width,
        heads=settings.heads,
        family=settings.family,
        ffn_ratio=inner / settings.width,
        dropout=settings.dropout,
        tokenizer=tokenizer,
        max_length=max_length,
        scheme=name,
        init=settings.init or "paper",
        weight_init=shape.weight_init,
        auto=auto,
        **more,
        **options,
    )


def encoder_parts(
    run: Encoder, micro_batch_size: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Packed, Training]:
    """What `pretrain` takes for an encoder."""
    given, settings = run.pretraining, run.settings
    tokenizer, packed = prepare_text(given)
    longest = max(given.length, settings.max_length)
    model = fresh_model(run.condition, settings, run.seed, tokenizer, AutoModelForMaskedLM, longest)
    training = Training(
        steps=given.steps,
        batch_size=given.batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=given.learning_rate,
        weight_decay=given.weight_decay,
        warmup=given.warmup,
        schedule=given.schedule,
        precision=settings.precision,
        seed=run.seed,
        save_every=SAVED,
        keep=1,
    )
    return model, tokenizer, packed, training


@lru_cache(maxsize=2)
def subwords(corpus: tuple[str, ...], vocabulary: int) -> PreTrainedTokenizerBase:
    """A tokenizer of the corpus; kept, since a worker trains many encoders on it."""
    return train_subwords(read_corpus(corpus), "wordpiece", vocab_size=vocabulary)


@lru_cache(maxsize=2)
def prepare_text(given: Pretraining) -> tuple[PreTrainedTokenizerBase, Packed]:
    """The tokenizer, and the corpus in its tokens; kept as well."""
    tokenizer = subwords(given.corpus, given.vocabulary)
    return tokenizer, pack(given.corpus, tokenizer, given.length, "mlm")


@lru_cache(maxsize=8)
def load_once(name: str, folder: str | None) -> DatasetDict:
    """The data of a task; kept, since a worker runs many cells of a task."""
    return load_task(name, folder)


@lru_cache(maxsize=8)
def examples(name: str, folder: str | None, size: int | None, tuning: bool) -> DatasetDict:
    """Those on which runs of a task train and are evaluated; kept as well."""
    data = shortened(load_once(name, folder), size)
    return without_slice(data, TASKS[name]) if tuning else data


@lru_cache(maxsize=8)
def vocabulary(name: str, folder: str | None, max_length: int) -> PreTrainedTokenizerBase:
    """A tokenizer of all training texts of a task; kept as well."""
    task, train = TASKS[name], load_once(name, folder)["train"]
    texts = [text for column in task.texts for text in train[column][:]]
    return train_tokenizer(texts, vocab_size=None if task.builtin else VOCABULARY, max_length=max_length)


encode_once = lru_cache(maxsize=8)(encode)


def encoding(run: Run) -> Callable[..., Encoded]:
    """How a run has its texts in tokens: runs from fresh weights share a tokenizer, so that a worker has them once."""
    return encode_once if run.settings.model is None and run.encoder is None else encode


def shortened(data: DatasetDict, size: int | None) -> DatasetDict:
    """Data with no more training examples than `size`; None: all."""
    train = data["train"]
    if size is None or size >= len(train):
        return data
    return DatasetDict(data, train=train.select(range(size)))


def without_slice(data: DatasetDict, task: Task) -> DatasetDict:
    """Training data without a slice, and the slice as the only data to be evaluated on: the same for every run."""
    labels = np.asarray(data["train"]["label"][:])
    size = round(min(max(FEWEST, SLICE * len(labels)), LARGEST * len(labels)))
    classes = None if task.labels is None else labels
    try:
        rest, held = train_test_split(np.arange(len(labels)), test_size=max(1, size), random_state=0, stratify=classes)
    except ValueError as error:
        raise ValueError(
            f"no slice can be held out of the {len(labels)} training examples of {task.name!r} ({error}); give more of "
            "them, or one learning rate"
        ) from None
    split = next(name for name in task.splits if name in data)
    return DatasetDict({"train": data["train"].select(np.sort(rest)), split: data["train"].select(np.sort(held))})


def class_shares(data: DatasetDict, task: Task) -> list[float]:
    """The share of each class of the training examples; empty for a regression."""
    if task.labels is None:
        return []
    counts = np.bincount(np.asarray(data["train"]["label"][:]), minlength=len(task.labels))
    return (counts / counts.sum()).tolist()


def looked_at(tokenizer: PreTrainedTokenizerBase, task: Task, data: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The first validation examples of a task as a batch with labels."""
    split = next(data[name] for name in task.splits if name in data)
    rows = split.select(range(min(count, len(split))))
    inputs = tokenizer(*(list(rows[text]) for text in task.texts), padding=True, truncation=True, return_tensors="pt")
    kind = torch.float if task.labels is None else torch.long
    return {**inputs, "labels": torch.tensor(rows["label"], dtype=kind)}


def at_initialisation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, data: DatasetDict
) -> dict[str, Any]:
    """The equation in force, how the labels are spread over the training examples, and on the first validation examples
    token cosine and the gradient norm of each layer."""
    batch = looked_at(tokenizer, task, data, LOOKED_AT)
    return {
        "equation": equation(model),
        "class_shares": class_shares(data, task),
        "token_cosine": token_cosine(model, {name: value for name, value in batch.items() if name != "labels"}),
        "gradient_norms": gradient_norms(model, batch),
    }
