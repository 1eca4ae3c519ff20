"""What a run starts from: a checkpoint, patched before or to be patched now, or fresh weights of a given size."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from resformer.checkpoint import from_pretrained, read_config
from resformer.data.tasks import Task
from resformer.encoders import build_encoder
from resformer.options import option
from resformer.patching import patch
from resformer.study.plan import parse_scheme

NEW = ("depth", "width", "match_parameters", "family", "heads", "ffn_ratio", "dropout", "weight_init")
SHORT = 256  # tokens, up to which eager attention with dropout is faster than sdpa on CPUs


@dataclass(frozen=True)
class Start:
    """A model as the command line names it: `model`, a checkpoint, or `depth` and a width, fresh weights."""

    model: str | None = option(None, "Folder or hub id of a transformers checkpoint, patched or not.")
    depth: int | None = option(None, "Layers of a new model, in place of --model.")
    width: int | None = option(None, "Of its stream.")
    match_parameters: str | None = option(None, "In place of the width: the parameters of DEPTHxWIDTH, or a number.")
    family: str = option("bert", "Of a new model; see `resformer hosts`.")
    heads: int | None = option(None, "Of a new model. [default: one for each 64 channels]")
    ffn_ratio: float = option(4.0, "Inner width of a new model's feed-forward over its width.")
    dropout: float = option(0.1, "Of a new model.")
    weight_init: str = option("bert", "Of a new model: bert, xavier or width_scaled.")
    tokenizer: str | None = option(None, "Folder or hub id. [default: that of the model]")
    attention: str | None = option(None, "eager or sdpa. [default: on CPUs eager for inputs up to 256 tokens]")
    scheme: str | None = option(None, "NAME or NAME:OPTION=VALUE,... [default: the model as it is]")
    scheme_options: str | None = option(None, "JSON, in place of :OPTION=VALUE.")
    init: str | None = option(None, "preserve or paper. [default: preserve with --model, paper for a new one]")
    placement: str | None = option(None, "Of the norms: native, pre, post, sandwich, none.")

    def __post_init__(self) -> None:
        """Raises `ValueError` for what says both, or neither, of where the model comes from."""
        if self.model is None and self.depth is None:
            raise ValueError("give --model, a checkpoint, or --depth and --width of a new model")
        if self.model is not None and self.depth is not None:
            raise ValueError(f"--model {self.model} and --depth {self.depth} are both given; a run has one model")
        if self.model is not None and (self.width is not None or self.match_parameters is not None):
            raise ValueError("--width and --match-parameters are of a new model; leave them out, or leave --model out")
        if self.placement and not self.scheme:
            raise ValueError(f"placement {self.placement!r} is of a scheme; give the scheme as well")

    @property
    def patching(self) -> tuple[str | None, dict[str, Any]]:
        """The scheme and its options."""
        name, options = parse_scheme(self.scheme) if self.scheme else (None, {})
        if self.scheme_options is None:
            return name, options
        if options or name is None:
            raise ValueError("--scheme-options goes with --scheme NAME, without options behind the name")
        try:
            options = json.loads(self.scheme_options)
        except ValueError as error:
            raise ValueError(f"--scheme-options is no JSON ({error}), got {self.scheme_options!r}") from None
        if not isinstance(options, dict):
            raise ValueError(f'--scheme-options must be an object such as {{"bias": 0}}, got {self.scheme_options!r}')
        return name, options

    def described(self) -> dict[str, Any]:
        """What of it the outcome of a run depends on."""
        left_out = NEW if self.model else ()
        return {name: value for name, value in asdict(self).items() if value is not None and name not in left_out}

    def make(
        self,
        auto: Any,
        *,
        seed: int,
        length: int,
        task: Task | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, of an Auto class, and its tokenizer; what is new is drawn from the seed.

        length     tokens of the longest input
        task       whose labels the model gives
        tokenizer  of a new model for which none is named
        """
        name, options = self.patching
        if self.model is not None:
            return load_model(
                self.model,
                auto,
                task=task,
                attention=self.attention or _attention(length),
                tokenizer=self.tokenizer,
                scheme=name,
                init=self.init or "preserve",
                placement=self.placement,
                options=options,
                seed=seed,
            )
        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer)
        if tokenizer is None:
            raise ValueError("a new model needs a tokenizer: give --tokenizer, such as one of `resformer tokenizer`")
        torch.manual_seed(seed)
        model = build_encoder(
            self.depth,
            self.width,
            name or "identity",
            family=self.family,
            heads=self.heads,
            ffn_ratio=self.ffn_ratio,
            match_parameters=self.match_parameters,
            tokenizer=tokenizer,
            max_length=length,
            dropout=self.dropout,
            weight_init=self.weight_init,
            init=self.init or "paper",
            placement=self.placement,
            auto=auto,
            num_labels=2 if task is None else _classes(task),
            attention=self.attention or _attention(length),
            **options,
        )
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

    path     a folder or a hub id; of a patched checkpoint the scheme comes with it
    task     whose labels the model gives
    scheme   patched onto an unpatched checkpoint; None: the host as it is

    Raises `ValueError` if the folder holds no model, or holds a patched one while a scheme is given.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"model {path!r} holds no config.json; give the folder of a transformers checkpoint")
    try:
        config = read_config(path)
    except OSError as error:
        raise ValueError(f"cannot read model {path!r}: {str(error).splitlines()[0]}") from error
    if task is not None:
        config.num_labels = _classes(task)
        _name_labels(task, config)
    patched = getattr(config, "resformer", None)
    if placement and not scheme:
        raise ValueError(f"placement {placement!r} is of a scheme; give the scheme as well")
    if patched and scheme:
        raise ValueError(f"model {path!r} is patched with {patched['scheme']!r} already; leave the scheme out")
    torch.manual_seed(seed)
    load = partial(from_pretrained, auto=auto) if patched else auto.from_pretrained
    try:
        model = load(
            path,
            config=config,
            ignore_mismatched_sizes=True,
            **({"attn_implementation": attention} if attention else {}),
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the weights of model {path!r}: {error}") from error
    tokens = load_tokenizer(tokenizer or path, config)
    if tokens.pad_token is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokens.pad_token_id
    if scheme:
        patch(model, scheme, init=init, placement=placement, **(options or {}))
    return model, tokens


def load_tokenizer(path: str, config: Any = None) -> PreTrainedTokenizerBase:
    """That of a folder or hub id, with a padding token: any will do, it is masked."""
    options = {} if config is None else {"config": config}  # else it asks about the checkpoint's own code
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


def _attention(length: int) -> str | None:
    """With dropout, sdpa falls to a slow path on CPUs; without it, or on other devices, it is the one to take."""
    return "eager" if length <= SHORT and not torch.cuda.is_available() else None
