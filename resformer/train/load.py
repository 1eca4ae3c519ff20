"""What a fine-tuning run starts from: a checkpoint, patched before or to be patched now, with a fresh head."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from resformer.checkpoint import from_pretrained, read_config
from resformer.data.tasks import Task
from resformer.patching import patch


def load_classifier(
    path: str,
    task: Task,
    *,
    scheme: str | None = None,
    init: str = "preserve",
    placement: str | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier for the task, with its tokenizer; the head is drawn from the seed.

    path     a folder or a hub id; of a patched checkpoint the scheme comes with it
    scheme   patched onto an unpatched checkpoint; None: the host as it is

    Raises `ValueError` if the folder holds no model, or holds a patched one while a scheme is given.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"model {path!r} holds no config.json; give the folder of a transformers checkpoint")
    try:
        config = read_config(path)
    except OSError as error:
        raise ValueError(f"cannot read model {path!r}: {str(error).splitlines()[0]}") from error
    config.num_labels = len(task.labels or ("score",))
    if task.labels is not None:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: number for number, label in enumerate(task.labels)}
    patched = getattr(config, "resformer", None)
    if placement and not scheme:
        raise ValueError(f"placement {placement!r} is of a scheme; give the scheme as well")
    if patched and scheme:
        raise ValueError(f"model {path!r} is patched with {patched['scheme']!r} already; leave the scheme out")
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification
    load = partial(from_pretrained, auto=auto) if patched else auto.from_pretrained
    try:
        model = load(path, config=config, ignore_mismatched_sizes=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights of model {path!r}: {error}") from error
    tokenizer = AutoTokenizer.from_pretrained(path, config=config)  # else it asks about the checkpoint's own code
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"model {path!r} holds no tokenizer; save it there with tokenizer.save_pretrained")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:  # GPT-2 has none: any will do, it is masked
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    if scheme:
        patch(model, scheme, init=init, placement=placement, **(options or {}))
    return model, tokenizer
