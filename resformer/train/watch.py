"""What each layer's scheme does while it trains: a look at one step in many, so that it costs next to nothing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from resformer.files import finite
from resformer.layer import Residual
from resformer.schemes.base import Branch


@contextmanager
def watched(model: nn.Module, every: int | None, log: Path | None, begin: int) -> Iterator[Callable[[int], None]]:
    """Within, call the function given after each step: of each `every`-th it writes a line to `log`.

    A line has the step and for each site of each patched layer the ratio of the root mean squares of the branch's
    output and of what the branch read (on the examples of the main process), and the mean of each parameter of its
    scheme. Nothing if `every` is None or the model is not patched; every process looks, and the main one writes (`log`
    None on others).
    """
    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, Residual)]
    if every is None or not layers:
        yield lambda step: None
        return
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def open_eyes() -> None:
        for name, own in layers:
            for site in own.acts:
                scheme = getattr(own, site)
                scheme.step = functools.partial(_step, seen, f"{name}.{site}", scheme.step)

    def close_eyes() -> None:
        for _, own in layers:
            for site in own.acts:
                vars(getattr(own, site)).pop("step", None)

    def after(step: int) -> None:
        if step % every == 0:
            close_eyes()
            sites = _sites(layers, seen)  # on every process: parameters may be sharded
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(finite({"step": step, "sites": sites})) + "\n")
            seen.clear()
        if (step + 1) % every == 0:
            open_eyes()

    if (begin + 1) % every == 0:
        open_eyes()
    try:
        yield after
    finally:
        close_eyes()


def _step(seen: dict[str, tuple[Tensor, Tensor]], where: str, step: Any, s: Any, branch: Branch, norm: Any) -> Any:
    def watched_branch(x: Tensor, *rest: Any) -> Tensor:
        y = branch(x, *rest)
        with torch.no_grad():
            seen[where] = (y.detach().float().square().mean(), x.detach().float().square().mean())
        return y

    return step(s, replace(branch, function=watched_branch), norm)


def _sites(layers: list[tuple[str, Residual]], seen: dict[str, tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    found = []
    for number, (name, own) in enumerate(layers):
        for site in own.acts:
            entry: dict[str, Any] = {"layer": number, "site": site}
            if f"{name}.{site}" in seen:
                written, read = seen[f"{name}.{site}"]
                entry["branch_to_stream"] = float((written / read).sqrt())
            entry |= {key: _mean(p) for key, p in getattr(own, site).named_parameters()}
            found.append(entry)
    return found


def _mean(p: Tensor) -> float:
    whole: Tensor = p.full_tensor() if isinstance(p, DTensor) else p
    return float(whole.detach().float().mean())
