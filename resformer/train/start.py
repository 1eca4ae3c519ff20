"""Which model a run starts from, as the command line names it. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from resformer.errors import unknown
from resformer.options import option
from resformer.spelling import parse_scheme, with_options

NEW = ("depth", "width", "match_parameters", "family", "heads", "ffn_ratio", "dropout", "weight_init")


@dataclass(frozen=True)
class Start:
    """A model as the command line names it: `model`, a checkpoint, or `depth` and a width, fresh weights."""

    model: str | None = option(None, "Folder or hub id of a transformers checkpoint, patched or not.")
    depth: int | None = option(None, "Layers of a new model, in place of --model.")
    width: int | None = option(None, "Of its stream.")
    match_parameters: str | None = option(None, "In place of the width: the parameters of DEPTHxWIDTH, or a number.")
    family: str = option("bert", "Of a new model; see `resformer hosts`.")
    heads: int | None = option(None, "Of a new model. [default: one for each 64 channels]")
    ffn_ratio: float = option(4.0, "Inner width of a new model's feed-forward over its width.")
    dropout: float = option(0.1, "Of a new model.")
    weight_init: str = option("bert", "Of a new model: bert, xavier or width_scaled.")
    tokenizer: str | None = option(None, "Folder or hub id. [default: that of the model]")
    attention: str | None = option(None, "eager or sdpa. [default: in bf16 on CPUs eager up to 512 tokens]")
    scheme: str | None = option(None, "NAME or NAME:OPTION=VALUE,... [default: the model as it is]")
    scheme_options: str | None = option(None, "JSON, in place of :OPTION=VALUE.")
    init: str | None = option(None, "preserve or paper. [default: preserve with --model, paper for a new one]")
    placement: str | None = option(None, "Of the norms: native, pre, post, sandwich, none.")

    def __post_init__(self) -> None:
        """Raises `ValueError` for what says both, or neither, of where the model comes from."""
        if self.model is None and self.depth is None:
            raise ValueError("give --model, a checkpoint, or --depth and --width of a new model")
        if self.model is not None and self.depth is not None:
            raise ValueError(f"--model {self.model} and --depth {self.depth} are both given; a run has one model")
        if self.model is not None and (given := [n for n in NEW if getattr(self, n) != DEFAULTS[n]]):
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{options}: of a new model; leave it out, or leave --model out")
        if self.init not in (None, "preserve", "paper"):
            raise unknown("init", self.init, ("preserve", "paper"))
        if self.model is not None and self.init and not self.scheme:
            raise ValueError(f"init {self.init!r} is of a scheme; give the scheme as well")
        if self.placement and not self.scheme:
            raise ValueError(f"placement {self.placement!r} is of a scheme; give the scheme as well")

    @property
    def patching(self) -> tuple[str | None, dict[str, Any]]:
        """The scheme and its options."""
        scheme = with_options(self.scheme, self.scheme_options)
        name, options = parse_scheme(scheme) if scheme else (None, {})
        for wrong in options.keys() & {"init", "placement"}:
            raise ValueError(f"{wrong!r} is among the options of scheme {name!r}; give it as --{wrong}")
        return name, options

    def described(self) -> dict[str, Any]:
        """What of it the outcome of a run depends on."""
        left_out = NEW if self.model else ()
        return {name: value for name, value in asdict(self).items() if value is not None and name not in left_out}


DEFAULTS = {one.name: one.default for one in fields(Start)}
