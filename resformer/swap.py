"""Swap the class of a living module for a subclass, and back.

The subclass keeps the name, qualified name and module of the host's class: transformers finds what to record by
`str(class)`, and printing, wrapping policies and error messages stay as users know them. The object itself stays,
with its parameters, hooks and place in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

Body = Callable[..., dict[str, Any]]  # host class, and what else is given to `swap` -> what the subclass overrides

_BODIES: dict[str, Body] = {}
_CLASSES: dict[tuple, type] = {}


def swap_kind(kind: str) -> Callable[[Body], Body]:
    """Register how the subclass of one kind ("layer", "norm") is made."""

    def add(body: Body) -> Body:
        _BODIES[kind] = body
        return body

    return add


def swap(module: nn.Module, kind: str, *given: str) -> None:
    """Give the module the subclass of this kind. All its state is on the instance, so one class serves all models."""
    module.__class__ = _subclass(type(module), kind, *given)


def swap_back(module: nn.Module) -> None:
    """Undo `swap`."""
    module.__class__ = host_class(module)


def host_class(module: nn.Module) -> type:
    """The class a module had before `swap`, or has."""
    return getattr(type(module), "_resformer_host", type(module))


def _subclass(cls: type, kind: str, *given: str) -> type:
    if (cls, kind, *given) not in _CLASSES:
        body = _BODIES[kind](cls, *given)
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": _reduce}
        sub: Any = type(
            cls.__name__, (cls,), names | {"_resformer_host": cls, "_resformer_swap": (kind, *given)} | body
        )
        if (
            "forward" in body
        ):  # transformers wraps the forward of every new layer class; ours does its own checkpointing
            sub.forward = body["forward"]
        _CLASSES[cls, kind, *given] = sub
    return _CLASSES[cls, kind, *given]


def forget(kind: str, *given: str) -> None:
    """Make the subclasses of this kind anew, where what is `given` has another meaning now."""
    for key in [key for key in _CLASSES if key[1 : 2 + len(given)] == (kind, *given)]:
        del _CLASSES[key]


def swapped(module: nn.Module, kind: str) -> bool:
    """Whether the module has the subclass of this kind."""
    return getattr(type(module), "_resformer_swap", ("",))[0] == kind


def _rebuild(cls: type, *given: str) -> nn.Module:
    import_module("resformer.patching")  # in a fresh process: registers the kinds, and how patched models are saved
    sub: Any = _subclass(cls, *given)
    return sub.__new__(sub)


def _reduce(self: Any, protocol: Any) -> tuple:
    # pickle and deepcopy cannot find a class made at run time: name the host's class and the kind instead
    return _rebuild, (self._resformer_host, *self._resformer_swap), self.__dict__
