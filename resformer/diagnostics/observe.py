"""What a measurement sees of a model: each residual connection in turn, and the model left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resformer.errors import unknown
from resformer.host import Host, HostStack
from resformer.probing import configs_of, equal_seeds, in_mode
from resformer.schemes.base import Branch, Norm, Stream
from resformer.sites import Connection, Step, after_layers, carried, connections, intercepted, readable, within_reach

Batch = Mapping[str, Any]
FORMS = {"input_ids": (2, "(texts, tokens)"), "inputs_embeds": (3, "(texts, tokens, width)")}
MASKS = {"attention_mask": ("input_ids", "inputs_embeds"), "token_type_ids": ("input_ids", "inputs_embeds")}
TARGETS = ("labels", "start_positions", "end_positions", "next_sentence_label", "label")


class NotFiniteError(ValueError):
    """A model computes NaN or infinity; `where` is the first place."""

    def __init__(self, what: str, where: str):
        super().__init__(
            f"NaN or infinity in activations, first in {what} at {where}: the model has diverged, or its precision is "
            "too low for it; look at an earlier checkpoint, or load it with dtype=torch.float32"
        )
        self.where = where


@dataclass(frozen=True)
class Seen:
    """One residual connection in a forward pass. All tensors are those that the model computed with."""

    at: Connection
    before: tuple[Tensor, ...]  # all that was carried to it
    read: Tensor  # (B T D), what the branch read, before its norm; of solvers, at the first of their calls
    wrote: Tensor  # (B T D), what the branch gave
    after: tuple[Tensor, ...]  # all that it carries on
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # slot -> what that norm read and gave


@contextmanager
def observed(model: nn.Module, batch: Batch, *, gradients: bool = False) -> Iterator[Host]:
    """Meanwhile the model can be looked at: in evaluation mode, without a KV cache, each connection within reach.

    gradients: have all parameters require theirs, since a frozen embedding would cut the graph; else none is computed.

    Afterwards its weights, mode, hooks, `requires_grad` and the random states are what they were. Raises a ValueError
    for a batch that the model cannot take, weights made under torch.inference_mode, and as `within_reach` does.
    """
    check_batch(model, batch)
    required = [(p, p.requires_grad) for p in model.parameters()]
    with ExitStack() as around:
        around.enter_context(torch.inference_mode(False))  # in which nothing would have a gradient
        around.enter_context(_configs_kept(model))
        host = around.enter_context(within_reach(model))
        around.enter_context(in_mode(model, False))
        around.enter_context(equal_seeds(model))
        around.enter_context(torch.set_grad_enabled(gradients))
        try:
            for p, _ in required if gradients else ():
                p.requires_grad_(p.is_floating_point())
            yield host
        finally:
            for p, flag in required:
                p.requires_grad_(flag)


@contextmanager
def _configs_kept(model: nn.Module) -> Iterator[None]:
    """Of transformers' classifiers the first loss writes down what kind of problem it saw."""
    kept = [(config, dict(vars(config))) for config in configs_of(model.modules())]
    try:
        yield
    finally:
        for config, content in kept:
            vars(config).clear()
            vars(config).update(content)


def check_batch(model: nn.Module, batch: Any) -> None:
    """A `ValueError` for what is no batch of this model, and a model that can have no gradients."""
    if any(p.is_inference() for p in model.parameters()):
        raise ValueError(
            f"the weights of this {type(model).__name__} were made under torch.inference_mode, so that they have no "
            "gradients; build or load it outside of it"
        )
    if not isinstance(batch, Mapping) or not batch:
        raise ValueError(f"a batch maps the names of the model's arguments to tensors, got {batch!r:.60}")
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for name in batch:
        if name not in names:
            raise unknown("key", name, names, of=f"the batch, for a {type(model).__name__}")
    for name, value in batch.items():
        _check_value(name, value)
    if any(isinstance(value, Tensor) and value.ndim and not len(value) for value in batch.values()):
        raise ValueError("the batch is empty; give at least one text")
    _check_shapes(batch)


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, (list, tuple, np.ndarray)):
        raise ValueError(
            f"{name!r} of the batch is a {type(value).__name__}; give a tensor, which tokenizers make with "
            'padding=True and return_tensors="pt"'
        )
    if isinstance(value, Tensor) and value.is_inference():
        raise ValueError(
            f"{name!r} of the batch was made under torch.inference_mode, and no gradient can pass what was; make the "
            "batch outside of it, or under torch.no_grad"
        )


def _check_shapes(batch: Batch) -> None:
    """A `ValueError` where what a model is given of each text or token is not of the same texts and tokens."""
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
    for name, (axes, form) in FORMS.items():
        if name in shapes and len(shapes[name]) < axes:
            raise ValueError(f"{name!r} of the batch must be of {form}, got {shapes[name]}; one text is a batch of 1")
    first = next((name for name in FORMS if name in shapes), None)
    if first is None:
        return
    for name in (*FORMS, *MASKS, *TARGETS):
        if name in shapes and shapes[name][:1] != shapes[first][:1]:
            raise ValueError(
                f"{first!r} of the batch is of {shapes[first][0]} texts, {name!r} has the shape {shapes[name]}; both "
                "need the same texts in their first dimension"
            )
    attention = batch.get("attention_mask")
    if isinstance(attention, Tensor) and attention.ndim == 2 and not bool(attention.any(1).all()):
        text = int((~attention.any(1)).nonzero()[0])
        raise ValueError(f"'attention_mask' of the batch hides all tokens of text {text}; leave that text out")
    for mask, of in MASKS.items():
        tokens = next((shapes[name][:2] for name in of if name in shapes), None)
        if tokens and len(shapes.get(mask, ())) == 2 and shapes[mask] != tokens:
            raise ValueError(
                f"{mask!r} of the batch must be of the {tokens[0]} texts and {tokens[1]} tokens that it masks, got "
                f"{shapes[mask]}"
            )


def check_depth(host: Host, what: str) -> None:
    """A `ValueError` unless some stack has two layers, which anything about depth needs."""
    if all(len(stack.layers) < 2 for stack in host.stacks):
        raise ValueError(f"{what} is about depth and needs at least two layers; this {type(host.model).__name__} has 1")


def check_loss(model: nn.Module, batch: Batch) -> None:
    """A `ValueError` where it can be told without a forward pass that there will be no loss."""
    names = set(inspect.signature(model.forward).parameters) & set(TARGETS)
    if not names:
        raise ValueError(
            f"a {type(model).__name__} has no loss; load it with a head, such as AutoModelForMaskedLM, "
            "AutoModelForCausalLM or AutoModelForSequenceClassification; the forward of a model of your own takes "
            "labels and returns something with a .loss"
        )
    if not names & set(batch):
        raise ValueError(f"the batch has no {' or '.join(repr(n) for n in sorted(names))}, so there is no loss")


def loss_of(model: nn.Module, batch: Batch, *, finite: bool = True) -> Tensor:
    """The loss of a batch; a `ValueError` if there is none, and unless it may be, where it is NaN or infinite."""
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"this {type(model).__name__} gives no loss for a batch with {', '.join(batch)}")
    if finite and not bool(loss.isfinite()):
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.ndim > 1:
            labels = labels[:, 1:]  # a causal model has nothing that predicts the first
        if isinstance(labels, Tensor) and not labels.is_floating_point() and bool((labels == -100).all()):
            raise ValueError(
                f"the loss is {float(loss)}, since the labels leave nothing to predict: they are -100 throughout; give "
                "some tokens their own number as a label, or more or longer texts"
            )
        raise ValueError(
            f"the loss is {float(loss)} though all states of the layers are finite; look at the labels and the head, "
            "or load the model with dtype=torch.float32"
        )
    return loss


def text(host: Host, stack: HostStack, batch: Batch, states: Tensor) -> Tensor | None:
    """(B T), True where these states of a stack are of text and not of padding; None if all are."""
    mask = batch.get("attention_mask")
    if stack.spec.name == "decoder" and len(host.stacks) > 1:
        labels, mask = batch.get("labels"), batch.get("decoder_attention_mask")
        if mask is None and isinstance(labels, Tensor) and labels.ndim == 2:
            mask = labels != -100
    if not isinstance(mask, Tensor) or mask.ndim != 2 or states.ndim != 3:
        return None
    mask = mask.to(states.device) > 0
    if len(mask) != len(states) or mask.shape[1] > states.shape[1]:
        return None
    if mask.shape[1] < states.shape[1]:  # filled up to a window (Longformer)
        mask = nn.functional.pad(mask, (0, states.shape[1] - mask.shape[1]))
    return None if mask.all() else mask


def rows_of(states: Tensor, mask: Tensor | None) -> Tensor:
    """(... D) -> (N D), of the tokens that are text."""
    return states.flatten(0, -2) if mask is None else states[mask]


def sampled(states: Tensor, mask: Tensor | None, most: int) -> Tensor:
    """(... D) -> (n D), of at most so many tokens, evenly spaced over those that are text."""
    x = rows_of(states, mask)
    return x[torch.linspace(0, len(x) - 1, min(most, len(x)), device=x.device).round().long()]


def wide(x: Tensor) -> Tensor:
    """In double precision, where squares of small gradients are not lost; in single where a device has no other."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)


def norm_of(x: Tensor) -> Tensor:
    """The Euclidean norm of all numbers, summed as `wide` but without its copy."""
    return torch.linalg.vector_norm(x.detach(), dtype=torch.float32 if x.device.type == "mps" else torch.float64)


def normal(like: Tensor, generator: torch.Generator, mask: Tensor | None) -> Tensor:
    """Independent normal numbers of the shape of `like`, 0 at tokens (B T) that are no text; the same on any device."""
    return masked(torch.randn(like.shape, generator=generator).to(like), mask)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """The same with 0 at tokens (B T) that are no text, for tensors that begin with (B T)."""
    if mask is None or x.shape[:2] != mask.shape:
        return x
    return x * mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)).to(x.dtype)


@contextmanager
def watching(
    host: Host,
    see: Callable[[Seen], None] | None = None,
    left: Callable[[HostStack, int, Tensor], None] | None = None,
    *,
    norms: bool = False,
) -> Iterator[None]:
    """Meanwhile `see` is called with each connection when it has run, and `left(stack, layer, state)` with the
    readable state (B T D) after each layer, or neither. Nothing is kept, so that memory stays near that of one forward.

    norms: also show what the norms of each connection read and gave.

    Raises `NotFiniteError` at the first NaN.
    """
    now: list[tuple[Connection, dict[str, tuple[Tensor, Tensor]]]] = []

    def around(at: Connection, step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
        calls: list[tuple[Tensor, Tensor]] = []
        now.append((at, {}))
        if at.index == 0:
            for tensor in carried(s):
                _check_finite(tensor, f"what enters the {at.name}", at)

        def watched(x: Tensor, *rest: Any) -> Tensor:
            y = branch(x, *rest)
            if not calls:  # solvers call it again
                _check_finite(y, "what the branch gives", at)
                calls.append((x, y))
            return y

        out = step(s, replace(branch, function=watched), norm)
        _, normed = now.pop()
        for tensor in carried(out):
            if all(tensor is not old for old in carried(s)):
                _check_finite(tensor, "what is carried on", at)
        if see is not None:
            read, wrote = calls[0]
            see(Seen(at, carried(s), read, wrote, carried(out), normed))
        return out

    def normed(module: Any, args: Any, output: Any) -> None:
        for slot, norm in now[-1][0].norms.items() if now else ():
            if norm is module:
                now[-1][1].setdefault(slot, (args[0], output))

    def done(stack: HostStack, layer: int, output: Any) -> None:
        if left is not None:
            left(stack, layer, readable(output))

    hooks = []
    try:
        with intercepted(host, around), after_layers(host, done):
            seen = {id(module): module for at in connections(host) for module in at.norms.values()} if norms else {}
            hooks = [module.register_forward_hook(normed) for module in seen.values()]
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_finite(x: Tensor, what: str, at: Connection) -> None:
    if not x.isfinite().all():
        raise NotFiniteError(what, str(at))
