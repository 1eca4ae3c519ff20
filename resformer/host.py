"""A model seen through its family: found, checked and probed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resformer.hosts.family import Family, Site, Stack, class_name, families
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
        """Whether this is the very class that the family is about."""
        return self.spec.is_of(host_class(layer))

    @property
    def fitting(self) -> list[int]:
        """The numbers of the layers that fit; in a hybrid there are others between them."""
        return [number for number, layer in enumerate(self.layers) if self.fits(layer)]


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
            if not stack.residuals():  # accelerate gives a patched model a forward of its own for mixed precision
                _check_forwards(model, base, stack)
        if family.probe is None and not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"family {family.name!r} needs a `probe`, a function from the model to a tensor that it computes: "
                f"a {type(model).__name__} is no transformers model, and patching is checked by what it computes"
            )
        return Host(model, base, family, stacks)
    near = get_close_matches(str(_value(model, "model_type")), families(), n=2, cutoff=0.5)
    guess = f"The nearest by name: {', '.join(near)}." if near else ""
    raise ValueError(
        f"no family describes this {type(model).__name__}; `resformer hosts` lists {len(families())}. "
        + " ".join(filter(None, [guess, *reasons, _layers_found(model)]))
        + " Layers are matched by their exact class, since a subclass may compute something else; to add a family: "
        "resformer.register_family. For plain torch sublayers there is resformer.ResidualStack."
    )


def _check_whole(model: Any) -> None:
    """A `ValueError` for what is no model, or one that is wrapped or quantized."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"resformer patches a model, a torch.nn.Module, got {type(model).__name__}")
    wrappers = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
    wrapper = type(model).__name__
    tuner = hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel)
    if wrapper in wrappers or tuner or hasattr(model, "get_base_model") or hasattr(model, "_orig_mod"):
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
    if sharded(model) and settings_of(model) is None:
        raise ValueError(f"this {wrapper} is sharded (FSDP); patch the model before fully_shard or accelerator.prepare")
    if found := _quantized(model):
        raise ValueError(
            f"resformer cannot patch a quantized model ({found}); patch the full-precision model, then quantize it"
        )


def sharded(model: nn.Module) -> bool:
    """Whether any part is under FSDP: `fully_shard` gives modules a class FSDP<name of theirs>."""
    return any(type(module).__name__.startswith(("FSDP", "FullySharded")) for module in model.modules())


def _quantized(model: nn.Module) -> str:
    """What shows that a model is quantized, else ""."""
    for name in ("is_quantized", "config.quantization_config"):
        if _has(model, name) and find(model, name):
            return name
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.", "torchao.", "bitsandbytes", "optimum.quanto")):
            return f"{path!r} is a {class_name(type(module))}"
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1 and (not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2):
            return f"{path!r} is of {parameter.dtype}"
        if type(parameter).__module__.startswith(("torchao.", "bitsandbytes")):
            return f"{path!r} is a {class_name(type(parameter))}"
    return ""


def _find_stack(model: nn.Module, base: nn.Module, spec: Stack) -> HostStack | None:
    """The stack of a model that a family describes, or None where there is none of that class."""
    try:
        root = find(base, spec.root) if spec.root else base
        lists = _find_lists(root, spec.layers)
    except AttributeError:
        return None
    layers: Any = lists[0] if len(lists) == 1 else [layer for part in lists for layer in part]
    if not any(spec.is_of(host_class(layer)) for layer in layers):
        return None
    config = getattr(root, "config", getattr(model, "config", None))
    if spec.order:
        layers = [layers[number] for number in spec.order(config)]
    if _has(root, spec.final_norm) and find(root, spec.final_norm) is None:  # left out by the configuration (OPT)
        spec = replace(spec, final_norm="")
    if spec.embed_projection and _has(root, spec.embed_projection):  # only where the widths differ (ELECTRA)
        spec = replace(spec, embed_norm="")
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
    if any(len(one) == 0 for one in lists) and not likely:
        return "Its list of layers is empty."
    found = f"Its layer classes: {', '.join(sorted(likely)) or 'none found'}."
    for family in families().values():
        for spec in family.stacks:
            if any(spec.is_of(host_class(layer)) for layer in layers):
                path = ".".join(part for part in (spec.root, spec.layers) if part)
                return (
                    f"{found} These are of family {family.name!r}, which looks for them at {path!r}: patch the model "
                    "or the part that has them there (of an encoder-decoder the whole, with layers={'decoder': ...} "
                    "for one stack)."
                )
    return found


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
            for path in (*site.norms.values(), *(p.path for point in site.points.values() for p in point.every)):
                find(layer, path)
    except AttributeError as error:
        raise ValueError(f"family {family.name!r} does not fit {type(stack.root).__name__}: {error}") from None
    calls = [path for site in spec.sites for part in site.parts or (site,) for path in part.calls]
    paths = [*calls, *(path for site in spec.sites for path in site.norms.values())]
    theirs = host_class(layer).__module__.startswith("transformers.")  # whose layers have members without a use
    for name, child in layer.named_children():
        known = any(path.split(".")[0] == name for path in paths) or name == "resformer"
        if not known and (not theirs or any(True for _ in child.parameters())):
            raise ValueError(
                f"family {family.name!r} does not fit {type(stack.root).__name__}: it says nothing of {name!r} in its "
                "layers; add a site for it, or a step to the `calls` of one (dropout is one)"
            )
    for name, _ in layer.named_parameters(recurse=False):
        raise ValueError(
            f"family {family.name!r} does not fit {type(stack.root).__name__}: its layers have a parameter {name!r} "
            "of their own, which no site uses; put it into a module that a site calls"
        )
    _check_arguments(family, stack, layer, strict=not theirs)


def _check_arguments(family: Family, stack: HostStack, layer: nn.Module, *, strict: bool) -> None:
    """A `ValueError` for arguments that the layer does not take, and, if strict, for those that no site hands on."""
    cls: Any = host_class(layer)
    parameters = list(inspect.signature(inspect.unwrap(cls.forward)).parameters.values())[2:]
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    parts = [part for site in stack.spec.sites for part in site.parts or (site,)]
    passed = {name for part in parts for name in part.passes.values()} | {part.when for part in parts if part.when}
    some = len(named) < len(parameters)  # takes any others, too
    if not some and (unknown_names := sorted(passed - set(named))):
        raise ValueError(
            f"family {family.name!r} passes {unknown_names[0]!r} on, which the layers of this "
            f"{type(stack.root).__name__} do not take; they take {', '.join(named) or 'the states alone'}"
        )
    if strict and (lost := [name for name in named if name not in passed]):
        raise ValueError(
            f"family {family.name!r} does not fit {type(stack.root).__name__}: its layers take {lost[0]!r}, and no "
            "site hands it on; name it in the `passes` of the sites that use it"
        )


def _check_forwards(model: nn.Module, base: nn.Module, stack: HostStack) -> None:
    """A forward set on the object hides that of its class, and patching would change nothing."""
    ours = {id(module) for module in (model, base, stack.root, *stack.layers)}
    for name, module in model.named_modules():
        if "forward" in vars(module) and id(module) in ours:
            raise ValueError(
                f"{name or type(model).__name__!r} has a forward of its own (dispatched by accelerate, or wrapped by "
                "hand); patch the model first, then dispatch or wrap it"
            )


def probe(host: Host) -> Tensor:
    """What the model computes from a small fixed batch, in evaluation mode, without touching any random state."""
    with _evaluating(host.model), torch.no_grad():
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
    """Meanwhile no two of the model's vectors are equal. In a fresh model all norms are, and a spec that takes one for
    another would go unseen."""
    vectors = [p for p in model.parameters() if p.ndim == 1 and p.is_floating_point()]
    originals = [p.data for p in vectors]
    for number, p in enumerate(vectors):
        phase = torch.arange(p.numel(), device=p.device, dtype=torch.float32) + number
        p.data = (p.data + 0.1 * phase.cos()).to(p.dtype)
    try:
        yield
    finally:
        for p, original in zip(vectors, originals, strict=True):
            p.data = original


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


def width_of(stack: HostStack, layer: nn.Module) -> int:
    """D: of the stream that this layer reads and adds to."""
    if (width := getattr(stack.config, "hidden_size", None)) is not None:
        return width
    for site in stack.spec.sites:
        for path in site.norms.values():
            for parameter in find(layer, path).parameters():
                return parameter.shape[0]
    raise ValueError(f"the configuration of this {type(stack.root).__name__} has no hidden_size, which resformer needs")


def heads_of(stack: HostStack, layer: nn.Module) -> int | None:
    """How many heads the attention of a layer has, or None where neither the configuration nor the layer tells."""
    name = stack.spec.heads
    found = getattr(stack.config, name, None)
    if found is None and _has(layer, name):
        found = find(layer, name)
    return found if isinstance(found, int) else None


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
    who = f"family {host.family.name!r} does not describe this {type(host.base).__name__}"
    mend = (
        "Its layers may have changed with the version of transformers; please report it, or register a family that fits"
    )
    try:
        found = probe(host)
    except Exception as error:
        raise ValueError(
            f"{who}: called as it says, the sublayers fail ({type(error).__name__}: {error}). {mend}"
        ) from error
    if found.shape != expected.shape or not torch.equal(found.nan_to_num(), expected.nan_to_num()):
        how = f"(relative difference {difference(found, expected):.1e})" if found.shape == expected.shape else ""
        raise ValueError(f"{who}: with the identity scheme it computes something else {how}. {mend}")


def difference(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
