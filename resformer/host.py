"""A model seen through its family: found, checked and probed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import nn
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
        _check_none_is_lost(model, base, family, stacks)
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
    near = get_close_matches(_value(model, "model_type") or "", families(), n=2, cutoff=0.5)
    guess = f"The nearest by name: {', '.join(near)}." if near else ""
    raise ValueError(
        f"no family describes this {type(model).__name__}; `resformer hosts` lists {len(families())}. "
        + " ".join(filter(None, [guess, *(f"{reason}." for reason in reasons), _layers_found(model, bool(reasons))]))
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
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            at = f"{path}.{name}" if path else name
            if parameter.ndim > 1 and (not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2):
                return f"{at!r} is of {parameter.dtype}"
            if type(parameter).__module__.startswith(("torchao.", "bitsandbytes")):
                return f"{at!r} is a {class_name(type(parameter))}"
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
        layers = _order_of(spec, config, layers)
    if _has(root, spec.final_norm) and find(root, spec.final_norm) is None:  # left out by the configuration (OPT)
        spec = replace(spec, final_norm="")
    if spec.embed_projection and _has(root, spec.embed_projection):  # only where the widths differ (ELECTRA)
        spec = replace(spec, embed_norm="")
    return HostStack(spec, root, layers, config)


def _find_lists(root: nn.Module, path: str) -> list[nn.ModuleList | nn.Sequential]:
    head, star, tail = path.partition(".*.")
    found = [find(member, tail) for member in find(root, head)] if star else [find(root, head)]
    if not all(isinstance(one, nn.ModuleList | nn.Sequential) for one in found):
        raise AttributeError(path)
    return found


def _order_of(spec: Stack, config: Any, layers: list[nn.Module]) -> list[nn.Module]:
    """The layers as `Stack.order` says that they are called."""
    assert spec.order is not None
    numbers = spec.order(config)
    fits = isinstance(numbers, list | tuple | range) and bool(numbers)
    if not fits or any(type(n) is not int or not 0 <= n < len(layers) for n in numbers):
        raise ValueError(
            f"`order` of the stack {spec.name!r} must give a list of numbers of its layers, 0 to {len(layers) - 1}, "
            f"one for each call; it gave {numbers!r}"
        )
    return [layers[number] for number in numbers]


def _path_of(spec: Stack) -> str:
    return ".".join(part for part in (spec.root, spec.layers) if part)


def _places_of(model: nn.Module, spec: Stack, found: tuple[HostStack, ...] = ()) -> str:
    """Where layers of a stack's class lie outside the stacks that were found, as text, or ""."""
    known = {id(layer) for stack in found for layer in stack.layers}
    holders = dict.fromkeys(
        path.rpartition(".")[0]
        for path, module in model.named_modules()
        if path and spec.is_of(host_class(module)) and id(module) not in known
    )
    places = [f"{path!r} ({type(model.get_submodule(path)).__name__})" if path else "the top" for path in holders]
    held = all(isinstance(model.get_submodule(path), nn.ModuleList | nn.Sequential) for path in holders)
    many = f" and {len(places) - 3} other places" if len(places) > 3 else ""
    need = "" if held else ", and an nn.ModuleList or nn.Sequential is needed"
    return ", ".join(places[:3]) + many + need if places else ""


def _check_none_is_lost(model: nn.Module, base: nn.Module, family: Family, stacks: tuple[HostStack, ...]) -> None:
    """A `ValueError` where a stack was not found though its layers are in the model (a T5 encoder alone has none of
    the other)."""
    here = {stack.spec.name for stack in stacks}
    for spec in family.stacks:
        if spec.name not in here and (places := _places_of(base, spec, stacks) or _places_of(model, spec, stacks)):
            raise ValueError(
                f"family {family.name!r} does not fit {type(base).__name__}: its {spec.name} was not found at "
                f"{_path_of(spec)!r}; layers of its class lie at {places}"
            )


def _layers_found(model: nn.Module, known: bool) -> str:
    """What layers there are, and, unless that is `known` to be as it should, where."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for one in lists for layer in one if any(True for _ in layer.children())]
    names = {class_name(host_class(layer)) for layer in layers}
    likely = {name for name in names if name.endswith(("Layer", "Block"))} or names
    if any(len(one) == 0 for one in lists) and not likely:
        return "Its list of layers is empty."
    found = f"Its layer classes: {', '.join(sorted(likely)) or 'none found'}."
    for family in families().values():
        for spec in family.stacks:
            if not known and (places := _places_of(model, spec)):
                return (
                    f"{found} {_path_of(spec)!r} was not found in {type(model).__name__}; layers of this class lie at "
                    f"{places}. These are of family {family.name!r}, which looks for them at {_path_of(spec)!r}: patch "
                    "the model or the part that has them there (of an encoder-decoder the whole, with "
                    "layers={'decoder': ...} for one stack), or, if the family is yours, correct its `root` and "
                    "`layers`."
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
        for path in filter(None, (spec.final_norm, spec.embed_norm, *spec.embeddings, *spec.between)):
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
