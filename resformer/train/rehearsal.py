"""A rehearsal of a run: what a step takes, and two of them; nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from transformers import PreTrainedModel

from resformer.train.checks import check_output
from resformer.train.cost import peak_memory_mb, reset_peak_memory
from resformer.train.job import Job
from resformer.train.loop import Step
from resformer.train.plan import Plan, plan
from resformer.train.progress import duration
from resformer.train.run import random_states_kept
from resformer.train.settings import Settings
from resformer.train.sitting import Sitting, make_ready


@dataclass(frozen=True)
class Rehearsal:
    """What a run would be, and what its first step was."""

    config: dict[str, Any]
    epoch: int  # steps in one pass over the data
    processes: int
    plan: Plan  # of one process
    step: Step
    seconds: float  # of the second step: the first sets things up
    peak_memory_mb: float  # of this process, or on its GPU

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        steps = self.config.get("steps")
        length = f"{steps:,} steps" if steps else f"{self.config['seconds']:,.0f} seconds"
        passes = f", {steps / self.epoch:.3g} passes over the data" if steps else ""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim")
        table.add_column()
        table.add_row("run", f"{length} of {self.config['batch_size']:,} examples{passes}")
        table.add_row("processes", f"{self.processes}")
        table.add_row("first step", f"loss {self.step.loss:.4f}, gradient norm {self.step.grad_norm:.3g}")
        about = f"; about {duration(self.seconds * steps)} of training" if steps else ""
        table.add_row("a step", f"{self.seconds:.3g} s{about}")
        table.add_row("peak memory", f"{self.peak_memory_mb:,.0f} MiB until now, all in all")
        yield table
        yield ""
        yield self.plan


def rehearse(
    model: PreTrainedModel, job: Job, output: Path, settings: Settings, *, overwrite: bool = False
) -> Rehearsal:
    """Look at the folder, measure a step, take two, and write nothing. The model is trained by them: drop it.

    Raises `ValueError` as `resformer.train.run.run` does.
    """
    check_output(output, job.config, overwrite=overwrite)
    accelerator = job.accelerator
    reset_peak_memory(accelerator.device)
    with job.around(), random_states_kept(accelerator):
        make_ready(model, job, settings)
        part = -(-settings.batch_size // accelerator.num_processes)
        micro = min(part, settings.micro_batch_size or part)
        found = plan(
            model,
            batch=micro,
            length=job.heaviest(1)["input_ids"].shape[1],
            precision=settings.precision,
            loss=lambda called, size, length: called(**send_to_device(job.heaviest(size), accelerator.device)).loss,
        )
        sitting = Sitting(model, job, output, settings, None, lambda: False)
        windows = islice(sitting.windows(lambda step: None, look=lambda step: True), 2)
        started, taken = time.perf_counter(), []
        for window in windows:  # one, if its loss is not finite
            taken.append((window[0], time.perf_counter() - started))
            started = time.perf_counter()
    peak = peak_memory_mb(accelerator.device)
    return Rehearsal(job.config, job.epoch, accelerator.num_processes, found, taken[0][0], taken[-1][1], peak)
