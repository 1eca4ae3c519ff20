"""What a run starts from: a checkpoint, patched before or to be patched now, or fresh weights of a given size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from resformer.checkpoint import from_pretrained, read_config
from resformer.data.tasks import Task
from resformer.drawing import fresh_seed, redraw
from resformer.encoders import build_encoder
from resformer.patching import patch, unpatch
from resformer.sizes import Match, layer_parameters
from resformer.train.start import Start

TOKENIZERS = ("*token*", "vocab*", "*.model", "*.tiktoken")  # files of one, without which transformers makes some up
SHORT = 512  # tokens, up to which eager attention in bf16 was measured to be faster than sdpa on CPUs


def start_model(
    start: Start,
    auto: Any,
    *,
    seed: int,
    length: int,
    precision: str = "fp32",
    task: Task | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a run, of an Auto class, and its tokenizer; what is new is drawn from the seed.

    length     tokens of the longest input
    task       whose labels the model gives
    tokenizer  of a new model for which none is named
    say        is given a line about a width that was found for a number of parameters

    A new model without a scheme is a plain one of transformers, which needs no resformer.
    """
    name, options = start.patching
    attention = start.attention or _attention(length, precision)
    if start.model is not None:
        return load_model(
            start.model,
            auto,
            task=task,
            attention=attention,
            tokenizer=start.tokenizer,
            scheme=name,
            init=start.init or "preserve",
            placement=start.placement,
            options=options,
            seed=seed,
        )
    if start.tokenizer is not None:
        tokenizer = load_tokenizer(start.tokenizer)
    if tokenizer is None:
        raise ValueError("a new model needs a tokenizer: give --tokenizer, such as one of `resformer tokenizer`")
    assert start.depth is not None
    torch.manual_seed(seed)
    model = build_encoder(
        start.depth,
        start.width,
        name or "identity",
        family=start.family,
        heads=start.heads,
        ffn_ratio=start.ffn_ratio,
        match_parameters=start.match_parameters,
        tokenizer=tokenizer,
        max_length=length,
        dropout=start.dropout,
        num_labels=2 if task is None else _classes(task),
        weight_init=start.weight_init,
        init=start.init or "paper",
        placement=start.placement,
        auto=auto,
        attention=attention,
        **options,
    )
    if (wanted := getattr(model.config, "matched_parameters", None)) is not None:
        say(f"matched: {Match(model.config.hidden_size, layer_parameters(model), wanted)}")
    if name is None:
        unpatch(model)
    if task is not None:
        _name_labels(task, model.config)
    return model, tokenizer


def load_model(
    path: str,
    auto: Any,
    *,
    task: Task | None = None,
    attention: str | None = None,
    tokenizer: str | None = None,
    scheme: str | None = None,
    init: str = "preserve",
    placement: str | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of an Auto class, with its tokenizer; a head that the checkpoint has not is drawn from the seed.

    Each weight of the head is drawn by its name, as `build_encoder` does: whatever the body, and whatever else is new,
    equal seeds give equal heads.

    path     a folder or a hub id; of a patched checkpoint the scheme comes with it
    task     whose labels the model gives
    scheme   patched onto a checkpoint that is not patched, or with identity, which is the host; None: as it is

    Raises `ValueError` if the folder holds no model, or holds one with a scheme of its own while another is given.
    """
    if (Path(path) / "result.json").is_file() and (Path(path) / "model" / "config.json").is_file():
        raise ValueError(f"{path!r} is the folder of a run; its model is {str(Path(path) / 'model')!r}")
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"model {path!r} holds no config.json; give the folder of a transformers checkpoint")
    try:
        config = read_config(path)
    except OSError as error:
        here = "" if Path(path).exists() else "there is no such folder, and from the hub: "
        raise ValueError(f"cannot read model {path!r}: {here}{str(error).splitlines()[0]}") from error
    if task is not None:
        config.num_labels = _classes(task)
        _name_labels(task, config)
    patched = getattr(config, "resformer", None)
    bare = patched is not None and patched["scheme"] == "identity" and patched["placement"] == "native"
    if placement and not scheme:
        raise ValueError(f"placement {placement!r} is of a scheme; give the scheme as well")
    if patched and scheme and not bare:
        raise ValueError(f"model {path!r} is patched with {patched['scheme']!r} already; leave the scheme out")
    torch.manual_seed(seed)
    seed_of_names = fresh_seed()
    load: Any = partial(from_pretrained, auto=auto) if patched else auto.from_pretrained
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is drawn again
            model, info = load(
                path,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **({"attn_implementation": attention} if attention else {}),
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights of model {path!r}: {error}") from error
    _check_body(model, info, path)
    redraw(model, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])], seed_of_names)
    tokens = load_tokenizer(tokenizer or path, config)
    if tokens.pad_token is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokens.pad_token_id
    if scheme:
        if patched:
            unpatch(model)
        patch(model, scheme, init=init, placement=placement, **(options or {}))
    return model, tokens


def _check_body(model: PreTrainedModel, info: dict[str, Any], path: str) -> None:
    """A head may be new; the body is that of the checkpoint."""
    body = {f"{model.base_model_prefix}.{name}" for name, _ in model.base_model.named_parameters()}
    lacking = sorted(body & set(info["missing_keys"]))
    if len(lacking) > len(body) / 2:
        raise ValueError(
            f"the weights of model {path!r} are not those of its configuration, a {type(model).__name__}: of "
            f"{len(body)} they lack {len(lacking)}, such as {lacking[0]}; give a checkpoint whose names fit"
        )
    other = [(key, here, there) for key, here, there in info["mismatched_keys"] if key in body]
    if other:
        key, here, there = other[0]
        raise ValueError(
            f"the weights of model {path!r} do not fit its configuration: {key} has shape {tuple(here)}, and "
            f"{tuple(there)} is needed ({len(other)} such); correct config.json"
        )


def load_tokenizer(path: str, config: Any = None) -> PreTrainedTokenizerBase:
    """That of a folder or hub id, with a padding token: any will do, it is masked."""
    options = {} if config is None else {"config": config}  # else it asks about the checkpoint's own code
    if Path(path).is_dir() and not any(file for form in TOKENIZERS for file in Path(path).glob(form)):
        raise ValueError(
            f"{path!r} holds no tokenizer; save it there with tokenizer.save_pretrained"
        )  # T5's is made up
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} holds no tokenizer ({str(error).splitlines()[0]})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{path!r} holds no tokenizer; save it there with tokenizer.save_pretrained")
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:  # GPT-2 has none
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(path: str, task: Task, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_model` with a sequence classifier for the task."""
    return load_model(path, AutoModelForSequenceClassification, task=task, **options)


def _classes(task: Task) -> int:
    return len(task.labels or ("score",))


def _name_labels(task: Task, config: Any) -> None:
    if task.labels is not None:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: number for number, label in enumerate(task.labels)}


def _attention(length: int, precision: str) -> str | None:
    """On CPUs sdpa is slow in bf16; in fp32, and on other devices, the choice of transformers is the one to take."""
    return "eager" if precision == "bf16" and length <= SHORT and not torch.cuda.is_available() else None
