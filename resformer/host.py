"""A model seen through its family: found, checked and probed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resformer.errors import unknown
from resformer.hosts.family import Family, Site, Stack, families
from resformer.layer import Residual, find, settings_of
from resformer.swap import host_class


@dataclass(frozen=True)
class HostStack:
    """One stack of a model: its layers in the order in which they are called, a shared one once for each call."""

    spec: Stack
    root: nn.Module
    layers: Any  # the module list itself; shared layers in a list, as often as they are called
    config: Any

    @property
    def shared(self) -> bool:
        return len({id(layer) for layer in self.layers}) < len(self.layers)

    @property
    def decodes(self) -> bool:
        return self.spec.name == "decoder" or bool(getattr(self.config, "is_decoder", False))

    def sites(self, layer: nn.Module) -> list[Site]:
        """The sites that this layer has (cross-attention may be absent)."""
        return [site for site in self.spec.sites if not site.when or _has(layer, site.calls[0])]

    def residuals(self) -> dict[int, Residual]:
        """What patching hung on the layers, by number; on a shared layer, by call."""
        found = {}
        for number, layer in enumerate(self.layers):
            if (own := getattr(layer, "resformer", None)) is not None:  # or a wrapper of PEFT, which passes names on
                found[number] = getattr(own, str(number)) if own.by_call else own
        return found

    def fits(self, layer: nn.Module) -> bool:
        """Whether this is the very class that the family is about; a subclass may change the forward."""
        return class_name(host_class(layer)) == self.spec.layer


@dataclass(frozen=True)
class Host:
    """A model seen through its family."""

    model: Any
    base: nn.Module
    family: Family
    stacks: tuple[HostStack, ...]

    @property
    def layers(self) -> list[nn.Module]:
        """Of all stacks, the encoder's first."""
        return [layer for stack in self.stacks for layer in stack.layers]


def class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def find_host(model: nn.Module) -> Host:
    """The model with its family, or a ValueError that says why there is none."""
    _check_whole(model)
    base = model.base_model if isinstance(model, PreTrainedModel) else model
    reasons = []
    for family in families().values():
        stacks = tuple(stack for spec in family.stacks if (stack := _find_stack(model, base, spec)) is not None)
        if not stacks:
            continue
        wrong = {key: _value(model, key) for key, value in family.only.items() if _value(model, key) != value}
        if wrong:
            reasons.append(f"family {family.name!r} is for {dict(family.only)}, and here it is {wrong}")
            continue
        for stack in stacks:
            _check_paths(family, stack)
            _check_forwards(base, stack)
        if family.probe is None and not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"family {family.name!r} needs a `probe`, a function from the model to a tensor that it computes: "
                f"a {type(model).__name__} is no transformers model, and patching is checked by what it computes"
            )
        return Host(model, base, family, stacks)
    raise unknown(
        "family of model",
        type(model).__name__,
        families(),
        hint=" ".join([*reasons, _layers_found(model)]) + " Layers are matched by their exact class, since a subclass "
        "may compute something else; to add a family: resformer.register_family. For plain torch sublayers there is "
        "resformer.ResidualStack.",
    )


def _check_whole(model: Any) -> None:
    """A `ValueError` for what is no model, or one that is wrapped or quantized."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"resformer patches a model, a torch.nn.Module, got {type(model).__name__}")
    inside = {"DistributedDataParallel": "model.module", "DataParallel": "model.module", "OptimizedModule": "it"}
    inside |= {"FullyShardedDataParallel": "model.module"}
    wrapper = type(model).__name__
    if wrapper in inside or hasattr(model, "get_base_model") or hasattr(model, "_orig_mod"):
        patched = settings_of(model) is not None
        raise ValueError(
            f"this {wrapper} holds a {'patched ' if patched else ''}model; "
            + (
                "call it on the model inside (PEFT: model.get_base_model(), DDP, FSDP and DataParallel: model.module, "
                "torch.compile: model._orig_mod)"
                if patched
                else "patch the model itself before wrapping it (DDP, FSDP, torch.compile, PEFT)"
            )
        )
    if any(type(module).__name__.startswith("FSDP") for module in model.modules()) and settings_of(model) is None:
        raise ValueError(f"this {wrapper} is sharded (FSDP); patch the model before fully_shard or accelerator.prepare")
    if getattr(model, "is_quantized", False) or any(
        type(m).__module__.startswith(("torch.ao.", "bitsandbytes", "torchao.")) for m in model.modules()
    ):
        raise ValueError("resformer cannot patch a quantized model; patch the full-precision model instead")


def _find_stack(model: nn.Module, base: nn.Module, spec: Stack) -> HostStack | None:
    """The stack of a model that a family describes, or None where there is none of that class."""
    try:
        root = find(base, spec.root) if spec.root else base
        lists = _find_lists(root, spec.layers)
    except AttributeError:
        return None
    layers: Any = lists[0] if len(lists) == 1 else [layer for part in lists for layer in part]
    if not any(class_name(host_class(layer)) == spec.layer for layer in layers):
        return None
    config = getattr(root, "config", getattr(model, "config", None))
    if spec.order:
        layers = [layers[number] for number in spec.order(config)]
    if spec.final_norm and find(root, spec.final_norm) is None:  # left out by the configuration (OPT)
        spec = replace(spec, final_norm="")
    return HostStack(spec, root, layers, config)


def _find_lists(root: nn.Module, path: str) -> list[nn.ModuleList]:
    head, star, tail = path.partition(".*.")
    found = [find(member, tail) for member in find(root, head)] if star else [find(root, head)]
    if not all(isinstance(one, nn.ModuleList) for one in found):
        raise AttributeError(path)
    return found


def _layers_found(model: nn.Module) -> str:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for one in lists for layer in one if any(True for _ in layer.children())]
    names = {class_name(host_class(layer)) for layer in layers}
    likely = {name for name in names if name.endswith(("Layer", "Block"))} or names
    return f"Its layer classes: {', '.join(sorted(likely)) or 'none found'}."


def _value(model: nn.Module, key: str) -> Any:
    return getattr(getattr(model, "config", None), key, None)


def _has(module: nn.Module, path: str) -> bool:
    try:
        find(module, path)
    except AttributeError:
        return False
    return True


def _check_paths(family: Family, stack: HostStack) -> None:
    spec = stack.spec
    layer = next(layer for layer in stack.layers if stack.fits(layer))
    try:
        for path in filter(None, (spec.final_norm, spec.embed_norm, *spec.embeddings)):
            find(stack.root, path)
        for site in stack.sites(layer):
            for part in site.parts or (site,):
                for path in (*part.calls, part.ends or part.calls[0]):
                    find(layer, path)
            for path in (*site.norms.values(), *(p.path for p in site.points.values())):
                find(layer, path)
    except AttributeError as error:
        raise ValueError(f"family {family.name!r} does not fit {type(stack.root).__name__}: {error}") from None
    calls = [path for site in spec.sites for part in site.parts or (site,) for path in part.calls]
    paths = [*calls, *(path for site in spec.sites for path in site.norms.values())]
    for name, child in layer.named_children():
        known = any(path.split(".")[0] == name for path in paths) or name == "resformer"
        if not known and any(True for _ in child.parameters()):
            raise ValueError(
                f"family {family.name!r} does not fit {type(stack.root).__name__}: it says nothing of {name!r} in its "
                "layers; add a site for it"
            )


def _check_forwards(base: nn.Module, stack: HostStack) -> None:
    """A forward set on the object hides that of its class, and patching would change nothing."""
    ours = {id(module) for module in (base, stack.root, *stack.layers)}
    for name, module in base.named_modules():
        if "forward" in vars(module) and id(module) in ours:
            raise ValueError(
                f"{name or type(base).__name__!r} has a forward of its own (dispatched by accelerate, or wrapped by "
                "hand); patch the model first, then dispatch or wrap it"
            )


def probe(host: Host) -> Tensor:
    """What the model computes from a small fixed batch, in evaluation mode, without touching any random state."""
    with _evaluating(host.model), torch.no_grad():
        if host.family.probe is not None:
            return host.family.probe(host.model).clone()
        return _last_states(host).clone()


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
        states = torch.linspace(-1, 1, 6 * width, device=model.device, dtype=model.dtype).reshape(2, 3, width)
        given["encoder_hidden_states"] = states
    return host.base(**given, return_dict=True)[0]


def width_of(stack: HostStack, layer: nn.Module) -> int:
    """D: of the stream that this layer reads and adds to."""
    if (width := getattr(stack.config, "hidden_size", None)) is not None:
        return width
    for site in stack.spec.sites:
        for path in site.norms.values():
            for parameter in find(layer, path).parameters():
                return parameter.shape[0]
    raise ValueError(f"the configuration of this {type(stack.root).__name__} has no hidden_size, which resformer needs")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "chunk_size_feed_forward")]
    chunked = [(module, module.chunk_size_feed_forward) for module in modules]
    cached = [config for config in configs_of(model) if getattr(config, "use_cache", False)]
    model.eval()
    for module, _ in chunked:  # a chunk size need not divide the probe
        module.chunk_size_feed_forward = 0
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, size in chunked:
            module.chunk_size_feed_forward = size
        for config in cached:
            config.use_cache = True


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations of a model and of its parts, each once: the stacks of an encoder-decoder have their own."""
    found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return list(found.values())


def check_identity(host: Host, expected: Tensor) -> None:
    found = probe(host)
    if not torch.equal(found.nan_to_num(), expected.nan_to_num()):
        raise ValueError(
            f"family {host.family.name!r} does not describe this {type(host.base).__name__}: with the identity scheme "
            f"it computes something else (relative difference {difference(found, expected):.1e}). Its layers may have "
            "changed with the version of transformers; please report it, or register a family that fits"
        )


def difference(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
