"""A run in a folder: what pre-training and fine-tuning have in common besides the loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from resformer.train.folder import LAYERS, PROJECT, go_on_from, open_folder
from resformer.train.job import Job, Outcome
from resformer.train.progress import progress_bar
from resformer.train.settings import Settings
from resformer.train.sitting import Sitting
from resformer.train.stopping import stop_requests
from resformer.train.watch import watched


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
    if settings.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing; lower micro_batch_size instead")
    accelerator = job.accelerator
    start, notes = open_folder(output, job.config, resume, overwrite, accelerator)
    main = accelerator.is_main_process
    with job.around(), stop_requests() as stop, random_states_kept(accelerator):
        sitting = Sitting(model, job, output, settings, start, stop)
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
        for tracker in accelerator.trackers if settings.track else ():
            tracker.finish()  # `end_training` would take the processes apart, which have yet to agree on the result
    accelerator.unwrap_model(sitting.model, keep_fp32_wrapper=False)  # takes the autocast off `model`
    return sitting.outcome


def _trackers(accelerator: Accelerator, settings: Settings, output: Path, config: dict[str, Any]) -> None:
    if not settings.track:
        return
    accelerator.log_with = list(settings.track)
    accelerator.project_configuration.set_directories(str(output))
    flat = {name: value for name, value in config.items() if isinstance(value, int | float | str | bool)}
    accelerator.init_trackers(PROJECT, config=flat)


@contextmanager
def random_states_kept(accelerator: Accelerator) -> Iterator[None]:
    """Dropout draws from torch's own generator: given back as it was."""
    with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
        yield
