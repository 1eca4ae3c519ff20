"""Let a scheme change the values that a host's attention uses, after the KV cache has been joined to them.

transformers' attention modules take the function that attends from their configuration's `_attn_implementation` and
hand it all keyword arguments that they do not know. So the layer passes what is to be done with the values as one of
those, and a function registered here takes it out, does it and goes on with the function that the host asks for. To
get there each such module has its configuration behind a `Routed`, which differs in that one name: the
configuration itself stays as it is, for it also decides how masks are made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VALUES = "resformer_values"  # the keyword argument, and the name of the function
IMPLEMENTATION = "_attn_implementation"  # what configurations call the name of the host's own


class Routed:
    """A configuration that names our function; all else is the host's own."""

    def __init__(self, config: Any, eager: Callable[..., Any]):
        self.config, self.eager = config, eager

    @property
    def _attn_implementation(self) -> str:
        return VALUES

    def __getattr__(self, name: str) -> Any:
        if name in ("config", "eager") or name.startswith("__"):  # asked for by copy and pickle, before they are there
            raise AttributeError(name)
        return getattr(self.config, name)


class Values:
    """What is to be done with the values, once."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function, self.done = function, False

    def __call__(self, v: Tensor) -> Tensor:
        self.done = True
        return self.function(v)

    def check(self, layer: nn.Module, site: str) -> None:
        if not self.done:
            raise RuntimeError(
                f"the {site!r} sublayer of {type(layer).__name__} attended without asking for its values: its "
                "attention module was exchanged after patching, or this transformers computes attention in another "
                "way; patch the model anew, or take a scheme that does not act on values"
            )


class _Unrouted:
    """An attention module with the host's own configuration, for functions that read it (flash attention)."""

    def __init__(self, module: nn.Module, config: Any):
        self.module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    """The registered function: the values changed, then the host's own attention."""
    change = given.pop(VALUES, None)
    if change is not None:
        value = change(value)
    config = module.config.config
    if config._attn_implementation == "eager" and getattr(module, "reorder_and_upcast_attn", False):  # GPT-2's own
        return module._upcast_and_reordered_attn(query, key, value, mask)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, module.config.eager)
    return function(_Unrouted(module, config), query, key, value, mask, **given)


AttentionInterface.register(VALUES, attend)


def attending(module: nn.Module) -> nn.Module:
    """The module that attends: this one, or the one inside it that has the configuration (T5)."""
    return next((part for part in module.modules() if hasattr(getattr(part, "config", None), IMPLEMENTATION)), module)


def route(module: Any) -> None:
    """Lead the attention of a module through `attend`."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None or not hasattr(getattr(module, "config", None), IMPLEMENTATION):
        raise ValueError(
            f"{type(module).__name__} does not take its attention from transformers' AttentionInterface, so a scheme "
            "cannot act on its values; take a scheme without the point 'values'"
        )
    if not isinstance(module.config, Routed):
        module.config = Routed(module.config, eager)


def unroute(module: Any) -> None:
    """Undo `route`, on a module that may be without."""
    if isinstance(config := getattr(module, "config", None), Routed):
        module.config = config.config
