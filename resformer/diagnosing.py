"""A model and a batch to measure it on, as the command line names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from resformer.checkpoint import read_config
from resformer.data.corpus import read_corpus
from resformer.data.glue import load_task
from resformer.data.masking import EVALUATION, mask_batch
from resformer.data.tasks import TASKS
from resformer.data.tokenizer import train_tokenizer
from resformer.errors import unknown
from resformer.host import find_host
from resformer.hosts import families
from resformer.train.load import start_model
from resformer.train.start import Start

HEADS: dict[str, Any] = {
    "masked": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "copying": AutoModelForSeq2SeqLM,
    "classes": AutoModelForSequenceClassification,
}
SENTENCES = (
    "The river rose after three days of rain.",
    "She left the keys on the table and forgot them.",
    "Most of the houses in this street were built before the war.",
    "He could not say why the film had moved him so much.",
    "Bread is made from flour, water, salt and a little yeast.",
    "If the train is late again, we will miss the last boat.",
    "The committee will publish its report next week.",
    "Nobody in the village knew where the old man came from.",
    "A good map shows what is there and leaves out the rest.",
    "The doctor asked whether the pain was worse at night.",
    "They had planned to stay a year and stayed for twenty.",
    "Light travels faster in air than it does in glass.",
    "The children were quiet because the dog was asleep.",
    "It is easier to take a clock apart than to put it together again.",
    "Prices fell in spring, but wages did not follow.",
    "What the letter said was never made public.",
)


@dataclass(frozen=True)
class Subject:
    """What is measured, and on what."""

    model: PreTrainedModel
    batch: dict[str, Tensor]
    loss: str  # which loss the batch's labels give, as people say it

    def __str__(self) -> str:
        host = find_host(self.model)
        depth = " + ".join(str(len(stack.layers)) for stack in host.stacks)
        scheme = (getattr(self.model.config, "resformer", None) or {}).get("scheme")
        ids = self.batch["input_ids"]
        tokens = int(self.batch.get("attention_mask", torch.ones_like(ids)).sum())
        how = f"patched with {scheme}" if scheme else "not patched"
        return (
            f"{type(self.model).__name__} (family {host.family.name}, {depth} layers, {how}), on {len(ids)} "
            f"text{'s' * (len(ids) > 1)}, {tokens} tokens in all; {self.loss}"
        )


def subject(
    start: Start,
    *,
    task: str | None = None,
    data: str | None = None,
    texts: int = 16,
    max_length: int = 128,
    column: str = "text",
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Subject:
    """The model that `start` names with a head that has a loss, and its first `texts` texts as a batch with labels.

    task     a classification task: texts and labels of its validation split, its data in the folder `data`
    data     without a task: a source of text as for `read_corpus`; None: sentences of our own. The labels are those of
             masked language modelling for encoders, of causal for decoders; of an encoder-decoder, the text itself
    column   of the source that holds the text

    Encoders with the head of a classifier keep it, with classes that are made up. Raises a ValueError for an unknown
    task, fewer than one text, and what `start_model` and `read_corpus` refuse.
    """
    if texts < 1:
        raise ValueError(f"texts must be at least 1, got {texts}")
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3, one token between those of begin and end; got {max_length}")
    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS, hint="`resformer data` lists them.")
    if task is not None:
        return _of_task(start, task, data, texts, max_length, seed, say)
    kind = objective(start)
    lines = list(islice(read_corpus(data, column=column), texts)) if data else list(SENTENCES[:texts])
    words = None
    if start.model is None and start.tokenizer is None:
        words = train_tokenizer(lines, max_length=max_length)
    model, tokenizer = start_model(start, HEADS[kind], seed=seed, length=max_length, tokenizer=words, say=say)
    batch = _encode(model, tokenizer, (lines,), max_length)
    return Subject(_placed(model), _labelled(model, tokenizer, batch, kind, seed), _LOSSES[kind])


_LOSSES = {
    "masked": "loss: masked language modelling, 15 % of the tokens",
    "causal": "loss: the next token",
    "copying": "loss: the text itself as the target",
    "classes": "loss: classification, of classes that are made up; --task gives real ones",
}


def objective(start: Start) -> str:
    """Which of `HEADS` a model without a task is given."""
    if start.model is None:
        if start.family not in families():
            raise unknown("family", start.family, families())
        return "causal" if families()[start.family].stacks[0].name == "decoder" else "masked"
    try:
        config = read_config(start.model)
    except OSError:
        return "masked"  # whose loading says why it cannot be read
    if any("SequenceClassification" in name for name in getattr(config, "architectures", None) or ()):
        return "classes"
    if getattr(config, "is_encoder_decoder", False):
        return "copying"
    masked = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    return "masked" if masked else "causal"


def _of_task(
    start: Start, name: str, data: str | None, texts: int, max_length: int, seed: int, say: Callable[[str], None]
) -> Subject:
    task, splits = TASKS[name], load_task(name, data, say=say)
    words = None
    if start.model is None and start.tokenizer is None:
        every = (text for column in task.texts for text in splits["train"][column][:])
        words = train_tokenizer(every, max_length=max_length)
    model, tokenizer = start_model(
        start, HEADS["classes"], seed=seed, length=max_length, task=task, tokenizer=words, say=say
    )
    split = next(splits[one] for one in task.splits if one in splits)
    rows = split.select(range(min(texts, len(split))))
    batch = _encode(model, tokenizer, tuple(list(rows[column]) for column in task.texts), max_length)
    kind = torch.float if task.labels is None else torch.long
    labels = torch.tensor(rows["label"], dtype=kind)
    model = _placed(model)
    return Subject(model, {**batch, "labels": labels.to(model.device)}, f"loss: task {name}")


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    placed: Any = model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return placed


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: tuple[list[str], ...], max_length: int
) -> dict[str, Tensor]:
    given = tokenizer(*texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    taken = inspect.signature(model.forward).parameters
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: value.to(device) for name, value in given.items() if name in taken}


def _labelled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: dict[str, Tensor], kind: str, seed: int
) -> dict[str, Tensor]:
    ids = batch["input_ids"]
    if kind == "classes":
        count: Any = model.config.num_labels
        classes = torch.arange(len(ids), device=ids.device) % max(count, 2)
        return {**batch, "labels": classes.float() if count == 1 else classes}
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if kind != "masked":
        return {**batch, "labels": ids.masked_fill(mask == 0, -100)}
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token, which masked language modelling needs; give another one")
    hidden, labels = ids.clone(), torch.full_like(ids, -100)
    for i, real in enumerate(mask.bool()):  # one by one: it is of each text's own length that 15 % are hidden
        inputs, targets = mask_batch(
            ids[i, real].cpu().numpy()[None],
            np.array([i]),
            seed=seed,
            epoch=EVALUATION,
            vocab_size=len(tokenizer),
            mask_id=tokenizer.mask_token_id,
            special=np.array(tokenizer.all_special_ids),
        )
        hidden[i, real] = torch.from_numpy(inputs[0]).to(ids)
        labels[i, real] = torch.from_numpy(targets[0]).to(ids)
    return {**batch, "input_ids": hidden, "labels": labels}
