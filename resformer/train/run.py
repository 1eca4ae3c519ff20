"""A run in a folder: what pre-training and fine-tuning have in common besides the loop."""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from resformer.calibration import calibrate, uncalibrated
from resformer.files import finite, write_json_atomically
from resformer.optim import param_groups
from resformer.train import checks
from resformer.train.checkpoints import load_checkpoint, newest, save_checkpoint, step_of
from resformer.train.loop import WINDOW, Part, Step, windows
from resformer.train.progress import progress_bar
from resformer.train.schedule import factor
from resformer.train.settings import Settings
from resformer.train.stopping import stop_requests
from resformer.train.watch import watched

CHECKPOINTS = "checkpoints"
LOGS = ("train.jsonl", "evaluations.jsonl", "layers.jsonl")  # a line a step, an evaluation, a look at the layers
WRITTEN = ("config.json", "result.json", "README.md", *LOGS, CHECKPOINTS, "model", "trackers")
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
    """What a run trains on.

    Args:
        epoch: optimizer steps in one pass over the data.
        batches: (steps taken, process, processes) -> this process's parts of each further batch.
        first: the first batch whole, by which schemes calibrate that ask for it.
        evaluate: the prepared model -> an `Evaluation`; called on every process.
        units: what is counted ("examples", "tokens"), and how many of them a step has on average.
        tokens: of text in a step, on average.
    """

    epoch: int
    batches: Callable[[int, int, int], Iterator[list[Part]]]
    first: Callable[[], dict[str, Tensor]]
    evaluate: Callable[[Any], Evaluation]
    units: tuple[str, float]
    tokens: float


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
    config: dict[str, Any],
    settings: Settings,
    *,
    accelerator: Accelerator,
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
        config: all that the outcome depends on; a folder with another one is refused.
        resume: "auto", from the newest whole checkpoint of this folder, if there is one; "never"; or the folder of one
            checkpoint.
        overwrite: delete what an earlier run left in this folder.
    """
    steps = settings.resolved(job.epoch).get("steps", 0)
    main = accelerator.is_main_process
    outcome = Outcome()
    start = _start(output, config, resume, overwrite, accelerator, outcome)
    model.to(accelerator.device)
    if uncalibrated(model):  # before it is wrapped, and on the whole batch, so that every process finds the same
        calibrate(model, {name: tensor.to(accelerator.device) for name, tensor in job.first().items()})
    if settings.gradient_checkpointing:
        of_any_version = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        of_any_version({"use_reentrant": False})
    groups = param_groups(model, settings.learning_rate, settings.weight_decay, settings.scheme_lr_multiplier)
    optimizer: Any = torch.optim.AdamW(groups, fused=True)  # deep narrow nets have thousands of small parameters
    peaks = [group["lr"] for group in groups]
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    begin = 0
    if start is not None:
        state = load_checkpoint(start, wrapped, optimizer, accelerator=accelerator)
        begin, outcome.seconds, outcome.evaluations = state["step"], state["seconds"], state["evaluations"]
        outcome.steps = [Step(int(step), *rest) for step, *rest in state["steps"].tolist()]
    if main:
        _begin_logs(output, begin)
    trackers = _trackers(accelerator, settings, output, config)
    called: Any = torch.compile(wrapped, dynamic=True) if settings.compile else wrapped

    rate = factor(settings.schedule, steps=steps if settings.seconds is None else FINE, warmup=settings.warmup)
    before = outcome.seconds
    started = time.perf_counter()
    share = [before / settings.seconds if settings.seconds else 0.0]  # of the time, at the last look

    def set_rate(step: int) -> None:
        at = rate(step if settings.seconds is None else min(FINE, round(FINE * share[0])))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * at

    def save(step: int) -> None:
        state = {
            "step": step,
            "seconds": outcome.seconds,
            "evaluations": outcome.evaluations,
            "steps": torch.tensor([astuple(step) for step in outcome.steps], dtype=torch.float64),
        }
        try:
            save_checkpoint(
                output / CHECKPOINTS, step, wrapped, optimizer, state, accelerator=accelerator, keep=settings.keep
            )
        except OSError as error:
            outcome.notes.append(f"no checkpoint after step {step}: {error.strerror or error}")
            warnings.warn(f"{outcome.notes[-1]}; training goes on", stacklevel=2)

    def evaluate(step: int) -> None:
        outcome.last = job.evaluate(called)
        if not outcome.last.finite:
            return
        found = {"step": step, "score": outcome.last.score, "metrics": outcome.last.metrics}
        if found in outcome.evaluations:  # of a run that was interrupted after its last step
            return
        outcome.evaluations.append(found)
        if main:
            _append(output / LOGS[1], [found])
        if trackers:
            accelerator.log(outcome.last.metrics, step=step)

    def look(step: int) -> bool:
        every = (WINDOW, settings.evaluate_every, settings.save_every)
        return any(step % n == 0 for n in every if n) or (stop() and accelerator.num_processes == 1)

    evaluated = 0
    with (
        stop_requests() as stop,
        _random_states_kept(accelerator),
        progress_bar(steps, shown=progress and main, seconds=settings.seconds) as update,
        watched(wrapped, settings.watch_every, output / LOGS[2] if main else None, begin) as on_step,
    ):

        def stepped(step: int) -> None:
            on_step(step)
            update(completed=step)

        update(completed=begin)
        for window in windows(
            called,
            job.batches(begin, accelerator.process_index, accelerator.num_processes),
            optimizer,
            set_rate,
            steps=steps if settings.seconds is None else begin + 10**9,
            begin=begin,
            seed=settings.seed,
            accelerator=accelerator,
            clip=settings.clip or None,
            look=look,
            on_step=stepped,
        ):
            step = window[-1].step
            outcome.steps += window
            outcome.seconds, stopping = _agree(
                [before + time.perf_counter() - started, stop()], accelerator, outcome.seconds
            )
            share[0] = outcome.seconds / settings.seconds if settings.seconds else 0.0
            update(note=_note(window[-1], job, outcome.seconds - before, step - begin))
            if main:
                _append(output / LOGS[0], [asdict(one) for one in window])
            if trackers:
                accelerator.log({k: v for k, v in asdict(window[-1]).items() if k != "step"}, step=step)
            if not math.isfinite(window[-1].loss):
                outcome.status = "diverged"
                break
            over = share[0] >= 1.0 or step == steps
            if settings.evaluate_every and step % settings.evaluate_every == 0:
                evaluate(step)
                evaluated = step
                if outcome.last is not None and not outcome.last.finite:
                    outcome.status = "diverged"
                    break
                over = over or _patience_is_over(outcome.evaluations, settings.patience)
            if stopping and not over:
                save(step)
                outcome.status = "stopped"
                break
            if settings.save_every and step % settings.save_every == 0:
                save(step)
            if over:
                break
        if outcome.status == "ok" and evaluated != outcome.steps[-1].step:
            evaluate(outcome.steps[-1].step)
            if outcome.last is not None and not outcome.last.finite:  # weights can break in the very last step
                outcome.status = "diverged"
    if trackers:
        accelerator.end_training()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes the autocast off `model`
    return outcome


def _start(
    output: Path, config: dict[str, Any], resume: str, overwrite: bool, accelerator: Accelerator, outcome: Outcome
) -> Path | None:
    """The checkpoint to go on from, or None; a `ValueError` for a folder that cannot be used."""
    if overwrite:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _delete_run(output)
        accelerator.wait_for_everyone()
    checks.check_output(output, config)
    found: Path | None = None
    broken: list[str] = []
    if resume == "auto":
        found, broken = newest(output / CHECKPOINTS)
    elif resume != "never":
        found = Path(resume)
        step_of(found)
        if not found.is_dir():
            raise ValueError(f"resume is {resume!r}, and there is no such folder; give 'auto', 'never' or a checkpoint")
    for reason in broken:
        outcome.notes.append(f"passed over the checkpoint {reason}")
        if accelerator.is_main_process:
            warnings.warn(outcome.notes[-1], stacklevel=3)
    accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if not (output / "config.json").exists():
            write_json_atomically(output / "config.json", config)
    return found


def _delete_run(output: Path) -> None:
    """What a run has written, and nothing else."""
    if checks.read_json(output / "config.json") is None:
        return
    for name in reversed(WRITTEN):  # the configuration last, by which a run is known
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _begin_logs(output: Path, begin: int) -> None:
    """Leave of the logs what was logged up to the step from which the run goes on."""
    for name in LOGS:
        path = output / name
        if not path.exists():
            continue
        kept = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut in the middle
                break
            if entry["step"] > begin:
                break
            kept.append(line + "\n")
        path.write_text("".join(kept))
    if begin == 0:
        (output / LOGS[0]).write_text("")


def _append(path: Path, entries: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(finite(entry)) + "\n" for entry in entries)


def _agree(mine: list[Any], accelerator: Accelerator, before: float) -> tuple[float, bool]:
    """The main process's clock, and whether any process was asked to stop."""
    if accelerator.num_processes == 1:
        return mine[0], mine[1]
    stops = accelerator.reduce(torch.tensor(float(mine[1]), device=accelerator.device), "sum")
    clock = broadcast_object_list([mine[0]])[0]
    return clock, bool(stops > 0)


def _patience_is_over(evaluations: list[dict[str, Any]], patience: int | None) -> bool:
    if patience is None or len(evaluations) <= patience:
        return False
    best = max(one["score"] for one in evaluations[:-patience])
    return all(one["score"] <= best for one in evaluations[-patience:])


def _note(step: Step, job: Job, seconds: float, taken: int) -> str:
    unit, each = job.units
    return f"loss {step.loss:.3f}  lr {step.learning_rate:.1e}  {each * taken / seconds:,.0f} {unit}/s"


def _trackers(accelerator: Accelerator, settings: Settings, output: Path, config: dict[str, Any]) -> bool:
    if not settings.track:
        return False
    accelerator.log_with = list(settings.track)
    accelerator.project_configuration.set_directories(str(output))
    flat = {name: value for name, value in config.items() if isinstance(value, int | float | str | bool)}
    accelerator.init_trackers("resformer", config=flat)
    return True


@contextmanager
def _random_states_kept(accelerator: Accelerator) -> Iterator[None]:
    """Dropout draws from torch's own generator: given back as it was."""
    with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
        yield
