"""The folder of a run: what is written there, and how a run that was interrupted finds it."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from resformer.files import finite, write_json_atomically
from resformer.train import checks
from resformer.train.checkpoints import CONFIG, check_whole, newest, step_of

CHECKPOINTS = "checkpoints"
TRAIN, EVALUATIONS, LAYERS = LOGS = ("train.jsonl", "evaluations.jsonl", "layers.jsonl")
PROJECT = "resformer"  # the name under which trackers know runs, and the folder of those that write files
WRITTEN = ("result.json", CHECKPOINTS, *LOGS, "model", PROJECT, "config.json")


def open_folder(
    output: Path, config: dict[str, Any], resume: str, overwrite: bool, accelerator: Accelerator
) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, or None, and what a user should know of those passed over.

    Every process calls this. Raises `ValueError` for a folder or a checkpoint that cannot be used, and leaves it.
    """
    named = checks.check_resume(resume, overwrite=overwrite)
    if named is not None:
        _check_named(named, config)
    checks.check_output(output, config, overwrite=overwrite)
    accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
    if overwrite and accelerator.is_main_process:
        _delete_run(output)
    found, broken = newest(output / CHECKPOINTS) if resume == "auto" and accelerator.is_main_process else (named, [])
    found, broken = broadcast_object_list([found, broken])
    if lacking := _count(found is not None and not found.is_dir(), accelerator):
        raise ValueError(
            f"the checkpoint {str(found)!r} is not seen by {lacking} of {accelerator.num_processes} processes; give an "
            "output folder on a disk that all machines share"
        )
    notes = [f"passed over the checkpoint {reason}" for reason in broken]
    if accelerator.is_main_process:
        for note in notes:
            warnings.warn(note, stacklevel=3)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        if not (output / "config.json").exists():
            write_json_atomically(output / "config.json", config)
    return found, notes


def _count(mine: bool, accelerator: Accelerator) -> int:
    """On how many processes it is so."""
    return int(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum"))


def _check_named(checkpoint: Path, config: dict[str, Any]) -> None:
    check_whole(checkpoint)
    if other := checks.differences(checks.read_json(checkpoint / CONFIG) or {}, config):
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} is of another configuration:\n"
            + "\n".join(other)
            + "\nGive the same, "
            "or start from its model: --model FOLDER, of a run that is finished"
        )


def _delete_run(output: Path) -> None:
    """What a run has written, and nothing else: the result first, so that a run of which the rest is left does not look
    finished, then what would be gone on from; the configuration last, by which a run is known."""
    if checks.read_json(output / "config.json") is None:
        return
    for name in WRITTEN:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def go_on_from(output: Path, begin: int, logged: dict[str, list[dict[str, Any]]]) -> None:
    """Leave in the folder what led to step `begin`: `logged`, by the name of the log, the other logs up to that step,
    and no checkpoint that came later, from which another sitting would go on."""
    for name in LOGS:
        path = output / name
        if name in logged or path.exists():
            entries = logged[name] if name in logged else _read(path, begin)
            path.write_text("".join(_line(entry) for entry in entries))
    for path in (output / CHECKPOINTS).glob("step-*"):
        if step_of(path) > begin:
            shutil.rmtree(path)


def append(path: Path, entries: list[dict[str, Any]]) -> None:
    """A line for each."""
    with path.open("a") as file:
        file.writelines(map(_line, entries))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(finite(entry)) + "\n"


def _read(path: Path, last: int) -> list[dict[str, Any]]:
    """The entries of a log up to a step."""
    entries = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut in the middle
            break
        if entry["step"] > last:
            break
        entries.append(entry)
    return entries
