"""How a model is trained, whatever on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from resformer.errors import unknown
from resformer.train.checks import check_not_negative, check_positive
from resformer.train.schedule import factor

MATMUL = ("highest", "high", "medium")
# What changes nothing of the outcome: it may differ when a run goes on.
FREE = ("micro_batch_size", "save_every", "keep", "watch_every", "track")


@dataclass(frozen=True)
class Settings:
    """Length, optimizer and machine of a run; the same for pre-training and fine-tuning.

    Args:
        epochs: passes over the training data, where neither steps nor seconds are given.
        steps: optimizer steps. seconds: wall clock of training; the schedule then follows the time.
        batch_size: examples per optimizer step, over all processes.
        micro_batch_size: examples that a process computes at once; None: all that fall to it.
        weight_decay: of AdamW; on what, and `scheme_lr_multiplier`: see `resformer.optim.param_groups`.
        warmup: share of the run, in [0, 1), over which the learning rate rises.
        schedule: what the learning rate does then: see `resformer.train.schedule`.
        clip: largest norm of the gradient; 0: not clipped.
        precision: "fp32", or "bf16" or "fp16": autocast. Weights, and the residual stream, stay in fp32.
        seed: of the order of the examples and of dropout.
        evaluate_every: steps between evaluations; None: once, at the end. patience: evaluations without a better
            score after which the run ends; None: it never does.
        save_every: steps between checkpoints, of which the last `keep` stay; None: only when it is asked to stop.
        gradient_checkpointing: compute each layer again in the backward pass, for memory.
        compile: torch.compile, on inputs of few lengths.
        matmul_precision: of torch for fp32 matrices: "highest"; "high" and "medium" may round to tf32 or bf16.
        watch_every: steps between looks at what each layer's scheme does (layers.jsonl); None: never.
        track: names of accelerate's trackers (tensorboard, wandb, trackio ...).
    """

    epochs: float = 3.0
    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    scheme_lr_multiplier: float = 1.0
    warmup: float = 0.1
    schedule: str = "linear"
    clip: float = 1.0
    precision: str = "fp32"
    seed: int = 0
    evaluate_every: int | None = None
    patience: int | None = None
    save_every: int | None = None
    keep: int = 2
    gradient_checkpointing: bool = False
    compile: bool = False
    matmul_precision: str = "highest"
    watch_every: int | None = None
    track: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises `ValueError` for a value that cannot be, or two that exclude each other."""
        whole = ("steps", "batch_size", "micro_batch_size", "evaluate_every", "patience", "save_every", "keep")
        for name in (*whole, "watch_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} is {value!r}; it must be a whole number")
        given = {name: getattr(self, name) for name in (*whole, "watch_every", "seconds", "epochs", "learning_rate")}
        check_positive(**{name: value for name, value in given.items() if value is not None})
        check_not_negative(clip=self.clip, seed=self.seed)
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
