"""How a patched model is saved, so that nothing loads it as the unpatched host by mistake.

On disk the configuration says `model_type: "resformer"`, which `AutoModel*` refuses unless resformer is installed
in it or remote code is trusted, and the weights carry a variant name, which the concrete class does not find. In
memory the host's configuration stays as it is, since tokenizers and PEFT read its model type.

Importing this module teaches `PreTrainedModel.save_pretrained` to do so. A model is known by the
schemes on its layers, not by its class or configuration, which it may share with others; without them nothing changes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from resformer.grouped import GroupedIntermediate
from resformer.host import find_host
from resformer.layer import settings_of

VARIANT = "resformer"
MODEL_TYPE = "resformer"
WEIGHTS = f"model.{VARIANT}.safetensors"
INDEX = f"model.safetensors.index.{VARIANT}.json"
HOST_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
REMOTE_CODE = '''"""Loads this checkpoint through resformer (pip install resformer), which it was patched with."""

import resformer
from resformer.checkpoint import ResformerConfig as ResformerConfig

resformer.install()
'''


def teach(cls: Any) -> Callable[[Callable], None]:
    """Let a function with the name of a method, or of a function of a module that takes a model first, stand before it:
    it is given what it stands before, then the call's arguments."""

    def wrap(function: Callable) -> None:
        method = getattr(cls, function.__name__)

        @functools.wraps(method)
        def taught(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(functools.partial(method, self), self, *args, **kwargs)

        setattr(cls, function.__name__, taught)

    return wrap


@teach(PreTrainedModel)
def save_pretrained(
    original: Callable, model: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
) -> None:
    settings = settings_of(model)
    if settings is None:
        if any(isinstance(module, GroupedIntermediate) for module in model.modules()):
            raise ValueError(
                f"this {type(model).__name__} has feed-forwards of build_encoder(cardinality=...) and no scheme, so "
                "no class would load it; resformer.patch(model, 'identity') makes it one that is saved as patched"
            )
        with _unmarked(model.config):
            return original(save_directory, is_main_process, *args, **kwargs)
    _check_whole(model)
    check_directory(Path(save_directory))
    original(save_directory, is_main_process, *args, **{"variant": VARIANT} | kwargs)
    if is_main_process:
        mark_config(Path(save_directory), settings)
    return None


@contextmanager
def _unmarked(config: PretrainedConfig) -> Iterator[None]:
    """Without the mark of a patched model that was made from the same configuration object."""
    mark = vars(config).pop("resformer", None)
    try:
        yield
    finally:
        if mark is not None:
            config.resformer = mark


def _check_whole(model: Any) -> None:
    """A `ValueError` for a part of a patched model, and for a model of which an inner one is patched that loading would
    not find."""
    try:
        found = any(stack.residuals() for stack in find_host(model).stacks)
    except ValueError:
        held = any(isinstance(part, PreTrainedModel) for part in list(model.modules())[1:])
        if not held:
            raise ValueError(
                f"this {type(model).__name__} is a part of a patched model, and no family describes it by itself; "
                "save the whole model"
            ) from None
        found = False
    if not found:
        raise ValueError(
            f"only a part of this {type(model).__name__} is patched, and no class would load the whole with it; "
            "save the patched part by itself, or unpatch it"
        )


def check_directory(directory: Path) -> None:
    """A `ValueError` if weights of an unpatched model lie there: the concrete class would load those, in silence."""
    left = [name for name in HOST_WEIGHTS if (directory / name).exists()]
    if left:
        raise ValueError(
            f"{str(directory)!r} holds a model that is not patched ({left[0]}), which transformers would load; "
            "save to another directory, or delete those weights first"
        )


def mark_config(directory: Path, settings: dict[str, Any]) -> None:
    """Rewrite config.json to the type that only resformer loads, and lay the remote code beside it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": MODEL_TYPE, "auto_map": {"AutoConfig": "modeling_resformer.ResformerConfig"}}
    path.write_text(json.dumps(config | {"resformer": settings}, indent=2, sort_keys=True) + "\n")
    (directory / "modeling_resformer.py").write_text(REMOTE_CODE)
