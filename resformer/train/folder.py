"""The folder of a run: what is written there, and how a run that was interrupted finds it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from resformer.files import finite, write_json_atomically
from resformer.train import checks
from resformer.train.checkpoints import newest, step_of

CHECKPOINTS = "checkpoints"
TRAIN, EVALUATIONS, LAYERS = LOGS = ("train.jsonl", "evaluations.jsonl", "layers.jsonl")
WRITTEN = ("config.json", "result.json", "README.md", *LOGS, CHECKPOINTS, "model", "trackers")


def open_folder(
    output: Path, config: dict[str, Any], resume: str, overwrite: bool, accelerator: Accelerator
) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, or None, and what a user should know of those passed over.

    Every process calls this. Raises `ValueError` for a folder that cannot be used.
    """
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
    notes = [f"passed over the checkpoint {reason}" for reason in broken]
    if accelerator.is_main_process:
        for note in notes:
            warnings.warn(note, stacklevel=3)
    accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if not (output / "config.json").exists():
            write_json_atomically(output / "config.json", config)
    return found, notes


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


def begin_logs(output: Path, begin: int) -> None:
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


def append(path: Path, entries: list[dict[str, Any]]) -> None:
    """A line for each."""
    with path.open("a") as file:
        file.writelines(json.dumps(finite(entry)) + "\n" for entry in entries)
