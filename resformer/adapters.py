"""What PEFT is taught about patched models: that their schemes are trained and saved with an adapter, or not.

PEFT freezes all that is not its own. `modules_to_save=["resformer"]` in its configuration trains the parameters of
the scheme too, and puts them into the adapter's file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.utils import is_peft_available

from resformer.layer import Residual, settings_of
from resformer.saving import teach


def check_adapter(model: nn.Module, config: Any) -> None:
    """A warning where a scheme would not be trained or saved, a `ValueError` where one is missing."""
    saved = "resformer" in (getattr(config, "modules_to_save", None) or ())
    settings = settings_of(model)
    if saved and settings is None:
        raise ValueError(
            f"this adapter was made for a patched model, and this {type(model).__name__} is not patched; call "
            "resformer.patch(model, scheme) as it was then, and load the adapter after it"
        )
    parts = [module for module in model.modules() if isinstance(module, Residual)]
    count = sum(p.numel() for part in parts for p in part.parameters())
    if settings is not None and count and not saved and not config.inference_mode:
        warnings.warn(
            f"the {count:,} parameters that scheme {settings['scheme']!r} added will not be trained, and are not "
            'saved with the adapter; to do both, configure it with modules_to_save=["resformer"]',
            stacklevel=2,
        )


def check_weights(model: nn.Module, expected: set[str], saved: set[str]) -> None:
    """A `ValueError` where the parameters of schemes in an adapter's file are not those of the model."""
    if expected != saved:
        name = (settings_of(model) or {}).get("scheme")
        more, less = sorted(saved - expected)[:2], sorted(expected - saved)[:2]
        raise ValueError(
            f"this adapter was made for a model patched in another way: for scheme {name!r}, as here, its file lacks "
            f"{less or 'nothing'} and has {more or 'nothing'} too much; patch the base model as it was then, or load "
            "its checkpoint with resformer.from_pretrained"
        )


if is_peft_available():
    import peft.peft_model
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.other import AuxiliaryTrainingWrapper

    @teach(peft.peft_model)
    def set_peft_model_state_dict(
        original: Callable, model: nn.Module, weights: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        adapter = kwargs.get("adapter_name", args[0] if args else "default")
        ours = {
            f"{path}.{key}"
            for path, module in model.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper) and path.endswith(".resformer")
            for key in module.adapter_state_dict_load_map(adapter)
        }
        check_weights(model, ours, {key for key in weights if ".resformer." in key})
        return original(weights, *args, **kwargs)

    @teach(BaseTuner)
    def inject_adapter(
        original: Callable, tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        check_adapter(model, tuner.peft_config[adapter_name])
        original(model, adapter_name, *args, **kwargs)
