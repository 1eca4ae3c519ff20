"""Which schemes a family of models can be patched with, found by planning it on a tiny model without weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoModel

from resformer.errors import unknown
from resformer.host import Host, find_host
from resformer.hosts import Family, families
from resformer.hosts.tiny import tiny_config
from resformer.plan import check_all_layers_run, choose_layers, make_plan
from resformer.schemes import Scheme, schemes


def refusal(family: str, scheme: str, init: str = "preserve") -> str | None:
    """Why models of a family are not patched with a scheme, or None if they are.

    Raises a ValueError for an unknown family, or one whose models cannot be made because it names no configuration.
    """
    return _refusal_in(_family(family), scheme, init)


@cache
def _refusal_in(family: Family, scheme: str, init: str) -> str | None:
    return _refusal_of(_tiny(family), scheme, init, None)


def refusals(host: Host, init: str = "preserve") -> dict[str, str | None]:
    """`refusal` for every scheme and the model at hand, of which the first two layers are planned where no tiny model
    stands for it."""
    mixed = any(len(stack.fitting) < len(stack.layers) for stack in host.stacks)
    if mixed or not can_be_made(host.family.name):
        few = {stack.spec.name: stack.fitting[:2] for stack in host.stacks}
        return {name: _refusal_of(host, name, init, few) for name in schemes()}
    return {name: refusal(host.family.name, name, init) or _broken(host, cls) for name, cls in schemes().items()}


def by_reason(refused: dict[str, str]) -> dict[str, list[str]]:
    """The names of schemes under what they are refused for, which is the same for several but for their names."""
    found: dict[str, list[str]] = {}
    for name, reason in refused.items():
        found.setdefault(reason.removeprefix(f"scheme {name!r} "), []).append(name)
    return found


def can_be_made(family: str) -> bool:
    """Whether a tiny model of a family can be made, to try schemes on."""
    try:
        _tiny(_family(family))
    except ValueError:
        return False
    return True


def _refusal_of(host: Host, scheme: str, init: str, layers: Any) -> str | None:
    try:
        with torch.random.fork_rng(devices=[]):  # some schemes draw their parameters
            make_plan(host, scheme, init, None, choose_layers(host, layers), {})
    except ValueError as error:
        return str(error)
    return None


def _broken(host: Host, cls: type[Scheme]) -> str | None:
    """Why a scheme that carries a stream cannot in this model, for what its family does not know: skipped layers."""
    if not cls.streams():
        return None
    try:
        for stack in host.stacks:
            check_all_layers_run(cls.name, stack, stack.fitting)
    except ValueError as error:
        return str(error)
    return None


def _family(name: str) -> Family:
    if name not in families():
        raise unknown("family", name, families(), listed="resformer hosts")
    return families()[name]


@cache
def _tiny(family: Family) -> Host:
    if not family.config:
        raise ValueError(
            f"family {family.name!r} names no `config`, from which a model could be made to try schemes on"
        )
    try:
        with torch.device("meta"):
            return find_host(AutoModel.from_config(tiny_config(family.name)))
    except Exception as error:  # of any kind: configurations check what they are given in their own ways
        raise ValueError(f"no tiny model of family {family.name!r} could be made to try schemes on: {error}") from error
