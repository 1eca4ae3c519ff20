"""Gradient flow: how the gradient of the loss changes from the top of the stack to the bottom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resformer.diagnostics.lines import Fit, fit_log
from resformer.diagnostics.measured import Column, Measured, Row
from resformer.diagnostics.observe import (
    Batch,
    check_batch,
    check_depth,
    check_loss,
    loss_of,
    norm_of,
    observed,
    text,
    watching,
    wide,
)
from resformer.host import Host, HostStack, find_host
from resformer.layer import find
from resformer.schemes.base import Branch, Norm, Stream
from resformer.sites import Connection, Step, after_layers, carried, connections, intercepted, like, readable

FACTOR = 100.0  # from top to bottom, by the fitted rate, from which gradients are said to vanish or explode

COLUMNS = (
    Column("stream", "gradient norm in all that is carried to the site", "loss / state", log=True),
    Column("branch", "gradient norm in what the branch gives", "loss / state", log=True),
    Column("parameters", "gradient norm in the weights of the branch and its norms", "loss / weight", log=True),
    Column("relative", "that, times the norm of the weights themselves", "loss", shown=False, log=True),
    Column("scheme", "gradient norm in the scheme's own parameters", "loss / weight", shown=False, log=True),
    Column("per_token", "mean over tokens of what one gives the last projection", "loss / weight", log=True),
)


def gradient_flow(model: nn.Module, batch: Batch) -> Measured:
    """Gradient norms of the loss by layer and site, in the stream, in the branches and in their weights.

    Of each residual connection, with s all that is carried to it and y what its branch gives:

    stream = ‖∂loss/∂s‖, branch = ‖∂loss/∂y‖, parameters = ‖∂loss/∂θ‖ for the weights θ of the branch and its norms,
    per_token = mean_t ‖h_t‖ ‖∂loss/∂z_t‖ with z_t = W h_t + b the branch's last projection at token t: the norm of
    what one token adds to ∂loss/∂W. The norm of the sum over tokens grows as tokens become alike, this one does not.

    A row "end" holds the stream as it leaves the stack. Norms are over the whole batch, padding included, which a loss
    does not see; per_token is over text. In evaluation mode (no dropout); no gradient is left on any parameter.

    facts, for each stack: `rate` = exp(b) of the least squares line log ‖∂loss/∂s‖ = a - b l, over the sites l counted
    in layers, the factor by which the gradient changes over one layer on its way down, with `rate_error`; `verdict`
    "vanishing" or "exploding" where that makes a factor of 100 over the stack and is more than two standard errors
    from none, "not finite", "zero", or else "stable". It says what gradients do, not whether the net trains: norms
    inside a branch hide a collapse of tokens from it.

    Raises a ValueError for a model without a loss, fewer than two layers, a batch of other keys, and `NotFiniteError`
    where activations are NaN.

    Reference   Glorot & Bengio 2010; per-token norms under Xiong et al. 2020, arXiv:2002.04745, theorem 1
    """
    check_batch(model, batch)
    check_loss(model, batch)
    norms: dict[tuple[Any, ...], Tensor] = {}
    tokens: dict[tuple[Any, ...], list[Tensor]] = {}

    def keep(key: tuple[Any, ...], tensor: Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda g: _add(norms, key, g))

    def around(at: Connection, step: Step, s: Any, branch: Branch, norm: Norm) -> Stream:
        # a node of its own for each tensor: of two carried on, one may have been made from the other
        tapped = tuple(tensor.view_as(tensor) for tensor in carried(s))
        for tensor in tapped:
            keep((*at.key, "stream"), tensor)

        def watched(x: Tensor, *rest: Any) -> Tensor:
            y = branch(x, *rest)
            keep((*at.key, "branch"), y := y.view_as(y))
            return y

        handles = [_projection(module, at, tokens, batch, host) for module in _last_projections(at)]
        try:
            return step(like(s, tapped), Branch(watched, branch.mask, branch.depends), norm)
        finally:
            for handle in handles:
                handle.remove()

    def end(stack: HostStack, layer: int, output: Any) -> Any:
        if layer < len(stack.layers) - 1:
            return None
        state = readable(output)
        keep((stack.spec.name, len(stack.layers), "end", "stream"), tapped := state.view_as(state))
        return (tapped, *output[1:]) if isinstance(output, tuple) else tapped

    with observed(model, batch, gradients=True) as host:
        check_depth(host, "gradient_flow")
        with intercepted(host, around), after_layers(host, end), watching(host):
            loss = loss_of(model, batch)
            weights = {p: None for p in model.parameters() if p.requires_grad}
            found = torch.autograd.grad(loss, list(weights), allow_unused=True)
        given = {id(p): g for p, g in zip(weights, found, strict=True)}
        rows, facts = [], {"loss": float(loss.detach())}
        for stack in host.stacks:
            here = [_row(at, norms, tokens, given) for at in connections(host) if at.stack is stack]
            here.append(_row_of((stack.spec.name, len(stack.layers), "end"), norms))
            facts |= _verdict(stack, here, len(host.stacks) > 1)
            rows += here
    return Measured(
        "gradient_flow",
        "Gradient norms by layer",
        COLUMNS,
        rows,
        facts,
        draws=("stream", "parameters", "per_token"),
    )


def _add(norms: dict[tuple[Any, ...], Tensor], key: tuple[Any, ...], g: Tensor) -> None:
    norms[key] = torch.hypot(norms[key], norm_of(g)) if key in norms else norm_of(g)


def _norm_at(norms: dict[tuple[Any, ...], Tensor], key: tuple[Any, ...], what: str = "stream") -> float:
    return float(norms.get((*key, what), 0.0))  # what the loss does not depend on has none


def _row_of(key: tuple[Any, ...], norms: dict[tuple[Any, ...], Tensor]) -> Row:
    return {"stack": key[0], "layer": key[1], "site": key[2], "stream": _norm_at(norms, key)}


def _row(
    at: Connection, norms: dict[tuple[Any, ...], Tensor], tokens: dict[tuple[Any, ...], list[Tensor]], given: Any
) -> Row:
    key, weights, own = at.key, _weights(at), list(at.scheme.parameters())
    row = _row_of(key, norms) | {"branch": _norm_at(norms, key, "branch")}
    row["parameters"] = _together([given.get(id(p)) for p in weights])
    row["relative"] = row["parameters"] * _together(weights)
    row["scheme"] = _together([given.get(id(p)) for p in own]) if own else None
    several = tokens.get(key)  # with attention and feed-forward side by side, of both
    row["per_token"] = float(torch.stack(several).norm(dim=0).mean()) if several else None
    return row


def _weights(at: Connection) -> list[Tensor]:
    """Of the modules that a site calls and of its norms; of a block those of the layer; without the scheme's."""
    if at.spec is None:
        modules: list[Any] = [child for name, child in at.module.named_children() if name != "resformer"]
    else:
        parts = at.spec.parts or (at.spec,)
        found = [find(at.module, path) for part in parts for path in part.calls]
        modules = [one for one in (*found, *at.norms.values()) if isinstance(one, nn.Module)]
    scheme = {id(p) for p in at.scheme.parameters()}
    every = {id(p): p for module in modules for p in module.parameters() if id(p) not in scheme}
    return list(every.values())


def _last_projections(at: Connection) -> list[Any]:
    points = at.spec.points if at.spec is not None else {}
    return [find(at.module, points[role].path) for role in ("o", "down") if role in points]


def _projection(
    module: Any, at: Connection, tokens: dict[tuple[Any, ...], list[Tensor]], batch: Batch, host: Host
) -> Any:
    def after(module: Any, args: Any, output: Any) -> Any:
        if not (isinstance(output, Tensor) and output.requires_grad):
            return None
        inputs = _by_row(args[0])
        states = output if output.ndim == 3 else None  # OPT flattens its tokens
        mask = None if states is None else text(host, at.stack, batch, states)

        def given(g: Tensor) -> None:
            norms = inputs * _by_row(g)
            tokens.setdefault(at.key, []).append(norms if mask is None else norms[mask.flatten()])

        tapped = output.view_as(output)
        tapped.register_hook(given)
        return tapped

    return module.register_forward_hook(after)


def _together(tensors: Sequence[Tensor | None]) -> float:
    """The norm of all; one that the loss does not depend on adds nothing."""
    norms = [norm_of(tensor) for tensor in tensors if tensor is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _by_row(x: Tensor) -> Tensor:
    """(... D) -> (N), the norm of each row."""
    rows = x.detach().flatten(0, -2)
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32 if x.device.type == "mps" else torch.float64)


def _verdict(stack: HostStack, rows: list[Row], two: bool) -> dict[str, Any]:
    """The fitted rate of a stack, and what it comes to; rows from the bottom up."""
    ahead = f"{stack.spec.name}_" if two else ""
    sites = max(1, (len(rows) - 1)) / len(stack.layers)
    norms = [row["stream"] for row in rows]
    if not all(map(math.isfinite, norms)):
        return {f"{ahead}verdict": "not finite"}
    line = fit_log([number / sites for number in range(len(norms))], norms)
    if line is None:
        return {f"{ahead}verdict": "zero"}
    return {
        f"{ahead}rate": math.exp(-line.slope),
        f"{ahead}rate_error": math.exp(-line.slope) * line.error,
        f"{ahead}verdict": verdict(line, len(stack.layers)),
    }


def verdict(line: Fit, layers: int) -> str:
    """Of the line through log gradient norms, by layer from the bottom up."""
    change = -line.slope * layers  # in log, from the top to the bottom
    if abs(change) < math.log(FACTOR) or abs(line.slope) < 2 * line.error:
        return "stable"
    return "exploding" if change > 0 else "vanishing"


def gradient_norms(model: PreTrainedModel, batch: dict[str, Any]) -> list[float]:
    """‖∂loss / ∂s_l‖ for what the layers hand on, s_0 (embedding) to s_L, in the unit of the loss per unit of state.

    s_l is all that is carried from layer l to the next, so with several streams or a history the norm is over all of
    these tensors together. Dropout is off, no parameter keeps a gradient, and the model, of a known family, is left
    as it was. The batch has labels.
    """
    host = find_host(model)
    if len(host.stacks) > 1 or host.stacks[0].shared or host.stacks[0].spec.returns:
        raise ValueError(
            f"gradient_norms is for models of one stack whose layers return their states alone, and family "
            f"{host.family.name!r} is not one of them"
        )
    layers = host.layers
    mode, required = model.training, [(p, p.requires_grad) for p in model.parameters()]
    carried: list[tuple[Tensor, ...]] = []

    def tap(stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # a node of its own for each tensor: of two carried on, one may have been made from the other
        carried.append(tuple(tensor.view_as(tensor) for tensor in stream))
        return carried[-1]

    def after(module: Any, args: Any, output: Any) -> Any:
        # a tuple begins with the readable state, which is not on the way to the loss
        return (output[0], *tap(output[1:])) if isinstance(output, tuple) else tap((output,))[0]

    hooks = [layers[0].register_forward_pre_hook(lambda _, args: (*tap(args[:1]), *args[1:]))]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    model.eval()
    try:
        for p, _ in required:
            p.requires_grad_(True)  # a frozen embedding would cut the graph
        loss = model(**batch).loss
        flat = [tensor for stream in carried for tensor in stream]
        gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    finally:
        for hook in hooks:
            hook.remove()
        for p, flag in required:
            p.requires_grad_(flag)
        model.train(mode)
    return [_norm([next(gradients) for _ in stream]) for stream in carried]


def _norm(gradients: Sequence[Tensor | None]) -> float:
    """Of all together; a tensor that the loss does not depend on adds nothing."""
    return float(sum(wide(g).square().sum() for g in gradients if g is not None)) ** 0.5
