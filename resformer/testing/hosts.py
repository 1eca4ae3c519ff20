"""Tiny random hosts of every family, with weights that make every branch, bias and norm matter."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import resformer
from resformer.hosts.tiny import FFN, HEADS, SIZES, TOKENS, VOCAB, WIDTH, tiny_config  # noqa: F401  (for tests)
from resformer.plan import attends
from resformer.schemes import Place, Scheme


def head_for(family: str) -> Any:
    """An auto class that gives this family a head: a classifier, or a language model where transformers has none, and
    for encoder-decoders."""
    if len(resformer.families()[family].stacks) > 1:
        return AutoModelForSeq2SeqLM
    classifies = type(tiny_config(family)) in AutoModelForSequenceClassification._model_mapping
    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def attentions(family: str) -> list[str]:
    """The implementations of attention that run on any machine and that transformers has for this family."""
    model: Any = AutoModel._model_mapping[type(tiny_config(family))]
    return ["eager", "sdpa"] if model._supports_sdpa else ["eager"]


@cache
def _drawn(
    family: str, auto: Any, layers: int, std: float, seed: int, dropout: float, attention: str, changes: tuple
) -> PreTrainedModel:
    config = tiny_config(family, layers=layers, dropout=dropout, **dict(changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attention)
    perturb(model, std, seed)
    return model.double().eval()


def tiny_host(
    family: str,
    auto: Any = AutoModel,
    *,
    layers: int = 2,
    std: float = 0.2,
    seed: int = 0,
    dropout: float = 0.0,
    attention: str = "eager",
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> PreTrainedModel:
    """A fresh small model of a family, in evaluation mode; equal arguments give equal weights."""
    made = _drawn(family, auto, layers, std, seed, dropout, attention, tuple(sorted(changes.items())))
    host: Any = copy.deepcopy(made)
    return host.to(dtype)


@torch.no_grad()
def perturb(model: nn.Module, std: float, seed: int) -> None:
    """Draw all weights anew: norms around 1, biases off 0, matrices that keep the scale, embeddings of this std.

    Tables that are computed and not trained (RoFormer's sines) stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.requires_grad:
                continue
            noise = torch.randn(p.shape, generator=generator)
            if isinstance(module, nn.Embedding):
                p.copy_(std * noise)
            elif p.ndim >= 2:
                p.copy_(noise / p.shape[-1] ** 0.5)
            else:
                p.copy_((1.0 if "Norm" in type(module).__name__ and name == "weight" else 0.0) + 0.3 * noise)


def batch(*, padded: bool = False, seed: int = 0, labels: bool = False, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Two texts; padded: the second ends early; labels: a class for each text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, tokens), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        given["input_ids"][1, -2:] = 0  # no more than half of ModernBERT's window, or its attention is of nothing
        given["attention_mask"][1, -2:] = 0
    if labels:
        given["labels"] = torch.tensor([0, 1])
    return given


def checkpoint(model: Any, kwargs: dict[str, Any] | None = None) -> None:
    """Have the model compute its layers again in the backward pass; the method had another name in older versions."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)


def batch_for(family: str, *, padded: bool = False, seed: int = 0, labels: bool = False) -> dict[str, Tensor]:
    """`batch`; for an encoder-decoder with shorter targets, as input of the decoder or as labels."""
    given = batch(padded=padded, seed=seed, labels=labels)
    if len(resformer.families()[family].stacks) == 1:
        return given
    target = batch(padded=padded, seed=seed + 1, tokens=TOKENS - 2)
    ids, mask = target["input_ids"], target["attention_mask"]
    own = {"labels": ids.masked_fill(mask == 0, -100)} if labels else {"decoder_input_ids": ids}
    return given | own | ({} if labels else {"decoder_attention_mask": mask})


def randomize(module: nn.Module, seed: int = 1, scale: float = 0.5) -> None:
    """Trained-like parameters for every scheme (and norm made for one) in a module: none stays at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "resformer" in name:
                p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
        for name, buffer in module.named_buffers():
            if "resformer" in name:  # schedules on their way
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


class exact(TorchFunctionMode):
    """Within it, what hosts in double precision compute in single (RMS norms, angles, softmax) is in double as well."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {name: _doubled(value) if name == "dtype" else value for name, value in (kwargs or {}).items()}
        if function is Tensor.float:
            function = Tensor.double
        elif function is Tensor.to:
            args = tuple(_doubled(value) for value in args)
        return function(*args, **given)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def stands(name: str, family: str, init: str = "paper") -> bool:
    """Whether a scheme with its default options can stand in hosts of this family.

    It serves their stacks, can be given the values of attention if it asks, finds the points where it acts, and where
    layers are shared it needs none of their weights and no say inside them.
    """
    cls, stacks = resformer.schemes()[name], resformer.families()[family].stacks
    valued = all(any(attends(part) for site in s.sites for part in site.parts or (site,)) for s in stacks)
    inside = set(cls.points) - {"in", "values"}
    named = {point for stack in stacks for site in stack.sites for point in site.points}
    if inside - named or ("values" in cls.points and not valued):
        return False
    if any(stack.order for stack in stacks) and (inside or example(name, {}, init).edits()):
        return False
    return all(stack.name in cls.stacks for stack in stacks)


def keeps(name: str, options: dict[str, Any], family: str) -> bool:
    """Whether a scheme can start as the hosts of this family: it preserves their kind and fixes no norm elsewhere."""
    scheme, spec = example(name, options), resformer.families()[family]
    slots = [{slot.partition("_")[0] for slot in site.norms} for stack in spec.stacks for site in stack.sites]
    norms = scheme.norms is None or all(scheme.norms() - {"embed", "final"} == here for here in slots)
    return stands(name, family, "preserve") and scheme.can_preserve(spec.kind) and norms


def example(name: str, options: dict[str, Any], init: str = "paper") -> Scheme:
    """A scheme with these options, to ask what it declares."""
    widths = dict.fromkeys(("q", "k", "v", "o", "up", "down"), 8)
    place = Place("attn", index=0, sites=2, layer=0, layers=1, width=8, widths=widths, last=False, closes=False)
    return resformer.schemes()[name](place, init=init, **options)


def can_preserve(name: str, options: dict[str, Any], kind: str) -> bool:
    """Whether a scheme with these options says that it keeps hosts of this kind."""
    return example(name, options).can_preserve(kind)
