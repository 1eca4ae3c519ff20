"""Runs from folders without a shared disk, brought together in one. Needs no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from resformer.study.kept import KEPT, keep
from resformer.study.plan import Study
from resformer.study.results import STUDY, Result, add_entries, check_output, read_result, read_study
from resformer.study.worker import LOG, rejected, running

COPIED = ("config.json", "train.jsonl", LOG, "result.json")  # the last is what makes a run finished
COMPARED = ("status", "score", "train_loss", "loss_curve")  # what two results of one run have in common


@dataclass(frozen=True)
class Merged:
    """What became of the runs that were found."""

    copied: int
    same: int  # there already, with the same result
    passed_over: tuple[str, ...] = ()  # a line for each result that does not count


def merge(output: Path, sources: Sequence[Path]) -> Merged:
    """Copy the finished runs of studies in `sources` into the study in `output`, and unite what was asked for.

    A source is a study's folder; of each run result.json is enough, and study.json may be missing where another folder
    has it. Runs that failed or are not finished stay where they are. Raises `ValueError`, and changes nothing, if a
    folder holds nothing of a study, or if one run has different results: the message lists them all.
    """
    output, sources = Path(output), [Path(source) for source in sources]
    check_output(output)
    folders = [output, *sources] if (output / STUDY).is_file() else sources
    entries = [entry for folder in folders for entry in _entries(folder)]
    if not entries:
        raise ValueError(f"none of {', '.join(map(str, folders))} has a {STUDY}; give one folder that does")
    chosen: dict[str, Result] = {}
    conflicts, passed_over, copies, same = [], [], [], 0
    for folder in folders:
        for result in _runs(folder):
            name = result.directory.name
            if result.problem and folder is not output:
                passed_over.append(f"{result.directory}: {result.problem}")
            if not result.finished:
                continue
            first = chosen.setdefault(name, result)
            if first is not result:
                same += 1
                conflicts += _conflict(first, result)
            elif folder is not output:
                copies.append(result.directory)
    busy = [path.name for path in copies if running(output / "runs" / path.name)]
    if busy:
        raise ValueError(f"{', '.join(busy)}: being run in {str(output)!r}; wait for the end, or stop that study")
    if conflicts:
        lines = "\n  ".join(conflicts)
        raise ValueError(
            f"the folders have different results of the same runs; nothing was merged. Delete one of each:\n  {lines}"
        )
    output.mkdir(parents=True, exist_ok=True)
    add_entries(output, entries)
    for path in (path for folder in sources for path in folder.glob(KEPT)):
        keep(output, path.read_text(encoding="utf-8"))
    for directory in copies:
        _copy(directory, output / "runs" / directory.name)
    return Merged(len(copies), same, tuple(passed_over))


def _entries(folder: Path) -> list[dict]:
    """What was run into a folder, of this version; none where there are only its runs."""
    if not (folder / STUDY).exists() and any(folder.glob("runs/*/result.json")):
        return []
    entries = read_study(folder)
    for entry in entries:
        try:
            Study.read(entry["study"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(folder / STUDY)!r} cannot be merged: {error}") from None
    return entries


def _runs(folder: Path) -> Iterator[Result]:
    for directory in sorted(folder.glob("runs/*")):
        if directory.is_dir():
            yield read_result(directory)


def _conflict(one: Result, other: Result) -> list[str]:
    """A line if two results of one run are not the same: what differs, and where they are."""
    differ = [name for name in COMPARED if getattr(one, name) != getattr(other, name)]
    if not differ:
        return []
    values = [f"{name} {getattr(one, name)!r} and {getattr(other, name)!r}" for name in differ if name != "loss_curve"]
    return [f"{one.directory} and {other.directory}: {', '.join(values) or 'different loss curves'}"]


def _copy(source: Path, target: Path) -> None:
    """The files of a run, each whole or not at all, and its result last."""
    target.mkdir(parents=True, exist_ok=True)
    if (target / "result.json").exists():  # which does not count
        os.replace(target / "result.json", rejected(target))
    for name in COPIED:
        if (source / name).is_file():
            part = target / f".{name}.part"
            shutil.copyfile(source / name, part)
            os.replace(part, target / name)
    (target / "error.json").unlink(missing_ok=True)
