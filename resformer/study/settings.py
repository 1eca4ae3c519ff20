"""What all runs of a study share, and the protocols that set it. Stdlib only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from resformer.errors import unknown
from resformer.options import option
from resformer.study.problems import Problems

SHORTEST = 8  # tokens that an example may be cut to: fewer leave nothing of it
# Passes over the training data where nothing else is said: small tasks need more (Mosbach et al. 2021,
# arXiv:2006.04884, for RTE and MRPC).
EPOCHS = {"cola": 10.0, "stsb": 10.0, "rte": 20.0, "mrpc": 20.0, "wnli": 20.0}
OTHERWISE = 3.0
OF_A_NEW_MODEL = ("family", "width", "heads", "ffn_ratio", "match_parameters", "dropout")
PROTOCOLS: dict[str, dict[str, Any]] = {
    # One recipe for all schemes, rates chosen for each: the defaults.
    "controlled": {},
    # The fine-tuning of Geiping and Goldstein 2022, arXiv:2212.14034: no clipping, no decay, one rate for all.
    "cramming": {
        "epochs": 5.0,
        "batch_size": 16,
        "learning_rates": (4e-5,),
        "schedule": "cosine",
        "weight_decay": 0.0,
        "beta2": 0.98,
        "clip": 0.0,
        "dropout": 0.1,
    },
}


@dataclass(frozen=True)
class Settings:
    """The model, the length and the optimizer of every run of a study. Raises `Problems` for what cannot be."""

    model: str | None = option(None, "Folder or hub id of a checkpoint to patch. [default: fresh weights]")
    family: str = option("bert", "Of a new model; see `resformer hosts`.")
    width: int = option(128, "Of its stream.")
    heads: int | None = option(None, "Of attention. [default: one for each 64 channels]")
    ffn_ratio: float = option(4.0, "Inner width of the feed-forward over the width.")
    match_parameters: str | None = option(
        None, "At each depth the width with the parameters of DEPTHxWIDTH, or so many, in place of one width."
    )
    dropout: float = option(0.0, "Of a new model.")
    init: str | None = option(None, "Of the schemes. [default: paper; preserve with --model]")
    steps: int | None = option(None, "Optimizer steps, in place of epochs.")
    epochs: float | None = option(None, "Passes over the data. [default: 3; CoLA, STS-B 10; RTE, MRPC, WNLI 20]")
    batch_size: int = option(32, "Examples a step.")
    warmup: float = option(0.1, "Share of the steps over which the learning rate rises.")
    schedule: str = option("linear", "Of the learning rate then: linear, cosine, hold or constant.")
    weight_decay: float = option(0.01, "Of matrices; never of the scheme.")
    beta2: float = option(0.999, "Of AdamW: memory of squared gradients.")
    epsilon: float = option(1e-6, "Of AdamW.")
    scheme_lr_multiplier: float = option(1.0, "For the scheme's parameters, on top.")
    clip: float = option(1.0, "Largest gradient norm; 0 for none.")
    precision: str = option("fp32", "fp32, bf16 or fp16: autocast.")
    max_length: int = option(128, "Tokens; longer examples are cut.")
    train_size: int | None = option(None, "Use only the first so many training examples.")
    data: str | None = option(None, "Folder with the tasks' data. [default: built in, or as for finetune]")

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("width", "heads", "steps", "batch_size", "max_length", "train_size"):
            value = getattr(self, name)
            if value is not None or name in ("width", "batch_size", "max_length"):
                problems.unless(whole(value), name, value, "a whole number of at least 1")
        if not problems and self.max_length < SHORTEST:
            problems.add("max_length", self.max_length, f"at least {SHORTEST} tokens")
        if not problems and self.model is None and self.match_parameters is None and self.heads:
            problems.unless(
                self.width % self.heads == 0, "heads", self.heads, f"a divisor of the width, {self.width}: "
                f"{', '.join(map(str, divisors(self.width, self.heads)))}"
            )  # fmt: skip
        for name in ("epochs", "ffn_ratio", "scheme_lr_multiplier", "epsilon"):
            value = getattr(self, name)
            if value is not None or name != "epochs":
                problems.unless(number(value) and value > 0, name, value, "a finite number above 0")
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            problems.unless(number(value) and value >= 0, name, value, "a finite number of at least 0")
        for name in ("dropout", "warmup", "beta2"):
            value = getattr(self, name)
            problems.unless(number(value) and 0 <= value < 1, name, value, "a number of at least 0 and below 1")
        if self.steps is not None and self.epochs is not None:
            problems.add("epochs", self.epochs, f"left out where steps are given ({self.steps}): a run has one length")
        if self.init not in (None, "paper", "preserve"):
            problems.add("init", self.init, "paper or preserve")
        problems.stop()
        for name in ("ffn_ratio", "scheme_lr_multiplier", "epsilon", "weight_decay", "clip", "dropout", "warmup"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 1 and 1.0 make the same runs
        object.__setattr__(self, "init", self.init or ("paper" if self.model is None else "preserve"))

    def of(self, task: str) -> dict[str, Any]:
        """What decides a run on a task: without what does not apply to it, with its length."""
        found = asdict(self)
        for name in OF_A_NEW_MODEL if self.model is not None else ("model",):
            del found[name]
        found.pop("match_parameters", None)  # the width follows from it
        if self.steps is None:
            found["epochs"] = float(self.epochs or EPOCHS.get(task, OTHERWISE))
        del found["epochs" if self.steps is not None else "steps"]
        return found


def protocol(name: str) -> dict[str, Any]:
    """The values of a protocol, by name of the setting, under what a user says."""
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def divisors(width: int, near: int) -> list[int]:
    """The four divisors of a width that come nearest to a number."""
    return sorted(sorted((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - near))[:4])
