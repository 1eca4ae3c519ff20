"""What a model computes from a small batch, to compare before and after."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resformer.host import Host, width_of

SEED = 0


def probe(host: Host, *, training: bool = False) -> Tensor:
    """What the model computes from a small fixed batch, in evaluation mode, without touching any random state; or in
    training mode, from equal random states each time, and leaving those and all buffers as they were."""
    with ExitStack() as around:
        around.enter_context(torch.no_grad())
        around.enter_context(in_mode(host.model, training))
        if training:
            around.enter_context(equal_seeds(host.model))
            around.enter_context(_buffers_kept(host.model))
        if host.family.probe is None:
            return _last_states(host).clone()
        found = host.family.probe(host.model)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the probe of family {host.family.name!r} must return a tensor that the model computes, got a "
            f"{type(found).__name__}"
        )
    return found.clone()


@contextmanager
def unlike(model: nn.Module) -> Iterator[None]:
    """Meanwhile no two of the model's vectors are equal, and no matrix is zero. In a fresh model all norms are equal,
    and a branch may begin as nothing: a spec that takes one for another would go unseen."""
    moved = [p for p in model.parameters() if p.is_floating_point() and (_is_vector(p) or _is_zero(p))]
    originals = [p.data for p in moved]
    for number, p in enumerate(moved):
        phase = torch.arange(p.numel(), device=p.device, dtype=torch.float32).reshape(p.shape) + number
        size = 0.1 if _is_vector(p) else p.shape[-1] ** -0.5
        p.data = (p.data + size * phase.cos()).to(p.dtype)
    try:
        yield
    finally:
        for p, original in zip(moved, originals, strict=True):
            p.data = original


@contextmanager
def hooked(layers: Iterable[Any], entering: Callable[..., None], leaving: Callable[..., None]) -> Iterator[None]:
    """Meanwhile `entering(layer, args, kwargs)` is called before and `leaving(layer, args, output)` after each call of
    these layers, once also of those that are there several times."""
    hooks: list[Any] = []
    for layer in {id(layer): layer for layer in layers}.values():
        hooks.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
        hooks.append(layer.register_forward_hook(leaving))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_vector(p: Tensor) -> bool:
    return p.numel() == max(p.shape, default=1)


def _is_zero(p: Tensor) -> bool:
    # of most matrices the first row tells; that of an embedding may be padding, which is zero
    return p.numel() > 0 and not p[0].any() and not p[-1].any() and not p.any()


def first_probe(host: Host) -> Tensor:
    """`probe` of a model as it is given; a ValueError where it cannot serve to compare with."""
    try:
        found = probe(host)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"this {type(host.model).__name__} could not be run on a small batch of token ids, which patching is "
            f"checked with ({type(error).__name__}: {error}); give family {host.family.name!r} a `probe` that can"
            if host.family.probe is None
            else f"the probe of family {host.family.name!r} failed on this {type(host.model).__name__} as it was given "
            f"({type(error).__name__}: {error})"
        ) from error
    if not found.isfinite().any():
        raise ValueError(f"this {type(host.model).__name__} computes no finite number, so nothing can be checked")
    if host.family.probe is not None and not torch.equal(probe(host).nan_to_num(), found.nan_to_num()):
        raise ValueError(
            f"the probe of family {host.family.name!r} gives something else each time; it must compute from a fixed "
            "input, such as torch.arange(16).reshape(2, 8)"
        )
    return found


def _last_states(host: Host) -> Tensor:
    model: Any = host.model
    config = model.config.get_text_config()
    length = max(1, min(8, getattr(config, "max_position_embeddings", 8) - 2))  # RoBERTa's positions start at 2
    ids = torch.arange(2 * length, device=model.device).reshape(2, length) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, length - length // 4 :] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if len(host.stacks) > 1:
        given["decoder_input_ids"] = ids.flip(0, 1)
    elif getattr(config, "add_cross_attention", False) and any(site.when for site in host.stacks[0].spec.sites):
        width = width_of(host.stacks[0], host.stacks[0].layers[0])
        states = torch.linspace(-1, 1, ids.numel() * width, device=model.device, dtype=model.dtype)
        given["encoder_hidden_states"] = states.reshape(2, length, width)  # MegatronBERT needs as many as tokens
    return host.base(**given, return_dict=True)[0]


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Meanwhile the model is in this mode, with neither a KV cache nor its feed-forwards in chunks."""
    every: list[Any] = list(model.modules())
    modes = [(module, module.training) for module in every]
    chunked = [(m, m.chunk_size_feed_forward) for m in every if hasattr(m, "chunk_size_feed_forward")]
    cached = [config for config in configs_of(every) if getattr(config, "use_cache", False)]
    model.train(training)
    for module, _ in chunked:  # a chunk size need not divide the probe
        module.chunk_size_feed_forward = 0
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for module, was in modes:
            module.training = was
        for module, size in chunked:
            module.chunk_size_feed_forward = size
        for config in cached:
            config.use_cache = True


@contextmanager
def equal_seeds(model: nn.Module) -> Iterator[None]:
    """Meanwhile random numbers are drawn from a fixed seed, on the CPU and where the model is."""
    used = model.parameters() if torch.cuda.is_initialized() else ()
    devices = sorted({p.device.index for p in used if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpointing without gradients
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed would touch all other devices
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(SEED)
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """As BatchNorm's, which move in training."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in kept:
            buffer.copy_(value)
            module._buffers[name] = buffer


def configs_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The configurations of a model and its parts, each once: the stacks of an encoder-decoder have their own."""
    found = {id(m.config): m.config for m in modules if isinstance(m, PreTrainedModel)}
    return list(found.values())


def difference(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
