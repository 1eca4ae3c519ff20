"""Lesions: what the loss says when layers and branches are taken out or change places."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import Batch, check_batch, check_depth, check_loss, loss_of, observed, watching
from resformer.host import Host, HostStack
from resformer.schemes.base import Branch, Norm, Stream
from resformer.sites import Connection, Step, connections, intercepted

CAUSAL = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
Key = tuple[str, int, str]
Outputs = dict[tuple[str, int], Any]  # what a layer hands on, by stack and number

COLUMNS = (
    Column("branch", "change of the loss without what the branch gives", "loss"),
    Column("connection", "without the whole connection, its norm too", "loss"),
    Column("change", "of the loss", "loss", shown=False),
    Column("which", "the layers that were deleted, or all in their new order", shown=False),
    Column("deleted", "how many layers were deleted at random", shown=False),
    Column("swaps", "how many pairs of layers changed places", shown=False),
    Column("tau", "Kendall's rank correlation of the new order with the old", shown=False),
)


@torch.no_grad()
def lesion(
    model: nn.Module,
    batch: Batch | Sequence[Batch],
    *,
    branches: bool = True,
    draws: int = 4,
    seed: int = 0,
) -> Measured:
    """The change of the loss when a part of the stack is deleted, or when layers change places.

    Rows of one site: branch = the loss with y = 0 at this site less the loss of the whole, where the shortcut and the
    norm after the add act as before; connection = with s carried past the site unchanged, without that norm (in a
    pre-LN host the same; None where the scheme hands on another form of stream than it was given). Rows "block": the
    same for all sites of a layer together; with branches=False only these.
    Rows "random": change, when `deleted` layers drawn at random are deleted (as connections where all can be, else
    their branches). Rows "permuted": change, when `swaps` random pairs of layers have changed places, and Kendall's
    tau = 1 - 4 inversions / (n (n - 1)) of the new order of the n layers. Both for 1, 2, 4 ... layers or pairs up to
    half of the stack, `draws` times each; 0 leaves them out.

    The batch is one, or a list, whose losses are averaged, each weighted by how many labels it is the mean of. One
    forward pass of each batch for each row, two where branch and connection differ; of a single batch only from the
    first layer on that changes, since what the layers below hand on is kept. Evaluation mode.

    facts: the `loss` of the whole model; by stack the `median` and `largest` change over blocks, means over draws by
    number for `random` and `permuted`. Layers that differ from the last one in their weights' names keep their place
    (T5's first); where none may change places, `permuted` says why.

    Raises a ValueError for a model without a loss, fewer than two layers and batches of other keys.

    Reference   Veit et al. 2016, arXiv:1605.06431
    """
    batches = [batch] if isinstance(batch, Mapping) else list(batch)
    if not batches:
        raise ValueError("no batch was given to lesion; give one, or a list of them")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 0:
        raise ValueError(f"draws must be a whole number, 0 for none, got {draws!r}")
    for one in batches:
        check_batch(model, one)
        check_loss(model, one)
    generator = random.Random(seed)
    rows: list[Row] = []
    with observed(model, batches[0]) as host:
        check_depth(host, "lesion")
        forms: dict[Key, tuple[Any, Any]] = {}
        kept: Outputs = {}
        with intercepted(host, _forms(forms)), watching(host), _keeping(host, kept, len(batches) == 1):
            whole = _loss(model, batches, finite=True)
        facts: dict[str, Any] = {"loss": whole}

        def change(around: Any, stack: HostStack, first: int) -> float:
            with around, _repeated(host, stack, first, kept):
                return _loss(model, batches, finite=False) - whole

        for stack in host.stacks:
            ours = [at for at in connections(host) if at.stack is stack and at.key in forms]
            rows += _single(host, stack, ours, forms, change, branches)
            ahead = f"{stack.spec.name}_" if len(host.stacks) > 1 else ""
            blocks = [_least(row) for row in rows if row["stack"] == stack.spec.name and row["site"] == "block"]
            facts |= {f"{ahead}median": median(blocks), f"{ahead}largest": max(blocks)}
            if draws and len(stack.layers) > 1:
                deleted = _random(host, stack, ours, forms, change, draws, generator)
                facts[f"{ahead}random"] = _means(deleted, "deleted")
                permuted, why = _permuted(stack, change, draws, generator)
                facts[f"{ahead}permuted"] = why or _means(permuted, "swaps")
                rows += deleted + permuted
    points = (("change", "deleted"), ("change", "tau")) if draws else ()
    return Measured(
        "lesion", "Loss when parts are deleted", COLUMNS, rows, facts, draws=("branch", "connection", *points)
    )


def _least(row: Row) -> float:
    return row["branch"] if row["connection"] is None else row["connection"]


def _means(rows: list[Row], by: str) -> dict[str, float]:
    return {str(n): fmean(row["change"] for row in rows if row[by] == n) for n in sorted({row[by] for row in rows})}


def _loss(model: nn.Module, batches: list[Batch], *, finite: bool) -> float:
    weights = [_labels(model, one) for one in batches]
    losses = [float(loss_of(model, one, finite=finite)) for one in batches]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)


def _labels(model: nn.Module, batch: Batch) -> int:
    """How many labels a loss is the mean of; a causal model shifts them, so that nothing predicts the first ones."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point():
        causal = any(one.__name__ in CAUSAL for one in type(model).__mro__)
        return max(1, int((labels[:, 1:] if causal else labels).ne(-100).sum()))
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


@contextmanager
def _keeping(host: Host, kept: Outputs, wanted: bool) -> Iterator[None]:
    """Meanwhile what each layer hands on is kept, if wanted, of stacks whose layers are called once."""
    hooks = []
    for stack in host.stacks if wanted else ():
        for number, layer in enumerate(() if stack.shared else stack.layers):
            key = stack.spec.name, number
            hooks.append(layer.register_forward_hook(lambda _, args, out, key=key: kept.update({key: out})))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _repeated(host: Host, stack: HostStack, first: int, kept: Outputs) -> Iterator[None]:
    """Meanwhile the layers below that one of a stack, and the stacks before it, hand on what was kept of them."""
    changed: list[tuple[Any, Any]] = []
    try:
        for one in host.stacks[: host.stacks.index(stack) + 1]:
            for number, layer in enumerate(one.layers):
                if (one is not stack or number < first) and (one.spec.name, number) in kept:
                    changed.append((layer, vars(layer).get("forward")))
                    layer.forward = partial(_same, kept[one.spec.name, number])
        yield
    finally:
        for layer, before in changed:
            if before is None:
                del layer.forward
            else:
                layer.forward = before


def _same(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


def _forms(forms: dict[Key, tuple[Any, Any]]) -> Callable[..., Stream]:
    """Take down in what form the stream comes to each connection that runs, and leaves it."""

    def form(s: Any) -> Any:
        return tuple(t.shape for t in s) if isinstance(s, tuple) else s.shape

    def around(at: Connection, step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
        out = step(s, branch, norm)
        forms[at.key] = form(s), form(out)
        return out

    return around


def _without(host: Host, groups: list[list[Connection]], *, norms: bool) -> Any:
    """Meanwhile the connections of these groups of neighbours give nothing; norms: nor do their norms and shortcuts
    act. They run all the same, since layers may hand on more than states (T5's positions come from the first)."""
    gone = {at.key for group in groups for at in group}
    lasts = {group[0].key: group[-1].key for group in groups}
    kept: dict[Key, Any] = {}

    def around(at: Connection, step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
        if norms:
            if at.key in lasts:
                kept[lasts[at.key]] = s
            out = step(s, branch, norm)
            return kept.pop(at.key, out)
        if at.key not in gone:
            return step(s, branch, norm)

        def nothing(x: Tensor, *rest: Any) -> Tensor:
            return torch.zeros_like(branch(x, *rest))

        return step(s, replace(branch, function=nothing), norm)

    return intercepted(host, around)


def _single(
    host: Host,
    stack: HostStack,
    ours: list[Connection],
    forms: dict[Key, tuple[Any, Any]],
    change: Callable[[Any, HostStack, int], float],
    branches: bool,
) -> list[Row]:
    rows = []
    for layer in dict.fromkeys(at.layer for at in ours):
        here = [at for at in ours if at.layer == layer]
        groups = ({at.site: [at] for at in here} if branches else {}) | {"block": here}
        for site, group in groups.items():
            row: Row = {"stack": stack.spec.name, "layer": layer, "site": site}
            row["branch"] = change(_without(host, [group], norms=False), stack, layer)
            row["connection"] = None
            if _passable(group, forms):
                differs = any("post" in at.norms or at.scheme.name != "identity" for at in group)
                row["connection"] = (
                    change(_without(host, [group], norms=True), stack, layer) if differs else row["branch"]
                )
            rows.append(row)
    return rows


def _passable(group: list[Connection], forms: dict[Key, tuple[Any, Any]]) -> bool:
    """Whether what comes to the first of these neighbours has the form of what leaves the last."""
    return forms[group[0].key][0] == forms[group[-1].key][1]


def _numbers(most: int) -> list[int]:
    return [2**i for i in range(16) if 2**i <= most]


def _random(
    host: Host,
    stack: HostStack,
    ours: list[Connection],
    forms: dict[Key, tuple[Any, Any]],
    change: Callable[[Any, HostStack, int], float],
    draws: int,
    generator: random.Random,
) -> list[Row]:
    layers = list(dict.fromkeys(at.layer for at in ours))
    norms = all(_passable([at for at in ours if at.layer == layer], forms) for layer in layers)
    rows = []
    for number in _numbers(len(layers) // 2):
        for _ in range(draws):
            chosen = generator.sample(layers, number)
            gone = [[at for at in ours if at.layer == layer] for layer in chosen]
            row: Row = {"stack": stack.spec.name, "layer": None, "site": "random", "deleted": number}
            row["which"] = " ".join(map(str, sorted(chosen)))
            rows.append(row | {"change": change(_without(host, gone, norms=norms), stack, min(chosen))})
    return rows


def _permuted(
    stack: HostStack, change: Callable[[Any, HostStack, int], float], draws: int, generator: random.Random
) -> tuple[list[Row], str]:
    """The rows, or why there are none."""
    alike = _alike(stack)
    if isinstance(alike, str):
        return [], alike
    rows = []
    for swaps in _numbers(len(alike) // 2):
        for _ in range(draws):
            order = list(range(len(stack.layers)))
            chosen = generator.sample(alike, 2 * swaps)
            for a, b in zip(chosen[::2], chosen[1::2], strict=True):
                order[a], order[b] = order[b], order[a]
            row: Row = {"stack": stack.spec.name, "layer": None, "site": "permuted", "swaps": swaps, "tau": tau(order)}
            row["which"] = " ".join(map(str, order))
            rows.append(row | {"change": change(in_order(stack, order), stack, min(chosen))})
    return rows, ""


def tau(order: Sequence[int]) -> float:
    """Kendall's rank correlation of an order with 0, 1, 2 ..."""
    n = len(order)
    inversions = sum(order[i] > order[j] for i in range(n) for j in range(i + 1, n))
    return 1 - 4 * inversions / (n * (n - 1))


def _alike(stack: HostStack) -> list[int] | str:
    """The layers that can take each other's place, or why there are none."""
    if not isinstance(stack.layers, nn.ModuleList) or stack.shared:
        return "not measured: the layers are not in one list of their own"
    owns = stack.residuals()
    if any(type(scheme).streams() for own in owns.values() for scheme in own.schemes):
        return "not measured: the scheme carries a stream in which each layer has its place"
    ends = [one for own in owns.values() for one in ("final_norm", "embed_norm") if hasattr(own, one)]
    if ends or any(hasattr(layer, "resformer_readout") for layer in stack.layers):
        return "not measured: the scheme has a norm in the first or the last layer"
    names = [[name for name, _ in layer.named_parameters()] for layer in stack.layers]
    alike = [number for number in stack.fitting if names[number] == names[-1]]
    return alike if len(alike) > 1 else "not measured: no two layers are alike"


@contextmanager
def in_order(stack: HostStack, order: Sequence[int]) -> Iterator[None]:
    """Meanwhile layer `order[i]` runs as the i-th."""
    modules, layers = stack.layers._modules, list(stack.layers)
    try:
        for i, number in enumerate(order):
            modules[str(i)] = layers[number]
        yield
    finally:
        for i, layer in enumerate(layers):
            modules[str(i)] = layer
