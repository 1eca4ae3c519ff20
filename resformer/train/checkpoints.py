"""Checkpoints of a run in progress: written whole or not at all, and found again by what is whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from resformer.files import fsync_folder, write_json_atomically

COMPLETE = "COMPLETE"  # size and checksum of the file beside it, written last
DATA = "training.pt"
CONFIG = "config.json"  # of the run, by which a checkpoint in another folder is known
NAME = re.compile(r"step-(\d{9})")


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    config: dict[str, Any],
    *,
    accelerator: Accelerator,
    keep: int,
) -> None:
    """Write `folder/step-NNNNNNNNN` with the weights, the optimizer, `state` and the configuration of the run, and
    delete all but the last `keep`.

    Every process calls this. The weights and the optimizer are whole and keyed by parameter, so that any number of
    processes can go on from them, sharded or not. A folder appears under its name when it is whole and on disk, and
    other checkpoints are deleted only then. Raises what the file system raises (`OSError`), on the main process.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, _bare(optimizer), options=whole)
    if not accelerator.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*"):  # by a process that was killed while it wrote
        shutil.rmtree(left)
    temporary, final = folder / f".step-{step:09d}", folder / f"step-{step:09d}"
    temporary.mkdir()
    try:
        with open(temporary / DATA, "wb") as file:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            torch.save({"weights": weights, "optimizer": moments, "scaler": scaler, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        write_json_atomically(temporary / CONFIG, config)
        write_json_atomically(temporary / COMPLETE, _measure(temporary / DATA))
        if final.exists():  # not whole, or it would have been gone on from
            shutil.rmtree(final)
        os.replace(temporary, final)
        fsync_folder(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # as torch tells of a full disk
            raise error.__context__ from error
        raise
    for path in _all(folder)[keep:]:
        shutil.rmtree(path)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, or None; and of each newer one that is not, what is wrong with it."""
    broken: list[str] = []
    for path in _all(folder):
        if (reason := _broken(path)) is None:
            return path, broken
        broken.append(f"{path}: {reason}")
    return None, broken


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, *, accelerator: Accelerator) -> dict[str, Any]:
    """Put the weights and the optimizer back, on every process; returns the `state` that was saved with them.

    Raises `ValueError` for a checkpoint that is not whole.
    """
    check_whole(path)
    found = torch.load(path / DATA, map_location="cpu", weights_only=True)
    set_state_dict(
        model,
        _bare(optimizer),
        model_state_dict=found["weights"],
        optim_state_dict=found["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    if accelerator.scaler is not None and found["scaler"] is not None:
        accelerator.scaler.load_state_dict(found["scaler"])
    return found["state"]


def check_whole(path: Path) -> None:
    """A `ValueError` that says why a checkpoint is not whole."""
    if (reason := _broken(path)) is not None:
        raise ValueError(f"the checkpoint {str(path)!r} cannot be used: {reason}; give another, or resume='auto'")


def step_of(path: Path) -> int:
    """The optimizer steps that had been taken."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{str(path)!r} is no checkpoint; their folders are called step-000001200 and the like")
    return int(match[1])


def _all(folder: Path) -> list[Path]:
    """From the newest to the oldest."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), reverse=True)


def _broken(path: Path) -> str | None:
    try:
        promised = json.loads((path / COMPLETE).read_text())
        size = f"{promised['bytes']:,} bytes"
    except (OSError, ValueError, TypeError, LookupError):
        return f"it has no {COMPLETE}, so it was not written to its end"
    try:
        found = _measure(path / DATA)
    except OSError as error:
        return f"{DATA} cannot be read: {error.strerror}"
    if found != promised:
        return f"{DATA} has {found['bytes']:,} bytes, and another content than the {size} written"
    return None


def _measure(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _bare(optimizer: Any) -> Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
