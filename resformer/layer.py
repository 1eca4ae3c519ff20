"""The forward of a patched layer: one function for all families and schemes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from resformer.attention import VALUES, Values
from resformer.errors import unknown
from resformer.hosts.family import Projection, Site, Stack, families
from resformer.schemes.base import Branch, Scheme, Stream
from resformer.swap import host_class, swap_kind

logger = logging.get_logger(__name__)
CACHES = ("past_key_values", "layer_past")  # what the arguments with a KV cache are called


class Residual(nn.Module):
    """What patching hangs on a layer as `layer.resformer`: the scheme of each site, and the norms made for it.

    A plain module, so that its parameters are keyed `<layer>.resformer.<site>.<parameter>` and PEFT can save it.
    """

    by_call = False

    def __init__(self, schemes: dict[str, Scheme], norms: dict[str, nn.Module], acts: dict[str, dict[str, str]]):
        super().__init__()
        for name, module in (schemes | norms).items():
            self.add_module(name, module)
        self.scheme_names = tuple(schemes)  # sites in order; with scope "block" the block's scheme stands last
        self.steps_block = "block" in schemes
        self.streams = next((name for name, scheme in schemes.items() if type(scheme).streams()), "")
        self.settings: dict[str, Any] = {}  # what config.resformer says on disk; one object for all layers
        self.acts = acts  # site -> slot -> path of the norm that acts there, from the layer
        self.opens = self.closes = False
        self.frozen: list[str] = []  # parameters, by path from the layer, that no norm in use needs
        self.trained = True  # whether the host trained anything else in this layer when patched
        self.bypassed: list[str] = []  # parameters of the host's final norm, where the scheme wants none
        self.edited: list[Edit] = []
        self.switched_off_cache: list[str] = []  # paths of configurations, for a scheme that cannot have a KV cache
        self.difference: float | None = None  # from the host's output, relative, measured when patched

    @property
    def schemes(self) -> list[Scheme]:
        return [getattr(self, name) for name in self.scheme_names]

    def norm(self, layer: nn.Module, path: str) -> Any:
        """The norm at a path of `acts`: the layer's own, or one made for the scheme."""
        made = path.removeprefix("resformer.")
        return find(layer, path) if made == path else getattr(self, made)

    def forward(self) -> None:
        raise RuntimeError("`resformer` holds what its layer needs; call the layer")


class Calls(nn.Module):
    """What patching hangs on a layer that is called more than once: a `Residual` for each call, by its number."""

    by_call = True

    def __init__(self, residuals: dict[int, Residual]):
        super().__init__()
        for number, own in residuals.items():
            self.add_module(str(number), own)


class Carried(tuple):
    """The states of a layer and its stream where other things stand beside them in a tuple. Loops that gather hidden
    states by hand may ask for their shape and cut them."""

    @property
    def shape(self) -> torch.Size:
        return self[0].shape

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(0)[index] if isinstance(index, tuple) else super().__getitem__(index)


def settings_of(module: nn.Module) -> dict[str, Any] | None:
    """How a model, or a part of one, was patched, or None if it was not."""
    return next((part.settings for part in module.modules() if isinstance(part, Residual)), None)


class Edit:
    """One change to the host's weights: what was multiplied by what, and what stood there before."""

    def __init__(self, role: str, path: str, gain: float, part: Projection | None = None, groups: int = 1):
        self.role, self.path, self.gain = role, path, gain  # path from the layer; of "embed": from the stack
        self.part, self.groups = part, groups
        self.offset = 0.0  # of a norm, what it adds to its weight
        self.original: Any = None


def find(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path; an `AttributeError` names the path and the step that is missing."""
    at: Any = module
    for name in path.split("."):
        try:
            at = getattr(at, name)
        except AttributeError:
            raise AttributeError(f"{path!r} was not found in {type(module).__name__}: no {name!r}") from None
    return at


def identity(x: Tensor) -> Tensor:
    return x


def before_projection(layer: Any, site: str, point: str, path: str, module: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook: the scheme's say on the input of "o" or "down"."""
    return _scheme_at(layer, site, path, module).inside(point, args[0]), *args[1:]


def after_projection(
    layer: Any,
    site: str,
    point: str,
    path: str,
    part: int,
    parts: int,
    groups: int,
    module: nn.Module,
    args: tuple,
    y: Tensor,
):
    """Forward hook: the scheme's say on the output of "q", "k", "v" or "up", a slice of it where they are fused."""
    scheme = _scheme_at(layer, site, path, module)
    if parts == 1:
        return scheme.inside(point, y)
    slices = list(y.unflatten(-1, (groups, parts, -1)).unbind(-2))  # (... groups, size) each
    slices[part] = scheme.inside(point, slices[part].flatten(-2)).unflatten(-1, (groups, -1))
    return torch.stack(slices, dim=-2).flatten(-3)


def _scheme_at(layer: Any, site: str, path: str, module: nn.Module) -> Scheme:
    """The scheme in force now, which PEFT may have copied; not bound to the hook for that reason."""
    if find(layer, path) is not module:
        raise ValueError(
            f"{path!r} of {type(layer).__name__} is wrapped by a {type(find(layer, path)).__name__}, and scheme "
            f"{getattr(layer.resformer, site).name!r} acts inside it: what wraps it would see another input, and "
            f"merging it would change the model; leave it out: exclude_modules=[{path!r}]"
        )
    return getattr(layer.resformer, site)


def run_branch(layer: nn.Module, site: Site, given: dict[str, Any], x: Tensor, rest: dict[str, tuple]) -> Tensor:
    """The sublayer of a site: its modules one after the other, the first with the layer's arguments."""
    size = getattr(layer, site.chunks) if site.chunks else 0
    if size:
        return torch.cat([_chain(layer, site, given, part, rest) for part in x.split(size, dim=1)], dim=1)
    return _chain(layer, site, given, x, rest)


def _chain(layer: nn.Module, site: Site, given: dict[str, Any], x: Any, rest: dict[str, tuple]) -> Tensor:
    for i, path in enumerate(site.calls):
        step = find(layer, path)
        if isinstance(step, int | float):
            x = functional.dropout(x, p=step, training=layer.training)
            continue
        x = step(x, **(given if i == 0 else {}))
        if isinstance(x, tuple):
            if i == 0:
                rest[site.name] = x
            x = x[0]
    return x


@dataclass(frozen=True)
class Call:
    """One call of a layer: what it was given, by name, and what its sublayers return beside the states."""

    layer: Any
    own: Residual
    stack: Stack
    given: dict[str, Any]
    named: tuple[str, ...]  # the arguments that the layer's signature names
    rest: dict[str, tuple]  # site -> what its first module returned

    def arguments(self, site: Site) -> dict[str, Any]:
        """For the first module of a site."""
        found = {parameter: self.given[name] for parameter, name in site.passes.items() if name in self.given}
        if site.extra:
            found |= {name: value for name, value in self.given.items() if name not in self.named}
        return found

    def mask(self) -> Any:
        return self.stack.real(self.given) if self.stack.real else self.given.get("attention_mask")


def run_site(site: Site, scheme: Scheme, s: Any, call: Call):
    """One residual connection: the branch with the norms that act on it, inside the scheme's step."""
    layer = call.layer
    norm = {slot: call.own.norm(layer, path) for slot, path in call.own.acts[site.name].items()}

    def branch(x: Tensor, values: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        entered: dict[str, Tensor] = {}
        y: Any = None
        for part in site.parts or (site,):
            slot = f"pre_{part.name}" if f"pre_{part.name}" in norm else "pre"
            if slot not in entered:
                z = norm.get(slot, identity)(x)
                entered[slot] = scheme.inside("in", z) if "in" in scheme.points else z
            given = call.arguments(part)
            if values is None or part.name != "attn":
                out = run_branch(layer, part, given, entered[slot], call.rest)
            else:
                change = Values(values)
                out = run_branch(layer, part, given | {VALUES: change}, entered[slot], call.rest)
                change.check(layer, part.name)
            y = out if y is None else y + out
        return norm.get("out", identity)(y)

    post = norm.get("post", identity)
    if site.after is not None:
        post = functools.partial(_one_after_the_other, post, site.after)
    return scheme.step(s, Branch(branch, call.mask()), post)


def _one_after_the_other(first: Any, second: Any, x: Tensor) -> Tensor:
    return second(first(x))


def given_to(cls: Any) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """Of a layer's own forward: what it calls the states, its other arguments, and those of their defaults that are
    something."""
    parameters = list(inspect.signature(inspect.unwrap(cls.forward)).parameters.values())[1:]  # without self
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    defaults = {p.name: p.default for p in named if p.default is not p.empty and p.default is not None}
    first, *others = [p.name for p in named] or [""]
    return first, tuple(others), defaults


def run_layer(layer: Any, stack: Stack, named: tuple[str, ...], h: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """(B T D) or (h, *stream) -> the same; the stream opens at the first patched layer and closes at the last.

    Of a layer that is called more than once the number of the call follows h.
    """
    own, number = layer.resformer, None
    if own.by_call:
        number = h[1] if isinstance(h, tuple) else 0
        own = getattr(own, str(number))
        h = h if not isinstance(h, tuple) else h[0] if len(h) == 2 else (h[0], *h[2:])
    call = Call(layer, own, stack, dict(zip(named, args, strict=False)) | kwargs, named, {})
    schemes = own.schemes
    s: Stream = h
    if isinstance(h, tuple):
        s = h[1:]
    elif own.opens:
        if hasattr(own, "embed_norm"):
            h = own.embed_norm(h)
        s = schemes[0].start(h) if not own.steps_block else schemes[-1].start(h)
    elif own.streams:
        raise ValueError(
            f"scheme {getattr(own, own.streams).name!r} carries a stream from layer to layer, and this "
            f"{type(layer).__name__} was given plain states: a layer before it was not run (layers that are dropped in "
            "training, or called by hand), and the scheme needs all of them, from the first that is patched on"
        )

    sites = []
    for site in stack.sites:
        if site.when and call.given.get(site.when) is None:
            continue
        if site.name not in own.acts:
            if getattr(layer, "is_decoder", True):  # an encoder ignores states that it cannot attend to
                raise ValueError(f"`{site.when}` was given, but {type(layer).__name__} has no {site.name!r} sublayer")
            continue
        sites.append(site)

    if any(scheme.repeats for scheme in schemes) and any(call.given.get(name) is not None for name in CACHES):
        raise ValueError(
            f"scheme {schemes[-1].name!r} calls each sublayer more than once, which a KV cache cannot follow; "
            "pass use_cache=False"
        )
    if own.steps_block:

        def field(x: Tensor) -> Tensor:
            y: Any = x
            for site in sites:
                y = run_site(site, getattr(own, site.name), y, call)
            return y - x

        depends = functools.partial(_depends, call)
        s = schemes[-1].step(s, Branch(field, call.mask(), depends), identity)
    else:
        for site in sites:
            s = run_site(site, getattr(own, site.name), s, call)

    if own.closes:
        out: Any = schemes[-1].finish(s, _final_norm(layer, own))
    else:  # the readable state goes first, where transformers looks for hidden states
        state, stream = (schemes[-1].finish(s, identity), s) if isinstance(s, tuple) else (s, ())
        counted = () if number is None else (number + 1,)
        out = (state, *counted, *stream) if counted or stream else state
    if stack.returns:
        rest, out = call.rest, Carried(out) if isinstance(out, tuple) else out
        return out, *(rest[site][i] if len(rest.get(site, ())) > i else None for site, i in stack.returns)
    return out


def show_states(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of what runs the layers: of the states with a stream that were gathered it shows the states."""

    def shown(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(one[0] if isinstance(one, Carried) else one for one in value)
        return value

    if isinstance(output, tuple):
        return tuple(shown(value) for value in output)
    if isinstance(output, MutableMapping):
        for name, value in output.items():
            output[name] = shown(value)
    return output


def _depends(call: Call) -> list[Tensor]:
    """All that gradients can flow to from a layer besides its input: parameters, and the states of an encoder."""
    if call.stack.returns:
        raise ValueError(
            f"layers of class {type(call.layer).__name__} hand on more than their states, and gradients through that "
            f"are lost where scheme {call.own.schemes[-1].name!r} integrates backwards; leave adjoint=False"
        )
    given = [value for value in call.given.values() if isinstance(value, Tensor) and value.requires_grad]
    return [*call.layer.parameters(), *given]


def refuse_attentions(name: str, base: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a base model whose layers call their attention more than once."""
    asked = kwargs.get("output_attentions")
    config = getattr(base, "config", None)  # a model of a user's own may have none
    if getattr(config, "output_attentions", False) if asked is None else asked:
        raise ValueError(
            f"scheme {name!r} calls each sublayer more than once, so a layer has no one attention to show; "
            "leave output_attentions out, and off in the config"
        )


def _final_norm(layer: Any, own: Residual) -> Any:
    """What acts on the closing stream: the norm made for the scheme, or the host's own, moved in; else nothing."""
    if moved := getattr(layer, "resformer_readout", ()):
        norm: Any = host_class(moved[0])
        return functools.partial(norm.forward, moved[0])
    return getattr(own, "final_norm", identity)


@swap_kind("layer")
def _layer_body(cls: Any, family: str, stack_name: str) -> dict[str, Any]:
    if family not in families():  # a copy that was pickled, in a fresh process
        raise unknown("family", family, families(), hint="The model was patched with it: register it before loading.")
    stack = next(one for one in families()[family].stacks if one.name == stack_name)
    states, named, defaults = given_to(cls)
    passed = {name for site in stack.sites for part in site.parts or (site,) for name in part.passes.values()}
    left_out = {name: value for name, value in defaults.items() if name in passed}

    @functools.wraps(inspect.unwrap(cls.forward))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden_states, args = (args[0], args[1:]) if args else (kwargs.pop(states), args)
        if left_out:  # the layer's own defaults, as it would hand them on
            kwargs = {k: v for k, v in left_out.items() if k not in named[: len(args)]} | kwargs
        if not (getattr(self, "gradient_checkpointing", False) and self.training):
            return run_layer(self, stack, named, hidden_states, args, kwargs)
        # Reentrant checkpointing sees only tensors that are arguments themselves; those inside a tuple get silently
        # wrong gradients. So the stream goes through flat.
        kwargs = _without_cache(self, kwargs)
        flat = hidden_states if isinstance(hidden_states, tuple) else (hidden_states,)

        def run(*inputs: Any) -> Any:
            h = inputs[: len(flat)] if isinstance(hidden_states, tuple) else inputs[0]
            out = run_layer(self, stack, named, h, inputs[len(flat) :], kwargs)
            if not stack.returns:
                return out
            states, *rest = out
            return (*states, *rest) if isinstance(states, tuple) else out

        out = self._gradient_checkpointing_func(run, *flat, *args)
        size = len(out) - len(stack.returns) if stack.returns else 1
        return (Carried(out[:size]), *out[size:]) if size > 1 else out

    def no_second_wrapper(sub: type, **kwargs: Any) -> None:
        # FSDP2 subclasses the layer's class; transformers would wrap the forward again and checkpoint twice
        super(GradientCheckpointingLayer, sub).__init_subclass__(**kwargs)  # type: ignore[misc]

    body: dict[str, Any] = {"forward": forward}
    if issubclass(cls, GradientCheckpointingLayer):
        body["__init_subclass__"] = classmethod(no_second_wrapper)
        body["__call__"] = nn.Module.__call__  # where older versions of transformers checkpoint
    return body


def _without_cache(layer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """As transformers' own checkpointing layer: a layer run twice must not write its cache twice."""
    keys = {"use_cache"} if layer._can_checkpoint_with_cache else {"use_cache", *CACHES}
    off = {key: False if key == "use_cache" else None for key in keys if kwargs.get(key)}
    if off:
        changes = ", ".join(f"`{key}={value}`" for key, value in sorted(off.items()))
        logger.warning_once(
            f"Caching is incompatible with gradient checkpointing in {type(layer).__name__}. Setting {changes}."
        )
    return kwargs | off


@swap_kind("norm")
def _bypassed_norm(cls: type) -> dict[str, Any]:
    """A norm of the host that no scheme wants: it keeps its keys and passes its input on."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    return {"forward": forward}


class _Bare:
    """A module that also norms and adds, seen by its own forward without the two: the norm passes its input on, and
    what the module at the branch's end gave is kept."""

    def __init__(self, module: nn.Module, ends: str, norm: str):
        def end(x: Tensor) -> Tensor:
            self._found = getattr(module, ends)(x)
            return self._found

        self._module = module
        setattr(self, ends, end)
        setattr(self, norm, identity)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@swap_kind("bare")
def _bare_body(cls: Any, ends: str, norm: str) -> dict[str, Any]:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bare = _Bare(self, ends, norm)
        out = cls.forward(bare, *args, **kwargs)
        return (bare._found, *out[1:]) if isinstance(out, tuple) else bare._found

    return {"forward": forward}
