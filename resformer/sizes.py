"""From a few numbers to the configuration of a family, and the width at which a depth has so many parameters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from resformer.errors import unknown
from resformer.host import find_host
from resformer.hosts import Family, families

INNER = ("intermediate_size", "hidden_dim", "n_inner", "ffn_dim")  # what families call the width of the feed-forward
HEAD_SIZE = 64  # channels a head, where nothing else is said


@dataclass(frozen=True)
class Match:
    """A width, and how near its parameters come to those wanted."""

    width: int
    parameters: int  # of all layers: without embeddings, what stands between or after layers, and heads
    wanted: int

    @property
    def relative(self) -> float:
        """The difference from what was wanted, as a share of it."""
        return self.parameters / self.wanted - 1

    def __str__(self) -> str:
        return f"width {self.width}: {self.parameters:,} in the layers, {self.relative:+.2%} of {self.wanted:,}"


def matched_width(
    depth: int,
    parameters: int | str,
    *,
    family: str = "bert",
    heads: int | None = None,
    ffn_ratio: float = 4.0,
) -> Match:
    """The width at which `depth` layers of a family have most nearly so many parameters.

    Args:
        parameters: a number, or "24x128": those of 24 layers of width 128 of this family and `ffn_ratio`.
        heads: of attention, to have a width that they divide; without them it is a multiple of the head size, 64.

    Counted are the parameters of the layers, on models without weights; of shared layers (ALBERT) once. Embeddings and
    heads are not: they depend on the vocabulary and the task.
    Raises a ValueError for numbers below 1, and for what `encoder_config` refuses.
    """
    check_whole(depth=depth, **({} if heads is None else {"heads": heads}))
    step = HEAD_SIZE if heads is None else heads * _turned(_config_class(family)())

    def count(depth: int, width: int) -> int:
        return layer_parameters(outline(encoder_config(family, depth, width, heads=1, ffn_ratio=ffn_ratio)))

    if isinstance(parameters, str):
        found = re.fullmatch(r"(\d+)x(\d+)", parameters)
        if not found:
            raise ValueError(f"match_parameters must be a number or DEPTHxWIDTH, such as '24x128', got {parameters!r}")
        wanted = count(*map(int, found.groups()))
    else:
        check_whole(match_parameters=parameters)
        wanted = parameters
    counts: dict[int, int] = {}  # by width in steps
    n = 1
    while n not in counts:  # parameters grow with the square of the width, nearly
        counts[n] = count(depth, n * step)
        n = max(1, round(n * math.sqrt(wanted / counts[n])))
    counts |= {near: count(depth, near * step) for near in (n - 1, n + 1) if near and near not in counts}
    nearest = min(counts, key=lambda n: abs(counts[n] - wanted))
    return Match(nearest * step, counts[nearest], wanted)


def encoder_config(
    family: str,
    depth: int,
    width: int,
    *,
    heads: int | None = None,
    ffn_ratio: float = 4.0,
    vocab_size: int | None = None,
    max_length: int = 512,
    dropout: float = 0.1,
    num_labels: int = 2,
    std: float = 0.02,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PretrainedConfig:
    """The configuration of a family at these sizes, with all else as its class has it.

    Every head has keys and values of its own, embeddings are as wide as the stream, and `dropout` is that of every
    place where the family has one. Special tokens are the tokenizer's; without one the family's own, as far as they are
    in the vocabulary. See `build_encoder` for the rest and for what is refused.
    """
    make = _config_class(family)
    heads = max(1, width // HEAD_SIZE) if heads is None and isinstance(width, int) else heads
    vocab_size = _vocabulary(vocab_size, tokenizer)
    check_whole(depth=depth, width=width, heads=heads, vocab_size=vocab_size, max_length=max_length)
    check_whole(num_labels=num_labels)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number of at least 0 and below 1, got {dropout!r}")
    if width % heads:
        divisors = [h for h in range(1, width + 1) if width % h == 0]
        raise ValueError(f"heads must divide the width {width}, got {heads}; allowed are {divisors}")
    known = make()
    if (width // heads) % (unit := _turned(known)):
        raise ValueError(
            f"family {family!r} turns pairs of channels by their position, so a head must have a multiple of {unit} of "
            f"them, got {width // heads} (width {width} / heads {heads}); choose other heads, or a width that is a "
            f"multiple of {heads * unit}"
        )
    inner = next((name for name in INNER if hasattr(known, name)), None)
    if inner is None:
        raise ValueError(f"{make.__name__} of family {family!r} has none of {', '.join(INNER)}; {_by_hand(family)}")
    own = {
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "query_pre_attn_scalar": width // heads,  # Gemma scales by it in place of the head size
        "rotary_dim": min(getattr(known, "rotary_dim", None) or 0, width // heads),
        "embedding_size": width,
        "max_position_embeddings": max_length,
        "initializer_range": std,
        "init_std": std,
        **_special_tokens(known, vocab_size, tokenizer),
    }
    config = make(
        num_hidden_layers=depth,
        hidden_size=width,
        num_attention_heads=heads,
        vocab_size=vocab_size,
        num_labels=num_labels,
        **{inner: inner_width(width, ffn_ratio)},
        **{name: value for name, value in own.items() if hasattr(known, name)},
        **families()[family].only,
    )
    for name, value in config.to_dict().items():
        is_rate = "drop" in name and isinstance(value, int | float) and not isinstance(value, bool)
        if is_rate and "layerdrop" not in name:  # which leaves out whole layers
            setattr(config, name, dropout)
    config.max_position_embeddings += _first_position(outline(config))
    return config


def inner_width(width: int, ffn_ratio: float) -> int:
    """The width inside the feed-forward: `ffn_ratio` times that of the stream, to the nearest whole number."""
    if isinstance(ffn_ratio, bool) or not isinstance(ffn_ratio, int | float) or not 0 < ffn_ratio < float("inf"):
        raise ValueError(f"ffn_ratio must be a number above 0, got {ffn_ratio!r}")
    return max(1, round(ffn_ratio * width))


def longest_input(model: PreTrainedModel) -> int | None:
    """The tokens of the longest input that a model takes, or None where its configuration sets no limit.

    RoBERTa and its kin count positions from that of the padding token, so it is less than `max_position_embeddings`.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None else positions - _first_position(model)


def layer_parameters(model: PreTrainedModel) -> int:
    """The host's own parameters in all layers, shared ones once."""
    named = {p: name for layer in find_host(model).layers for name, p in layer.named_parameters()}
    return sum(p.numel() for p, name in named.items() if "resformer" not in name.split("."))


def check_whole(**values: Any) -> None:
    """Every value is a whole number of at least 1, else a ValueError says which is not."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _config_class(family: str) -> Any:
    known = families()
    single = {name: spec for name, spec in known.items() if len(spec.stacks) == 1 and spec.config}
    if family not in known:
        raise unknown("family", family, single)
    spec: Family = known[family]
    if len(spec.stacks) > 1:
        raise ValueError(
            f"family {family!r} is an encoder-decoder, and models are built here of one stack: {', '.join(single)}. "
            f"{_by_hand(family)}"
        )
    if not spec.config:
        raise ValueError(f"family {family!r} names no configuration of transformers; {_by_hand(family)}")
    return getattr(transformers, spec.config)


def _turned(known: PretrainedConfig) -> int:
    """What the head size must be a multiple of: with rotary positions 2, or more if only a part of each head turns."""
    rope: Any = getattr(known, "rope_parameters", None)
    if rope is None and not hasattr(known, "rotary_value") and not hasattr(known, "rotary_dim"):  # RoFormer, GPT-J
        return 1
    return round(2 / (rope or {}).get("partial_rotary_factor", 1))


def _by_hand(family: str) -> str:
    return (
        f"To have a model of {family!r}, make it with its own classes and give it to resformer.patch(..., init='paper')"
    )


def _vocabulary(vocab_size: int | None, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        return 30522 if vocab_size is None else vocab_size  # BERT's own
    if vocab_size is not None and isinstance(vocab_size, int) and vocab_size < len(tokenizer):
        raise ValueError(f"vocab_size is {vocab_size}, and the tokenizer has {len(tokenizer)} tokens; leave it out")
    return len(tokenizer) if vocab_size is None else vocab_size


def _special_tokens(known: Any, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int | None]:
    names = [name for name in known.to_dict() if name.endswith("token_id")]
    if tokenizer is None:
        ids = {name: getattr(known, name) for name in names}
        return {
            name: number if isinstance(number, int) and number < vocab_size else None for name, number in ids.items()
        }
    if known.pad_token_id is not None and tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer has no padding token, which {type(known).__name__} wants; set tokenizer.pad_token"
        )
    return {name: getattr(tokenizer, name, None) for name in names}


def outline(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration without its head and weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return AutoModel.from_config(config)


def _first_position(model: PreTrainedModel) -> int:
    """How many rows of the table of positions no token of a text uses: those up to the padding's, where it has one."""
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    own = (t.padding_idx for t in tables if t is not model.get_input_embeddings() and t.padding_idx is not None)
    return next(own, -1) + 1
