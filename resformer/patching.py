"""Patch a Hugging Face model in place: the one place where schemes and families meet."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from resformer import adapters, saving, trainer  # noqa: F401  (they teach PEFT and transformers about patched models)
from resformer.attention import attending, route, unroute
from resformer.drawing import fresh_seed
from resformer.edits import divide, edits_of, groups_of, multiply
from resformer.host import Host, HostStack, find_host, sharded
from resformer.hosts.family import Family, Projection, Site
from resformer.hosts.tiny import tiny_config
from resformer.layer import (
    Calls,
    Residual,
    after_projection,
    before_projection,
    find,
    given_to,
    refuse_attentions,
    settings_of,
    show_states,
)
from resformer.plan import Chosen, Layers, Plan, StackPlan, attends, choose_layers, make_plan
from resformer.probing import difference, first_probe, hooked, probe, unlike
from resformer.swap import host_class, swap, swap_back, swapped
from resformer.verify import check_identity, misfit, run_natively

Model = TypeVar("Model", bound=nn.Module)
VERSION = 1  # of config.resformer
HOOKS = (before_projection, after_projection, refuse_attentions)
FAR = {torch.float64: 1e-6, torch.float32: 1e-2}  # no rounding reaches this; half precision: 0.2


def patch(
    model: Model,
    scheme: str,
    *,
    init: str = "preserve",
    placement: str | None = None,
    layers: Layers | dict[str, Layers] = None,
    verify: bool = True,
    **options: Any,
) -> Model:
    """Change the residual connection around every sublayer of a model, in place, keeping its weights.

    Args:
        model: a model of a known family (`resformer hosts`), with any head; or one of your own, for which see
            `resformer.register_family`.
        scheme: a name of `resformer.schemes()`.
        init: "preserve", the patched model computes what the host computed; or "paper", the scheme's own start,
            for training from scratch.
        placement: where the host's norms act: "native", "pre", "post", "sandwich" or "none". By default native with
            init="preserve", and with init="paper" where the scheme's paper has them. Schemes that are about
            placement (post_ln, pre_ln, deepnorm ...) fix it themselves.
        layers: a contiguous range of layers; by default all. What schemes count (layers, sites) they count within it.
            Of an encoder-decoder by stack: {"decoder": range(6)} leaves the encoder as it is.
        verify: run the model on a few tokens, before and after it is patched. With False it is not run, and what only
            that shows is not checked: that the family describes what the layers compute, that each site is visited
            once, that the projections inside of which a scheme acts are called as modules, that the patched model runs,
            and, with init="preserve", that it computes what it did. What follows from classes, shapes and configuration
            is checked all the same. For models of a kind that was verified before.
        options: the scheme's own, see its docstring.

    What a scheme draws at random follows from one number of torch's global generator and the site where it stands:
    after equal `torch.manual_seed` a site starts alike in nets of any depth.

    Returns the same model. Raises a ValueError, and leaves the model as it was, if the scheme, an option or the model's
    class is unknown, if it is patched already, or if the scheme cannot preserve this host.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("parameters that are made in torch.inference_mode() cannot be trained; patch outside of it")
    host = find_host(model)
    if (found := settings_of(model)) is not None:
        raise ValueError(
            f"this {type(model).__name__} is patched already, with {found['scheme']!r}; "
            "call resformer.unpatch(model) first"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("this model has no weights yet (device 'meta'); load it before patching it")
    chosen = choose_layers(host, layers)
    plan = make_plan(host, scheme, init, placement, chosen, options, seed=fresh_seed())
    two = len(host.stacks) > 1
    settings = {
        "version": VERSION,
        "host": getattr(getattr(model, "config", None), "model_type", None),
        "scheme": scheme,
        "init": init,
        "placement": plan.placement,
        "layers": _recorded(chosen, by_stack=two or isinstance(layers, dict)) if two or layers is not None else None,
        "options": options,
    }
    expected = None
    if verify:
        expected = first_probe(host)
        check_described(host, plan, chosen, scheme)
    try:
        attach(host, plan)
        if expected is not None:
            plan.residuals[0].difference = _check_kept(host, scheme, init, expected)
    except BaseException:
        detach(host)
        raise
    mark(model, settings)
    return model


def _check_kept(host: Host, scheme: str, init: str, expected: Tensor) -> float:
    """How far a patched model is from what it computed before, relative; a `ValueError` if it should be nearer."""
    change = difference(probe_patched(host, scheme), expected)
    if init == "preserve" and change > FAR.get(expected.dtype, 0.2):
        raise ValueError(
            f"scheme {scheme!r} should keep what this {type(host.model).__name__} computes, and the relative "
            f"difference is {change:.1e}: its `preserves` promises too much, or something that the family does not "
            "know of takes part, such as adapters on projections that are scaled (merge them first); or pass "
            "init='paper'"
        )
    return change


def check_described(host: Host, plan: Plan, chosen: Chosen, scheme: str = "identity") -> None:
    """A `ValueError` unless the family says what this model does: with the identity scheme it computes the same bits,
    comes once by each site, and calls the projections that the plan's schemes act inside of. The model stays as it
    is."""
    with unlike(host.model):
        native = run_natively(host)
    try:
        trial = make_plan(host, "identity", "preserve", None, chosen, {})
        attach(host, trial)
        with counted(trial) as visits, _called(plan) as points, unlike(host.model):
            check_identity(host, native, visited=functools.partial(_check_visits, host, visits))
        if idle := [where for where, times in points.items() if not times]:
            raise ValueError(
                f"scheme {scheme!r} acts inside the sublayers of family {host.family.name!r}, and a forward pass does "
                f"not call {idle[0]} as a module (in all {len(idle)}); leave it out of `points`, or take a scheme that "
                "acts around the sublayers"
            )
    finally:
        detach(host)


def check_still_described(host: Host) -> None:
    """A `ValueError` where the family of a model that was loaded patched, and so not compared with itself unpatched,
    does not describe this transformers. Seen on a tiny model, once for each state of the code."""
    classes: list[Any] = [host_class(layer) for layer in host.layers]
    if host.family.config:
        _describes(host.family, tuple(dict.fromkeys(cls.forward for cls in classes)))


@functools.cache
def _describes(family: Family, forwards: tuple[Any, ...]) -> None:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            tiny: Any = AutoModel.from_config(tiny_config(family.name))
        host = find_host(tiny.float())
    except Exception:  # of any kind: that this version makes no tiny model of it says nothing
        return
    chosen = choose_layers(host, None)
    try:
        check_described(host, make_plan(host, "identity", "preserve", None, chosen, {}), chosen)
    except ValueError as error:
        raise ValueError(
            f"this checkpoint is not loaded, for it might compute something else: seen on a tiny model, {error}"
        ) from error


def probe_patched(host: Host, scheme: str) -> Tensor:
    """`probe` of a patched model; a ValueError that says why it cannot compute."""
    try:
        with _watching(host):
            return probe(host)
    except (AttributeError, TypeError, _StreamLostError) as error:  # of code that expects a tensor
        raise ValueError(
            f"with scheme {scheme!r} this {type(host.model).__name__} fails ({type(error).__name__}: {error}): if "
            "something reads the states between two layers, a scheme that carries a stream of several tensors from "
            "layer to layer cannot stand there; have the layers take what the layers before them return (a module "
            "between them is named in `Stack.between`), or take another scheme"
        ) from error
    except RuntimeError as error:
        if len(dtypes := dtypes_of(host)) == 1:
            raise
        raise ValueError(
            f"scheme {scheme!r} cannot compute with the layers of this {type(host.model).__name__}, whose weights are "
            f"of several kinds ({', '.join(dtypes)}: {error}); load it in one, such as dtype=torch.float32 "
            "(transformers keeps parts of T5 in float32 where the rest is float16)"
        ) from error


def dtypes_of(host: Host) -> list[str]:
    """Of the weights in its layers, as text."""
    return sorted({str(p.dtype) for layer in host.layers for p in layer.parameters() if p.is_floating_point()})


class _StreamLostError(Exception):
    """A layer was not given what the one before it returned."""


@contextmanager
def _watching(host: Host) -> Iterator[None]:
    """Meanwhile each layer must be given the very tuple, if it is one, that the layer before it returned."""
    with ExitStack() as watched:
        for stack in host.stacks:
            before: list[Any] = [None]

            def entering(module: Any, args: Any, kwargs: Any, before: list[Any] = before) -> None:
                given = args[0] if args else kwargs.get(given_to(host_class(module))[0])
                if isinstance(before[0], tuple) and given is not before[0]:
                    raise _StreamLostError("a layer is not given what the layer before it returned")

            def leaving(module: Any, args: Any, output: Any, before: list[Any] = before, stack: Any = stack) -> None:
                before[0] = output[0] if stack.spec.returns else output

            watched.enter_context(hooked(stack.layers, entering, leaving))
        yield


def unpatch(model: Model) -> Model:
    """Give the model its own residual connections back, in place; the scheme's parameters are dropped.

    Exact where the host's weights were not trained in between: what `init` had multiplied is put back from the
    originals; weights that were trained since are divided by the gain.
    """
    host = find_host(model)
    if sharded(model):
        raise ValueError(f"this {type(model).__name__} is sharded (FSDP); unpatch the model before it is sharded")
    if not is_patched(model):
        raise ValueError(f"this {type(model).__name__} is not patched; resformer.patch(model, scheme) patches it")
    detach(host)
    unmark(model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether any layer of the model carries a scheme."""
    return settings_of(model) is not None


def restore(model: nn.Module, settings: dict[str, Any]) -> None:
    """Patch a model whose weights are still to come: nothing is drawn, edited or probed. For loading."""
    host = find_host(model)
    recorded = _chosen(settings["layers"])
    absent = {}
    if isinstance(recorded, dict):  # a part of an encoder-decoder counts what it counted in the whole
        present = [stack.spec.name for stack in host.stacks]
        absent = {name: list(layers) for name, layers in recorded.items() if name not in present}
        recorded = {name: layers for name, layers in recorded.items() if name in present}
        if not recorded:
            raise ValueError(
                f"of this checkpoint only the {' and '.join(absent)} is patched, which a {type(model).__name__} has "
                "not; load it with a class that has both stacks and unpatch it"
            )
    chosen = choose_layers(host, recorded) | absent
    plan = make_plan(
        host, settings["scheme"], settings["init"], settings["placement"], chosen, settings["options"], check=False
    )
    attach(host, plan, edit_weights=False)
    mark(model, settings)


def _recorded(chosen: Chosen, *, by_stack: bool) -> Any:
    """The layers as config.resformer has them: a list [first, last + 1] or, with gaps, of all; by stack where there are
    two."""
    found = {
        name: [numbers[0], numbers[-1] + 1] if len(numbers) == numbers[-1] - numbers[0] + 1 else {"numbers": numbers}
        for name, numbers in chosen.items()
    }
    return found if by_stack else next(iter(found.values()))


def _chosen(recorded: Any) -> Any:
    if isinstance(recorded, dict) and "numbers" not in recorded:
        return {name: _chosen(layers) for name, layers in recorded.items()}
    if isinstance(recorded, dict):
        return recorded["numbers"]
    return None if recorded is None else range(*recorded)


@contextmanager
def counted(plan: Plan) -> Iterator[dict[str, int]]:
    """How often each site of a plan that is attached is visited meanwhile, by stack, layer and site."""
    visits: dict[str, int] = {}
    schemes: list[Any] = []
    for part in plan.stacks:
        for number, own in part.residuals.items():
            for name in own.acts:
                scheme, key = getattr(own, name), f"{part.stack.spec.name} layer {number}, {name}"
                visits[key] = 0
                scheme.step = functools.partial(_count, visits, key, scheme.step)
                schemes.append(scheme)
    try:
        yield visits
    finally:
        for scheme in schemes:
            del scheme.step


@contextmanager
def _called(plan: Plan) -> Iterator[dict[str, int]]:
    """How often each projection that a scheme of the plan acts inside of is called meanwhile."""
    calls: dict[str, int] = {}
    hooks = []
    for part in plan.stacks:
        for number, own in part.residuals.items():
            for site in part.stack.sites(part.stack.layers[number]):
                for point in set(getattr(own, site.name).points) & set(site.points) if not site.when else ():
                    path = site.points[point].path
                    where = f"{path!r} of layer {number}"
                    calls[where] = 0
                    module: Any = find(part.stack.layers[number], path)
                    hooks.append(module.register_forward_pre_hook(functools.partial(_call, calls, where)))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _call(calls: dict[str, int], where: str, module: nn.Module, args: Any) -> None:
    calls[where] += 1


def _count(visits: dict[str, int], key: str, step: Any, *given: Any) -> Any:
    visits[key] += 1
    return step(*given)


def _check_visits(host: Host, visits: dict[str, int]) -> None:
    """A forward pass comes once by each site (by cross-attention only if it is given states, as the probe may not)."""
    wrong = {key: times for key, times in visits.items() if times != 1 and not (key.endswith("cross") and times == 0)}
    if wrong:
        key, times = next(iter(wrong.items()))
        who, mend = misfit(host)
        raise ValueError(
            f"{who}: a forward pass comes {times} times by {key}, and once is expected (in all {len(wrong)} of "
            f"{len(visits)} sites differ). {mend}"
        )


def attach(host: Host, plan: Plan, *, edit_weights: bool = True) -> None:
    """Carry the plan out."""
    scaled = {part.stack.spec.name for part in plan.stacks if 0 in part.residuals}
    others = [stack for stack in host.stacks if stack.spec.name not in scaled]
    tables = [find(stack.root, path) for stack in others for path in stack.spec.embeddings]
    embedded = {id(table.weight) for table in tables if table is not None}
    for part in plan.stacks:
        _attach_stack(host, part, edit_weights, embedded)
    freeze(host, True)
    repeating = [scheme for own in plan.residuals for scheme in own.schemes if scheme.repeats]
    if repeating:
        refuse: Any = functools.partial(refuse_attentions, repeating[0].name)
        host.base.register_forward_pre_hook(refuse, with_kwargs=True)
        plan.residuals[0].switched_off_cache = _switch_off_cache(host.model)


def _attach_stack(host: Host, part: StackPlan, edit_weights: bool, embedded: set[int]) -> None:
    """`embedded`: embeddings that are not scaled (any more), for layers that are not patched read them, or an earlier
    stack that shares them has."""
    stack, spec = part.stack, part.stack.spec
    for number, own in part.residuals.items():
        layer: Any = stack.layers[number]
        if not stack.shared:
            layer.resformer = own
        elif not hasattr(layer, "resformer"):
            layer.resformer = Calls({n: one for n, one in part.residuals.items() if stack.layers[n] is layer})
        own.frozen = [path for path in own.frozen if find(layer, path).requires_grad]
        own.trained = _trained(layer, own)
        for site in stack.sites(layer):
            scheme = getattr(own, site.name)
            for point in scheme.points:
                for projection in site.points[point].every if point in site.points else ():
                    _hook(stack, layer, site.name, point, projection)
            prepare_branch(layer, site, scheme)
            for role, gain in scheme.edits().items():
                if role == "embed" and number:
                    continue  # what layers below a range read is not the scheme's
                for edit in edits_of(stack, layer, site, role, gain):
                    if role == "embed":
                        shared = id(find(stack.root, edit.path))
                        if shared in embedded:
                            continue
                        embedded.add(shared)
                    if edit_weights or role == "sum":  # a norm's eps is no weight: no checkpoint brings it
                        multiply(stack.root if role == "embed" else layer, edit)
                    own.edited.append(edit)
        if not swapped(layer, "layer"):
            swap(layer, "layer", host.family.name, spec.name)
    if spec.returns:
        loop: Any = find(stack.root, spec.layers.rpartition(".")[0]) if "." in spec.layers else stack.root
        loop.register_forward_hook(show_states)
    if part.final_norm != "kept":
        norm: Any = find(stack.root, spec.final_norm)
        last = max(part.residuals)
        if part.final_norm == "moved":
            closing: Any = stack.layers[last]
            closing.resformer_readout = (norm,)  # in a tuple: the norm stays the model's own child
        else:
            own = part.residuals[last]
            own.bypassed = [name for name, parameter in norm.named_parameters() if parameter.requires_grad]
        swap(norm, "norm")


def prepare_branch(layer: nn.Module, site: Site, scheme: Any) -> None:
    """Where a site's modules also add and norm, or its scheme acts on the values of attention, have them serve it."""
    for one in site.parts or (site,):
        if "values" in scheme.points and attends(one):
            route(attending(find(layer, one.calls[0])))
        if one.ends:
            module: Any = find(layer, one.calls[0])
            inner = f"{one.calls[0]}."
            if not swapped(module, "bare"):
                (norm,) = one.norms.values()
                swap(module, "bare", one.ends.removeprefix(inner), norm.removeprefix(inner))


def _switch_off_cache(model: nn.Module) -> list[str]:
    """Paths of the configurations that had a KV cache on, and have it off now."""
    paths = []
    for path, module in model.named_modules():
        for name in ("config", "generation_config"):
            config: Any = vars(module).get(name)
            if getattr(config, "use_cache", False) is True:
                config.use_cache = False
                paths.append(f"{path}.{name}".removeprefix("."))
    return paths


def freeze(host: Host, frozen: bool) -> None:
    """Stop or resume training the norms that the scheme leaves unused; loading a checkpoint makes all trainable."""
    for stack in host.stacks:
        for number, own in stack.residuals().items():
            for path in own.frozen:
                find(stack.layers[number], path).requires_grad_(not frozen)
            for name in own.bypassed:
                find(stack.root, f"{stack.spec.final_norm}.{name}").requires_grad_(not frozen)


def _trained(layer: Any, own: Residual) -> bool:
    """Whether any parameter of the host in this layer is trained, other than what patching froze."""
    others = ((name, p) for name, p in layer.named_parameters() if not name.startswith("resformer."))
    return any(p.requires_grad for name, p in others if name not in own.frozen)


def detach(host: Host, *, edit_weights: bool = True) -> None:
    """Undo `attach`, also one that stopped half-way; without `edit_weights` the weights stay as they are now."""
    for stack in host.stacks:
        for number, own in stack.residuals().items():
            if own.trained and not _trained(stack.layers[number], own):  # frozen as a whole since, and stays so
                own.frozen = own.bypassed = []
    freeze(host, False)
    _unhook(host.base)
    for stack in reversed(host.stacks):
        _detach_stack(host, stack, edit_weights)


def _detach_stack(host: Host, stack: HostStack, edit_weights: bool) -> None:
    for number, own in reversed(stack.residuals().items()):
        for edit in reversed(own.edited):
            if edit_weights or edit.role == "sum":
                divide(stack.root if edit.role == "embed" else stack.layers[number], edit)
        for path in own.switched_off_cache:
            find(host.model, path).use_cache = True
    for layer in stack.layers:
        if not hasattr(layer, "resformer"):
            continue
        for module in layer.modules():
            _unhook(module)
            unroute(module)
            if swapped(module, "bare"):
                swap_back(module)
        if host_class(layer) is not type(layer):
            swap_back(layer)
        del layer.resformer
        if hasattr(layer, "resformer_readout"):
            del layer.resformer_readout
    for module in stack.root.modules():
        _unhook(module)
    if stack.spec.final_norm:
        swap_back(find(stack.root, stack.spec.final_norm))


def _hook(stack: HostStack, layer: nn.Module, site: str, point: str, projection: Projection) -> None:
    module, path = find(layer, projection.path), projection.path
    if point in ("o", "down"):
        module.register_forward_pre_hook(functools.partial(before_projection, layer, site, point, path))
    else:
        slices = projection.part, projection.parts, groups_of(stack, layer, projection)
        module.register_forward_hook(functools.partial(after_projection, layer, site, point, path, *slices))


def _unhook(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook is show_states or getattr(hook, "func", None) in HOOKS:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def mark(model: nn.Module, settings: dict[str, Any]) -> None:
    """Say how the model is patched, and have it saved so; also when it was marked before."""
    for module in model.modules():
        if isinstance(module, Residual):
            module.settings = settings
        elif isinstance(module, PreTrainedModel):
            module.config.resformer = settings  # for people and trackers; what is saved is that of the layers


def unmark(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module.config, "resformer"):
            del module.config.resformer
