"""Make a patched model deeper, with new layers that compute nothing at first."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from resformer.drawing import fresh_seed
from resformer.edits import edits_of, names_ends, offset_of, scale
from resformer.grouped import group_feed_forward
from resformer.host import Host, HostStack, find_host
from resformer.layer import Edit, Residual, find
from resformer.patching import attach, detach, is_patched, mark
from resformer.plan import Plan, StackPlan, make_plan
from resformer.probing import difference, probe
from resformer.swap import host_class, swapped


def grow(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """Add layers on top of a patched model, in place, that leave what it computes as it is, bit for bit.

    A deeper network need never be worse than a shallower one: here is where it starts level. Each new layer is a copy
    of the top layer under a scheme at its own start; where that is not the identity already (as ReZero's closed gate
    is), the output projections of its branches are set to zero, weight and bias, so that x + 0 goes on to the next.
    Both learn from the first steps on. The schemes below are made for the new depth and keep their parameters: what
    depends on depth only in training, as the rates of drop_path, is as in a model of that depth.

    Args:
        model: a model patched in all its layers.
        depth: how many layers it shall have, more than it has.

    Returns the same model, which saves and loads as any patched one. Its optimizer has to be made anew, for it knows
    nothing of the new layers; all other parameters are the same objects as before. Raises a ValueError, and leaves the
    model as it was, if it is not patched in all its layers, if the depth is not a larger whole number, or if the deeper
    model does not compute the same: on post-LN hosts, where N(x + 0) is not x, and under schemes whose constants depend
    on depth or whose new layers cannot be the identity.
    """
    host = find_host(model)
    if not is_patched(model):
        raise ValueError(
            f"this {type(model).__name__} is not patched; resformer.patch(model, 'identity') patches it without "
            "changing what it computes"
        )
    if len(host.stacks) > 1 or host.stacks[0].spec.order or not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"growing is for transformers models of one stack whose layers have weights of their own; this "
            f"{type(model).__name__} is not one"
        )
    now = len(host.layers)
    if isinstance(depth, bool) or not isinstance(depth, int) or depth <= now:
        raise ValueError(f"depth must be a whole number of more than the {now} layers there are, got {depth!r}")
    bare = [number for number, layer in enumerate(host.layers) if not hasattr(layer, "resformer")]
    if bare:
        raise ValueError(f"only models that are patched in all their layers can grow; not patched: {bare}")

    expected = probe(host)
    deeper = _deeper(host, depth)
    before = _State.of(host, deeper)
    try:
        _deepen(host, before, deeper)
        closed = torch.equal(probe(host), expected)
        _scale_outputs(host, now, 2.0**10)  # a small factor may be lost in rounding; one of zero closes at any scale
        closed = closed and torch.equal(probe(host), expected)
        _scale_outputs(host, now, 2.0**-10 if closed else 0.0)
        found = probe(host)
        if not torch.equal(found, expected):
            raise ValueError(
                f"scheme {before.settings['scheme']!r} on this {host.family.kind}-LN {type(model).__name__} "
                f"cannot grow from {now} to {depth} layers and compute the same: with new layers whose branches give "
                f"zero the relative difference is {difference(found, expected):.1e}. Schemes that add to a clean "
                "stream can (pre-LN hosts, or norms moved with placement='pre')"
            )
    except BaseException:
        before.restore(host)
        raise
    return model


@dataclass
class _State:
    """What growing changes, to bring it back."""

    plan: Plan
    edited: dict[int, list[Edit]]
    configs: list[tuple[Any, Any]]  # module, its configuration
    settings: dict[str, Any]

    @staticmethod
    def of(host: Host, deeper: dict[str, Any]) -> _State:
        stack = host.stacks[0]
        residuals = stack.residuals()
        final_norm = "kept"
        if stack.spec.final_norm and swapped(find(stack.root, stack.spec.final_norm), "norm"):
            final_norm = "moved" if hasattr(stack.layers[-1], "resformer_readout") else "unused"
        settings = residuals[0].settings
        configs = [(m, m.config) for m in host.model.modules() if hasattr(m, "config")]
        plan = Plan(settings["placement"], (StackPlan(stack, residuals, final_norm),))
        edited = {number: own.edited for number, own in residuals.items()}
        return _State(plan, edited, configs, settings)

    def restore(self, host: Host) -> None:
        detach(host, edit_weights=False)
        residuals = self.plan.stacks[0].residuals
        del _list(host)[len(residuals) :]
        for module, config in self.configs:
            module.config = config
        for own in residuals.values():
            own.edited = []
        attach(host, self.plan, edit_weights=False)
        for number, own in residuals.items():
            own.edited = self.edited[number]
        mark(host.model, self.settings)


def _deepen(host: Host, before: _State, deeper: dict[str, Any]) -> None:
    """New layers on top, and the schemes of all layers made for the new depth."""
    now, depth, settings = len(host.layers), deeper["num_hidden_layers"], before.settings
    old = before.plan.stacks[0].residuals
    new = _new_layers(host, deeper)
    detach(host, edit_weights=False)
    _list(host).extend(new)
    _configure(host, deeper)
    scheme, init, placement = settings["scheme"], settings["init"], settings["placement"]
    chosen = {host.stacks[0].spec.name: list(range(depth))}
    plan = make_plan(host, scheme, init, placement, chosen, settings["options"], check=False, seed=fresh_seed())
    grown = plan.stacks[0].residuals
    _take_over(grown, old)
    attach(host, plan, edit_weights=False)
    for number, own in old.items():
        made, had = grown[number].edited, before.edited[number]
        if [(edit.path, edit.gain) for edit in made] != [(edit.path, edit.gain) for edit in had]:
            raise ValueError(
                f"scheme {scheme!r} scales the host's weights by factors that depend on depth; a model that was "
                f"patched with {now} layers cannot go on as one of {depth}"
            )
        grown[number].edited = had
        grown[number].difference = own.difference
    mark(host.model, settings | {"layers": None if settings["layers"] is None else [0, depth]})


def _take_over(new: dict[int, Residual], old: dict[int, Residual]) -> None:
    """The parameters and buffers that the schemes had, the very same objects; the final norm moves to the new top."""
    top: Any = old[max(old)]
    last: Any = new[max(new)]
    trained = [(p, p.requires_grad) for own in old.values() for p in own.parameters()]
    try:
        if hasattr(top, "final_norm"):
            last.final_norm.load_state_dict(top.final_norm.state_dict(keep_vars=True), assign=True)
        for number, own in old.items():
            for name, module in own.named_children():
                if name != "final_norm":
                    made: Any = getattr(new[number], name)
                    made.load_state_dict(module.state_dict(keep_vars=True), assign=True)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"the scheme has other parts in a deeper model, so this one cannot grow: {error}") from None
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
    steps = [scheme.progress() for own in old.values() for scheme in own.schemes if scheme.scheduled]
    for number in new.keys() - old.keys():  # schedules are there at the step at which the others are
        for scheme in new[number].schemes:
            if scheme.scheduled and steps:
                scheme.set_progress(max(steps))


@torch.no_grad()
def _scale_outputs(host: Host, start: int, gain: float) -> None:
    """Multiply what the branches give, from a layer on; a gain of 0 makes them x + 0."""
    for layer in host.layers[start:]:
        for site in host.stacks[0].sites(layer):
            if "out" not in find(layer, "resformer").acts[site.name] and not names_ends(site):
                raise ValueError(
                    f"family {host.family.name!r} does not name the projection that site {site.name!r} ends with; add "
                    "it to its `points`"
                )
            for edit in edits_of(host.stacks[0], layer, site, "branch", gain):
                path, _, name = edit.path.rpartition(".")
                weight, offset = find(layer, edit.path), offset_of(find(layer, path)) if name == "weight" else 0.0
                scale(weight, gain, offset) if gain else weight.fill_(-offset)


# ---------------------------------------------------------------------------------------------------- the host


def _list(host: Host) -> Any:
    """The module list that holds the layers."""
    stack: HostStack = host.stacks[0]
    return find(stack.root, stack.spec.layers)


def _deeper(host: Host, depth: int) -> dict[str, Any]:
    """What the configuration says at the new depth: lists of one entry a layer go on as its class continues them.

    Of the lists that the family names, which the class cannot continue, the last entry goes on.
    """
    config, now = host.model.config, len(host.layers)
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    given = config.to_dict()
    known = {name: value for name, value in given.items() if not isinstance(value, list) and name != "resformer"}
    here, there = (type(config)(**known | {key: number}).to_dict() for number in (now, depth))
    deeper: dict[str, Any] = {"num_hidden_layers": depth}
    for name, value in given.items():
        lists = [entry for entry in (value, here.get(name), there.get(name)) if isinstance(entry, list)]
        if [len(entry) for entry in lists] == [now, now, depth]:
            deeper[name] = [*value, *lists[2][now:]]
    for name in host.stacks[0].spec.by_layer:
        if isinstance(value := given[name], list):
            deeper[name] = [*value, *value[-1:] * (depth - now)]
    return deeper


def _configure(host: Host, values: dict[str, Any]) -> None:
    """Give the model a configuration of its own with these values: other models may share the one it had."""
    own: dict[int, Any] = {}
    for module in host.model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            if id(config) not in own:
                own[id(config)] = copy.deepcopy(config)
                for name, value in values.items():
                    setattr(own[id(config)], name, value)
            module.config = own[id(config)]


@torch.no_grad()
def _new_layers(host: Host, deeper: dict[str, Any]) -> list[nn.Module]:
    """Layers as the host's own class makes them at this depth, with the weights of the top one."""
    config = copy.deepcopy(host.model.config)
    for name, value in deeper.items():
        setattr(config, name, value)
    with torch.device("meta"):
        twin: Any = host_class(host.base)(config)
        if (cardinality := getattr(config, "ffn_cardinality", None)) is not None:
            group_feed_forward(twin, cardinality)
    layers = ".".join(filter(None, (host.stacks[0].spec.root, host.stacks[0].spec.layers)))
    outside = {name for name, _ in twin.named_buffers() if not name.startswith(layers)}
    if lacking := sorted(outside - {name for name, _ in host.base.named_buffers()}):
        raise ValueError(
            f"a {type(host.base).__name__} of this depth has parts outside its layers that this one was made without "
            f"({lacking[0]}), so it cannot grow"
        )
    top: Any = host.layers[-1]
    weights = {name: value for name, value in top.state_dict().items() if ".resformer." not in f".{name}"}
    made = []
    for layer in find(twin, layers)[len(host.layers) :]:
        layer.to_empty(device=next(top.parameters()).device).to(next(top.parameters()).dtype)
        if layer.state_dict().keys() - weights.keys() or any(True for _ in layer.buffers()):
            layer.apply(host.model._init_weights)
        copies = {name: value.clone() for name, value in weights.items()}
        unknown = layer.load_state_dict(copies, strict=False, assign=True).unexpected_keys
        if unknown:
            raise ValueError(
                f"the top layer has weights that its class does not make ({unknown[0]}, as adapters do); grow the "
                "model first, then add them"
            )
        _adopt(layer, top, host)
        made.append(layer)
    return made


def _adopt(layer: nn.Module, top: nn.Module, host: Host) -> None:
    """What a layer is given after it was made: its mode, the model's configuration, checkpointing, capture hooks."""
    layer.train(top.training)
    others = dict(top.named_modules())
    for name, module in layer.named_modules():
        if hasattr(module, "config"):
            module.config = host.base.config
        other = others.get(name, module)
        for flag in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if flag in vars(other):
                setattr(module, flag, getattr(other, flag))
        for hook in list(other._forward_hooks.values()):
            if getattr(hook, "__module__", "").startswith("transformers."):  # for output_hidden_states, attentions
                module.register_forward_hook(hook)
