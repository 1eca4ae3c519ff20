"""How a patched model saves itself, so that nothing can load it as the unpatched host by mistake.

On disk the configuration says `model_type: "resformer"`, which `AutoModel*` refuses unless resformer is installed
in it or remote code is trusted, and the weights carry a variant name, which the concrete class does not find. In
memory the host's configuration stays as it is, since tokenizers and PEFT read its model type.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from resformer.swap import swap_kind

VARIANT = "resformer"
MODEL_TYPE = "resformer"
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


@swap_kind("model")
def _model_body(cls: type) -> dict[str, Any]:
    @functools.wraps(cls.save_pretrained)  # type: ignore[attr-defined]
    def save_pretrained(self: Any, save_directory: Any, *args: Any, variant: str = VARIANT, **kwargs: Any) -> None:
        check_directory(Path(save_directory))
        cls.save_pretrained(self, save_directory, *args, variant=variant, **kwargs)  # type: ignore[attr-defined]
        if kwargs.get("is_main_process", True):
            mark_config(Path(save_directory))

    return {"save_pretrained": save_pretrained}


def check_directory(directory: Path) -> None:
    """A `ValueError` if weights of an unpatched model lie there: the concrete class would load those, in silence."""
    left = [name for name in HOST_WEIGHTS if (directory / name).exists()]
    if left:
        raise ValueError(
            f"{str(directory)!r} holds a model that is not patched ({left[0]}), which transformers would load; "
            "save to another directory, or delete those weights first"
        )


def mark_config(directory: Path) -> None:
    """Rewrite config.json to the type that only resformer loads, and lay the remote code beside it."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": MODEL_TYPE, "auto_map": {"AutoConfig": "modeling_resformer.ResformerConfig"}}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / "modeling_resformer.py").write_text(REMOTE_CODE)
