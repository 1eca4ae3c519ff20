"""How a model is trained, whatever on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from resformer.errors import unknown
from resformer.options import option
from resformer.train.numbers import check_not_negative, check_positive
from resformer.train.schedule import factor

MATMUL = ("highest", "high", "medium")
# What changes nothing of the outcome, or only what dropout draws: it may differ when a run goes on.
FREE = ("micro_batch_size", "save_every", "keep", "watch_every", "track")


@dataclass(frozen=True)
class Settings:
    """Length, optimizer and machine of a run; the same for pre-training and fine-tuning. Weights stay in fp32 at any
    precision, and so does the residual stream, but where a scheme passes it through a matrix (concat, projection)."""

    epochs: float = option(3.0, "Passes over the training data, where neither steps nor seconds are given.")
    steps: int | None = option(None, "Optimizer steps.")
    seconds: float | None = option(None, "Wall clock of training; the schedule then follows the time.")
    batch_size: int = option(32, "Examples an optimizer step, over all processes.")
    micro_batch_size: int | None = option(None, "Examples that a process computes at once. [default: all its part]")
    learning_rate: float = option(5e-5, "At its peak.", "--lr")
    weight_decay: float = option(0.01, "Of matrices; never of the scheme.")
    beta2: float = option(0.999, "Of AdamW: memory of squared gradients, below 1.")
    epsilon: float = option(1e-8, "Of AdamW.")
    scheme_lr_multiplier: float = option(1.0, "For the scheme's parameters, on top.")
    warmup: float = option(0.1, "Share of the run, below 1, over which the learning rate rises.")
    schedule: str = option("linear", "Of the learning rate then: linear, cosine, hold or constant.")
    clip: float = option(1.0, "Largest gradient norm; 0 for none.")
    precision: str = option("fp32", "fp32 (or no), bf16 or fp16: autocast.", "--mixed-precision")
    seed: int = option(0, "Of order, masks and dropout.")
    evaluate_every: int | None = option(None, "Steps between evaluations. [default: once, at the end]")
    patience: int | None = option(None, "Evaluations without a better score that end the run. [default: none do]")
    save_every: int | None = option(
        None, "Steps between checkpoints. [default: only when it is asked to stop]", "--save-steps"
    )
    keep: int = option(2, "How many of the last checkpoints stay.")
    gradient_checkpointing: bool = option(False, "Compute each layer again in the backward pass, for memory.")
    compile: bool = option(False, "torch.compile, on inputs of few lengths.")
    matmul_precision: str = option("highest", "Of fp32 matrices in torch: high and medium may round to tf32 or bf16.")
    watch_every: int | None = option(None, "Steps between looks at each layer's scheme (layers.jsonl).")
    track: tuple[str, ...] = option((), "Trackers of accelerate: tensorboard, wandb, trackio ...")

    def __post_init__(self) -> None:
        """Raises `ValueError` for a value that cannot be, or two that exclude each other."""
        whole = ("steps", "batch_size", "micro_batch_size", "evaluate_every", "patience", "save_every", "keep")
        for name in (*whole, "watch_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} is {value!r}; it must be a whole number")
        given = {name: getattr(self, name) for name in (*whole, "watch_every", "seconds", "epochs", "learning_rate")}
        check_positive(**{name: value for name, value in given.items() if value is not None})
        check_not_negative(clip=self.clip, seed=self.seed, weight_decay=self.weight_decay)
        check_positive(scheme_lr_multiplier=self.scheme_lr_multiplier, epsilon=self.epsilon)
        check_not_negative(beta2=self.beta2)
        if self.beta2 >= 1:
            raise ValueError(f"beta2 is {self.beta2!r}; it must be below 1, such as 0.999")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed!r}; it must be a whole number below 2^63")
        if self.steps is not None and self.seconds is not None:
            raise ValueError(f"steps={self.steps} and seconds={self.seconds} are both given; a run has one length")
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError("patience counts evaluations, so give evaluate_every as well")
        if self.matmul_precision not in MATMUL:
            raise unknown("matmul_precision", self.matmul_precision, MATMUL)
        factor(self.schedule, steps=100, warmup=self.warmup)

    def resolved(self, epoch: int) -> dict[str, Any]:
        """What the outcome of a run depends on, by name, with its length in steps if `epoch` steps are one pass."""
        found = {name: value for name, value in asdict(self).items() if name not in FREE}
        if self.seconds is None:
            del found["seconds"]
            found["steps"] = self.steps or max(1, round(self.epochs * epoch))
        del found["epochs"]
        return {name: value for name, value in found.items() if value is not None}
