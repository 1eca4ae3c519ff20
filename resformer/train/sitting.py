"""One sitting of a run: from a checkpoint, or the beginning, to the end or an interruption."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from transformers import PreTrainedModel

from resformer.calibration import calibrate, uncalibrated
from resformer.optim import param_groups
from resformer.train.checkpoints import load_checkpoint, save_checkpoint
from resformer.train.folder import CHECKPOINTS, EVALUATIONS, TRAIN, append
from resformer.train.job import Job, Outcome
from resformer.train.loop import WINDOW, Step, windows
from resformer.train.schedule import factor
from resformer.train.settings import Settings

PATIENCE = 10.0  # seconds, after which all processes hear of what one was asked, and the bar moves
FINE = 10_000  # steps into which a run is divided whose length is given in seconds


class Sitting:
    """What stays the same, and what becomes, while a model is trained on a job.

    Args:
        start: the checkpoint to go on from, or None.
        stop: whether the run was asked to stop.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        job: Job,
        output: Path,
        settings: Settings,
        start: Path | None,
        stop: Callable[[], bool],
    ) -> None:
        self.job, self.output, self.settings, self.stop = job, output, settings, stop
        self.accelerator = accelerator = job.accelerator
        self.outcome = Outcome()
        self.begin = 0  # steps taken before
        self.evaluated: int | None = None  # after which step
        self.steps: int | None = job.config.get("steps")  # None: until the time is over
        make_ready(model, job, settings)
        groups = param_groups(model, settings.learning_rate, settings.weight_decay, settings.scheme_lr_multiplier)
        self.peaks = [group["lr"] for group in groups]
        betas, eps = (0.9, settings.beta2), settings.epsilon
        optimizer = torch.optim.AdamW(
            groups, betas=betas, eps=eps, fused=True
        )  # deep narrow nets have thousands of small parameters
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if start is not None:
            self._restore(start)
        self.called: Any = torch.compile(self.model, dynamic=True) if settings.compile else self.model
        self.rate = factor(settings.schedule, steps=self.steps or FINE, warmup=settings.warmup)
        self.before, self.started = self.outcome.seconds, time.perf_counter()
        self.looked, self.pace = self.begin, 0.0  # the step of the last look, and seconds a step before it

    def logged(self) -> dict[str, list[dict[str, Any]]]:
        """The entries of the logs up to the step from which this sitting goes on."""
        return {TRAIN: [asdict(step) for step in self.outcome.steps], EVALUATIONS: self.outcome.evaluations}

    def windows(
        self, on_step: Callable[[int], None], look: Callable[[int], bool] | None = None
    ) -> Iterator[list[Step]]:
        """Take the steps, and give those since the last look; where to look is by default what a run needs."""
        accelerator = self.accelerator
        last = self.begin if self._is_over(self.begin) else self.steps  # interrupted between its last step and its end
        return windows(
            self.called,
            self.job.batches(self.begin, accelerator.process_index, accelerator.num_processes),
            self.optimizer,
            self._set_rate,
            steps=self.begin + 10**9 if last is None else last,
            begin=self.begin,
            seed=self.settings.seed,
            accelerator=accelerator,
            clip=self.settings.clip or None,
            look=look or self._looks,
            on_step=on_step,
        )

    def take(self, window: list[Step]) -> bool:
        """Keep the steps taken; evaluate and save where it is time to; whether the run is over."""
        settings, outcome = self.settings, self.outcome
        step = window[-1].step
        outcome.steps += window
        last_look = outcome.seconds
        outcome.seconds, stopping = _agree(
            self.before + time.perf_counter() - self.started, self.stop(), self.accelerator
        )
        self.pace, self.looked = (outcome.seconds - last_look) / (step - self.looked), step
        self._log(TRAIN, [asdict(one) for one in window])
        if not math.isfinite(window[-1].loss):
            outcome.status = "diverged"
            return True
        if settings.evaluate_every and step % settings.evaluate_every == 0:
            self._evaluate(step)
            if outcome.status == "diverged":
                return True
        over = self._is_over(step)
        if stopping and not over:
            outcome.status = "stopped"
            self._save(step)
        elif settings.save_every and step % settings.save_every == 0:
            self._save(step)
        return over or outcome.status == "stopped"

    def evaluate_at_the_end(self) -> None:
        """Unless the run is not over, or was evaluated after this very step."""
        last = self.outcome.steps[-1].step
        if self.outcome.status == "ok" and self.evaluated != last:
            self._evaluate(last)

    def note(self) -> str:
        """Of the last step, for the bar."""
        last, (unit, each) = self.outcome.steps[-1], self.job.units
        speed = each * (last.step - self.begin) / (self.outcome.seconds - self.before)
        return f"loss {last.loss:.3f}  lr {last.learning_rate:.1e}  {speed:,.0f} {unit}/s"

    def _is_over(self, step: int) -> bool:
        ended = step == self.steps or self._share_of_time(step) >= 1.0
        return ended or _patience_is_over(self.outcome.evaluations, self.settings.patience)

    def _share_of_time(self, step: int) -> float:
        """As known at the last look, on which all processes agree, and by the pace until then."""
        seconds = self.outcome.seconds + (step - self.looked) * self.pace
        return seconds / self.settings.seconds if self.settings.seconds else 0.0

    def _set_rate(self, step: int) -> None:
        at = self.rate(step if self.settings.seconds is None else min(FINE, round(FINE * self._share_of_time(step))))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * at

    def _looks(self, step: int) -> bool:
        every = (WINDOW, self.settings.evaluate_every, self.settings.save_every)
        if any(step % n == 0 for n in every if n) or (self.stop() and self.accelerator.num_processes == 1):
            return True
        if step - self.begin in (1, 2, 4, 8, 16):  # the pace is not known yet
            return True
        return (step - self.looked) * self.pace >= PATIENCE or self._share_of_time(step) >= 1.0

    def _evaluate(self, step: int) -> None:
        found = self.outcome.last = self.job.evaluate(self.called)
        self.evaluated = step
        if not found.finite:  # weights can break in the very last step
            self.outcome.status = "diverged"
            return
        entry = {"step": step, "score": found.score, "metrics": found.metrics}
        if all(one["step"] != step for one in self.outcome.evaluations):  # or interrupted after its last step
            self.outcome.evaluations.append(entry)
            self._log(EVALUATIONS, [entry])

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "seconds": self.outcome.seconds,
            "evaluations": self.outcome.evaluations,
            "steps": torch.tensor([astuple(step) for step in self.outcome.steps], dtype=torch.float64),
        }
        folder, accelerator, keep = self.output / CHECKPOINTS, self.accelerator, self.settings.keep
        try:
            save_checkpoint(
                folder, step, self.model, self.optimizer, state, self.job.config, accelerator=accelerator, keep=keep
            )
        except OSError as error:
            self._tell(f"no checkpoint after step {step}: {error.strerror or error}")

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.model, self.optimizer, accelerator=self.accelerator)
        self.begin = state["step"]
        self.outcome.seconds, self.outcome.evaluations = state["seconds"], state["evaluations"]
        self.outcome.steps = [Step(int(step), *rest) for step, *rest in state["steps"].tolist()]

    def _log(self, name: str, entries: list[dict[str, Any]]) -> None:
        """To the file `name`, and of the last entry what is a number to the trackers."""
        if self.accelerator.is_main_process:
            try:
                append(self.output / name, entries)
            except OSError as error:
                self._tell(f"nothing in {name} up to step {entries[-1]['step']}: {error.strerror or error}")
        if self.settings.track:
            last = dict(entries[-1])
            step, metrics = last.pop("step"), last.get("metrics")
            told = last if metrics is None else {f"validation/{name}": value for name, value in metrics.items()}
            self.accelerator.log(told, step=step)

    def _tell(self, note: str) -> None:
        self.outcome.notes.append(note)
        warnings.warn(note, stacklevel=2)


def make_ready(model: PreTrainedModel, job: Job, settings: Settings) -> None:
    """Move a model to its device, calibrate its scheme where that is open, and set how it computes."""
    device = job.accelerator.device
    model.to(device)
    if uncalibrated(model):  # before it is wrapped, and on the whole batch, so that every process finds the same
        calibrate(model, send_to_device(job.first(), device))
    if settings.gradient_checkpointing:
        of_any_version = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        of_any_version({"use_reentrant": False})


def _agree(seconds: float, stop: bool, accelerator: Accelerator) -> tuple[float, bool]:
    """The main process's clock, and whether any process was asked to stop."""
    if accelerator.num_processes == 1:
        return seconds, stop
    stops = accelerator.reduce(torch.tensor(float(stop), device=accelerator.device), "sum")
    return broadcast_object_list([seconds])[0], bool(stops > 0)


def _patience_is_over(evaluations: list[dict[str, Any]], patience: int | None) -> bool:
    if patience is None or len(evaluations) <= patience:
        return False
    best = max(one["score"] for one in evaluations[:-patience])
    return all(one["score"] <= best for one in evaluations[-patience:])
