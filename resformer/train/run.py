"""A run in a folder: what pre-training and fine-tuning have in common besides the loop."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from resformer.calibration import calibrate, uncalibrated
from resformer.optim import param_groups
from resformer.train.checkpoints import load_checkpoint, save_checkpoint
from resformer.train.folder import CHECKPOINTS, EVALUATIONS, LAYERS, TRAIN, append, go_on_from, open_folder
from resformer.train.loop import WINDOW, Part, Step, windows
from resformer.train.progress import progress_bar
from resformer.train.schedule import factor
from resformer.train.settings import Settings
from resformer.train.stopping import stop_requests
from resformer.train.watch import watched

FINE = 10_000  # steps into which a run is divided whose length is given in seconds


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    score: float  # larger is better
    metrics: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)  # examples of each split
    found: Any = None  # what the metrics were computed from, for whoever evaluates

    @property
    def finite(self) -> bool:
        """Whether the model still computes numbers."""
        return math.isfinite(self.score)


@dataclass(frozen=True)
class Job:
    """What a run trains on, checked and made ready.

    Args:
        config: all that the outcome depends on.
        accelerator: of the precision that is asked for.
        epoch: optimizer steps in one pass over the data.
        batches: (steps taken, process, processes) -> this process's parts of each further batch.
        first: the first batch whole, by which schemes calibrate that ask for it.
        evaluate: the prepared model -> an `Evaluation`; called on every process.
        flags: (the last evaluation, the final training loss) -> what to notice.
        units: what is counted ("examples", "tokens"), and how many of them a step has on average.
        tokens: of text in a step, on average.
        longest: tokens of the longest input.
        around: within which the model computes the job.
    """

    config: dict[str, Any]
    accelerator: Accelerator
    epoch: int
    batches: Callable[[int, int, int], Iterator[list[Part]]]
    first: Callable[[], dict[str, Tensor]]
    evaluate: Callable[[Any], Evaluation]
    flags: Callable[[Evaluation, float], list[str]]
    units: tuple[str, float]
    tokens: float
    longest: int
    around: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass
class Outcome:
    """What a run did.

    `status` is "ok", "diverged" (a loss or an evaluation that is not finite) or "stopped" (asked to, and saved).
    """

    status: str = "ok"
    steps: list[Step] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # {"step", "score", "metrics"}
    last: Evaluation | None = None
    seconds: float = 0.0  # of training alone, over all sittings
    notes: list[str] = field(default_factory=list)  # what a user should know: a broken checkpoint, a full disk

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation, the earliest of equals."""
        return max(self.evaluations, key=lambda one: one["score"], default=None)


def run(
    model: PreTrainedModel,
    job: Job,
    output: Path,
    settings: Settings,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> Outcome:
    """Train `model` in place on a job, in the folder `output`, and evaluate it at the end.

    The folder gets config.json, a line of train.jsonl for each step, of evaluations.jsonl for each evaluation and of
    layers.jsonl for each look at the layers, and checkpoints/. A run that was interrupted goes on from its newest whole
    checkpoint and takes the steps it would have taken. SIGTERM saves a checkpoint between two steps and ends the run
    with status "stopped". Under `accelerate launch` every process calls this, and the main one writes.

    Args:
        output: new or empty, or with an unfinished run of this configuration.
        resume: "auto", from the newest whole checkpoint of this folder, if there is one; "never"; or the folder of one
            checkpoint.
        overwrite: delete what an earlier run left in this folder.
    """
    accelerator = job.accelerator
    start, notes = open_folder(output, job.config, resume, overwrite, accelerator)
    main = accelerator.is_main_process
    with job.around(), stop_requests() as stop, _random_states_kept(accelerator):
        sitting = _Sitting(model, job, output, settings, start, stop)
        sitting.outcome.notes += notes
        begin, steps = sitting.begin, sitting.steps
        if main:
            go_on_from(output, begin, sitting.logged())
        _trackers(accelerator, settings, output, job.config)
        layers_log = output / LAYERS if main else None
        with (
            progress_bar(steps or 0, shown=progress and main, seconds=settings.seconds) as update,
            watched(sitting.model, settings.watch_every, layers_log, begin) as on_step,
        ):
            update(completed=begin)

            def stepped(step: int) -> None:
                on_step(step)
                update(completed=step)

            for window in sitting.windows(stepped):
                over = sitting.take(window)
                update(note=sitting.note())
                if over:
                    break
            sitting.evaluate_at_the_end()
        if settings.track:
            accelerator.end_training()
    accelerator.unwrap_model(sitting.model, keep_fp32_wrapper=False)  # takes the autocast off `model`
    return sitting.outcome


def make_ready(model: PreTrainedModel, job: Job, settings: Settings) -> None:
    """Move a model to its device, calibrate its scheme where that is open, and set how it computes."""
    device = job.accelerator.device
    model.to(device)
    if uncalibrated(model):  # before it is wrapped, and on the whole batch, so that every process finds the same
        calibrate(model, {name: tensor.to(device) for name, tensor in job.first().items()})
    if settings.gradient_checkpointing:
        of_any_version = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        of_any_version({"use_reentrant": False})


class _Sitting:
    """One sitting of a run: from a checkpoint, or the beginning, to the end or an interruption."""

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
        self.steps: int | None = settings.resolved(job.epoch).get("steps")  # None: until the time is over
        make_ready(model, job, settings)
        groups = param_groups(model, settings.learning_rate, settings.weight_decay, settings.scheme_lr_multiplier)
        self.peaks = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, fused=True)  # deep narrow nets have thousands of small parameters
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

    def windows(self, on_step: Callable[[int], None]) -> Iterator[list[Step]]:
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
            look=self._looks,
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
        first = step - self.begin in (1, 2, 4, 8, 16)  # the pace is not known yet
        return self.settings.seconds is not None and (first or self._share_of_time(step) >= 1.0)

    def _evaluate(self, step: int) -> None:
        found = self.outcome.last = self.job.evaluate(self.called)
        self.evaluated = step
        if not found.finite:  # weights can break in the very last step
            self.outcome.status = "diverged"
            return
        entry = {"step": step, "score": found.score, "metrics": found.metrics}
        if entry not in self.outcome.evaluations:  # unless interrupted after its last step
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
            self.outcome.notes.append(f"no checkpoint after step {step}: {error.strerror or error}")
            warnings.warn(f"{self.outcome.notes[-1]}; training goes on", stacklevel=2)

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.model, self.optimizer, accelerator=self.accelerator)
        self.begin = state["step"]
        self.outcome.seconds, self.outcome.evaluations = state["seconds"], state["evaluations"]
        self.outcome.steps = [Step(int(step), *rest) for step, *rest in state["steps"].tolist()]

    def _log(self, name: str, entries: list[dict[str, Any]]) -> None:
        """To the file `name`, and of the last entry what is a number to the trackers."""
        if self.accelerator.is_main_process:
            append(self.output / name, entries)
        if self.settings.track:
            step, last = entries[-1]["step"], entries[-1].get("metrics", entries[-1])
            self.accelerator.log({name: value for name, value in last.items() if name != "step"}, step=step)


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


def _trackers(accelerator: Accelerator, settings: Settings, output: Path, config: dict[str, Any]) -> None:
    if not settings.track:
        return
    accelerator.log_with = list(settings.track)
    accelerator.project_configuration.set_directories(str(output))
    flat = {name: value for name, value in config.items() if isinstance(value, int | float | str | bool)}
    accelerator.init_trackers("resformer", config=flat)


@contextmanager
def _random_states_kept(accelerator: Accelerator) -> Iterator[None]:
    """Dropout draws from torch's own generator: given back as it was."""
    with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
        yield
