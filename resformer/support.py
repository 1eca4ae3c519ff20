"""Which schemes a family of models can be patched with, found by planning it on a tiny model without weights."""

from __future__ import annotations

from functools import cache

import torch
from transformers import AutoModel

from resformer.errors import unknown
from resformer.host import Host, find_host
from resformer.hosts import families
from resformer.plan import choose_layers, make_plan


@cache
def refusal(family: str, scheme: str, init: str = "preserve") -> str | None:
    """Why models of a family are not patched with a scheme, or None if they are.

    Raises a ValueError for an unknown family, or one whose models cannot be made because it names no configuration.
    """
    host = _tiny(family)
    try:
        make_plan(host, scheme, init, None, choose_layers(host, None), {})
    except ValueError as error:
        return str(error)
    return None


@cache
def _tiny(family: str) -> Host:
    from resformer.testing.hosts import tiny_config

    if family not in families():
        raise unknown("family", family, families())
    if not families()[family].config:
        raise ValueError(f"family {family!r} names no `config`, from which a model could be made to try schemes on")
    with torch.device("meta"):
        return find_host(AutoModel.from_config(tiny_config(family)))
