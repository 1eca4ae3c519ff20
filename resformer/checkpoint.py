"""Load patched models: one explicit door, and one that makes transformers' own doors do the same."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from resformer.errors import unknown
from resformer.grouped import group_feed_forward
from resformer.host import find_host
from resformer.hosts import families
from resformer.patching import VERSION, check_still_described, dtypes_of, freeze, probe_patched, restore
from resformer.saving import MODEL_TYPE, VARIANT
from resformer.schemes import find_scheme
from resformer.schemes.base import PLACEMENTS


def from_pretrained(path: Any, auto: type, **kwargs: Any) -> PreTrainedModel:
    """Load what a patched model's `save_pretrained` wrote, scheme and all; every weight bit for bit.

    Args:
        path: a directory, or a hub id.
        auto: `AutoModel`, `AutoModelForSequenceClassification` ..., or a concrete class.
        kwargs: for the class's own `from_pretrained` (dtype, device_map ...), or changes to the configuration
            (num_labels ...).

    Raises a ValueError if the checkpoint was not patched, comes from a newer resformer, names a scheme or an option
    that is not known here, or lacks parameters of the scheme.
    """
    config = kwargs.pop("config", None)
    if config is None:
        config, kwargs = _read(path, kwargs, auto)
    settings = getattr(config, "resformer", None)
    if settings is None:
        raise ValueError(
            f"{str(path)!r} is not a patched checkpoint (its config has no 'resformer'); load it with "
            f"{auto.__name__}.from_pretrained and call resformer.patch"
        )
    _check_settings(settings)
    return _load(_concrete(auto, config), path, config, settings, kwargs)


def install() -> None:
    """Make `AutoModel*.from_pretrained` and `<Model>.from_pretrained` load patched checkpoints by themselves.

    Process-wide, and without effect on any other checkpoint. Calling it again does nothing.
    """
    if getattr(PreTrainedModel.from_pretrained, "_resformer", False):
        return
    AutoConfig.register(MODEL_TYPE, ResformerConfig)
    original = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def load(cls: type, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        path = pretrained_model_name_or_path  # transformers' name for it, by which some callers give it
        known = config is not None and not hasattr(config, "resformer")
        if known or getattr(cls, "_resformer_loading", False) or (path is None and config is None):
            return original(cls, path, *args, config=config, **kwargs)
        if path is None:  # the weights are given as a state_dict
            return from_pretrained(path, cls, config=config, **kwargs)
        raw, _ = PretrainedConfig.get_config_dict(path, **_hub_arguments(kwargs))
        if "resformer" in raw:
            if args:
                raise ValueError(f"{cls.__name__} of a patched checkpoint takes no positional arguments, got {args!r}")
            return from_pretrained(path, cls, config=config, **kwargs)
        if config is not None:
            raise ValueError(
                f"the config given is of a patched model, and {str(path)!r} is not patched; load it with its own "
                "config and call resformer.patch"
            )
        return original(cls, path, *args, **kwargs)

    load._resformer = True  # type: ignore[attr-defined]
    PreTrainedModel.from_pretrained = classmethod(load)  # type: ignore[assignment, method-assign]


class ResformerConfig(PretrainedConfig):
    """The type that a patched checkpoint has on disk; reading it gives the host's own configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return _host_config(config_dict, **kwargs)


def read_config(path: Any) -> PretrainedConfig:
    """The host's configuration of a checkpoint, patched (with `.resformer`) or not."""
    return _read(path, {})[0]


def outline(path: str) -> PreTrainedModel:
    """The model of a checkpoint without its weights, on the device 'meta', patched if the checkpoint is: of the class
    that its configuration names, or the base model.

    Raises a ValueError where there is no checkpoint, or none of a model that transformers knows.
    """
    if not path or (Path(path).exists() and not (Path(path) / "config.json").is_file()):
        raise ValueError(f"{path!r} holds no config.json; give the folder of a transformers checkpoint")
    try:
        config = read_config(path)
    except (OSError, ValueError) as error:
        if Path(path).exists():
            raise
        hint = "Nor is there a folder of this name, or a checkpoint on the hub, as far as it can be reached "
        raise unknown(
            "family", path, families(), f"{hint}({str(error).splitlines()[0]})", listed="resformer hosts"
        ) from None
    except Exception as error:  # of what checks the values of a configuration
        raise ValueError(f"the configuration of {path!r} cannot be read: {error}") from error
    settings = getattr(config, "resformer", None)
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    cls = next((found for found in named if isinstance(found, type) and issubclass(found, PreTrainedModel)), None)
    with torch.device("meta"):
        model: Any = _concrete(AutoModel, config)(config) if cls is None else cls(config)
        if settings is not None:
            _check_settings(settings)
            _prepare(model, config, settings)
    return model


def _read(path: Any, kwargs: dict[str, Any], auto: Any = None) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The host's configuration with what of `kwargs` it takes, and the rest."""
    # "auto" is a dtype to the model alone: it is that of the configuration, which must not be overwritten with it
    dtypes = {name: kwargs[name] for name in ("dtype", "torch_dtype") if name in kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name not in dtypes}
    raw, _ = PretrainedConfig.get_config_dict(path, **_hub_arguments(kwargs))
    if "resformer" in raw:
        config, rest = _host_config(raw, getattr(auto, "config_class", None), return_unused_kwargs=True, **kwargs)
    else:
        config, rest = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    return config, rest | dtypes


def _host_config(raw: dict[str, Any], own: Any = None, **kwargs: Any) -> Any:
    """`own`: the configuration class of the model class that was given, which need not be registered."""
    settings = raw.get("resformer")
    if not isinstance(settings, dict) or "host" not in settings:
        raise ValueError(f"the configuration of a patched checkpoint names its host in 'resformer', got {settings!r}")
    kind = settings["host"]
    if not isinstance(kind, str) or (kind not in CONFIG_MAPPING and getattr(own, "model_type", None) != kind):
        raise ValueError(
            f"this checkpoint was patched on a host of type {kind!r}, which this transformers does not "
            "know; install the version it was saved with, or, if the model is your own, register its classes first: "
            f"AutoConfig.register({kind!r}, ...) and AutoModel.register(...)"
        )
    known: Any = CONFIG_MAPPING
    cls = known[kind] if kind in known else own  # noqa: SIM401  (its `get` reads other entries)
    raw = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    return cls.from_dict(raw, **kwargs)


def _check_settings(settings: dict[str, Any]) -> None:
    if settings.get("version") != VERSION:
        raise ValueError(
            f"this checkpoint has version {settings.get('version')!r} of the resformer configuration; this resformer "
            f"reads version {VERSION}; install the version it was saved with"
        )
    lacking = [name for name in ("scheme", "init", "placement", "layers", "options") if name not in settings]
    if lacking:
        raise ValueError(f"the 'resformer' part of the configuration lacks {lacking}; the checkpoint is damaged")
    layers, options = settings["layers"], settings["options"]
    if not isinstance(options, dict) or not _are_layers(layers) or settings["placement"] not in PLACEMENTS:
        raise ValueError(
            f"the 'resformer' part of the configuration has placement {settings['placement']!r}, layers {layers!r} and "
            f"options {options!r}; the checkpoint is damaged"
        )
    find_scheme(settings["scheme"], settings["options"])


def _are_layers(recorded: Any) -> bool:
    """None, [first, last + 1], {"numbers": [...]}, or one of these by stack."""
    if isinstance(recorded, list):
        return len(recorded) == 2 and all(type(number) is int for number in recorded)
    if isinstance(recorded, dict) and "numbers" in recorded:
        return isinstance(recorded["numbers"], list) and all(type(number) is int for number in recorded["numbers"])
    return recorded is None or (isinstance(recorded, dict) and all(_are_layers(one) for one in recorded.values()))


def _concrete(auto: type, config: PretrainedConfig) -> type:
    """The model class that an Auto class picks for a configuration; a concrete class stays."""
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None:
        if isinstance(auto, type) and issubclass(auto, PreTrainedModel) and auto.config_class is type(config):
            return auto
        raise ValueError(
            f"auto must be an AutoModel class, or the model class of a {type(config).__name__}, got {auto!r}"
        )
    if type(config) not in mapping:
        raise ValueError(f"{auto.__name__} knows no model for a {type(config).__name__}; take another Auto class")
    return mapping[type(config)]


def _hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}


def _prepare(model: Any, config: Any, settings: dict[str, Any]) -> None:
    """Give a model that was just built the parts that its checkpoint has."""
    if (cardinality := getattr(config, "ffn_cardinality", None)) is not None:
        group_feed_forward(model, cardinality)
    restore(model, settings)


def _load(cls: type, path: Any, config: Any, settings: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    def build(self: Any, config: Any, *args: Any, **options: Any) -> None:
        cls.__init__(self, config, *args, **options)  # type: ignore[misc]
        _prepare(self, config, settings)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    loader: Any = type(cls.__name__, (cls,), {"__init__": build, "_resformer_loading": True} | names)
    wants_info = kwargs.pop("output_loading_info", False)
    arguments = {"variant": VARIANT} | kwargs
    model, info = loader.from_pretrained(path, config=config, output_loading_info=True, **arguments)
    model.__class__ = cls
    host = find_host(model)
    check_still_described(host)
    freeze(host, True)
    # a new head may bring weights of its own, a layer may not
    inside = [f".{stack.spec.layers.partition('.*.')[0]}." for stack in host.stacks]
    lost = [key for key in info["missing_keys"] if any(path in f".{key}" for path in inside)]
    here = [stack.spec.name for stack in host.stacks]  # BART's decoder alone leaves the encoder out
    absent = [f"{stack.root}.{stack.layers}." for stack in host.family.stacks if stack.name not in here]
    unknown_keys = [key for key in info["unexpected_keys"] if not any(path in key for path in absent)]
    stray = [key for key in unknown_keys if ".resformer." in key]
    other = [key for key, *_ in info["mismatched_keys"] if ".resformer." in key]
    if lost or stray or other:
        weights = "state_dict" if path is None else str(path)
        raise ValueError(
            f"the weights of {weights!r} do not fit scheme {settings['scheme']!r}: missing {lost[:3] or 'nothing'}, "
            f"unexpected {stray[:3] or 'nothing'}, of another shape {other[:3] or 'nothing'}; the checkpoint is "
            "damaged, or its configuration was changed"
        )
    if len(dtypes_of(host)) > 1 and not any(p.is_meta for p in model.parameters()):
        probe_patched(host, settings["scheme"])
    return (model, info) if wants_info else model
