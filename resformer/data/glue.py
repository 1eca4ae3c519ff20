"""Tasks as data sets: generated, from local files in GLUE's layouts, or from the hub."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

from resformer.data.builtin import generate
from resformer.data.tables import FORMATS, Columns, columns_of, read_table
from resformer.data.tasks import TASKS, Task
from resformer.errors import unknown

HUB = "nyu-mll/glue"
DATA = "RESFORMER_DATA"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
SUFFIXES = ("parquet", "jsonl", "json", "tsv", "csv")
ALIASES = {
    "train": ("train",),
    "validation": ("validation", "dev"),
    "validation_matched": ("validation_matched", "dev_matched"),
    "validation_mismatched": ("validation_mismatched", "dev_mismatched"),
}
SCORES = (0.0, 5.0)  # of STS-B, the only regression


@dataclass(frozen=True)
class Official:
    """How the files of GLUE's own archive differ from ours."""

    folder: str
    rename: dict[str, str] = field(default_factory=dict)  # its column -> ours
    headerless: tuple[str, ...] = ()  # the columns, if its TSV has no header
    broken: bool = False  # some of its rows are torn apart by line breaks


OFFICIAL = {
    "cola": Official("CoLA", headerless=("source", "label", "mark", "sentence")),
    "sst2": Official("SST-2"),
    "mrpc": Official("MRPC", {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"}),
    "stsb": Official("STS-B", {"score": "label"}),
    "qqp": Official("QQP", {"is_duplicate": "label"}, broken=True),
    "mnli": Official("MNLI", {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}),
    "qnli": Official("QNLI"),
    "rte": Official("RTE"),
    "wnli": Official("WNLI"),
}


def load_task(name: str, data: str | Path | None = None, *, seed: int = 0) -> DatasetDict:
    """The train and evaluation splits of a task, with the columns `Task.columns`.

    data   a directory that holds the split files, itself or in a folder named like the task. None: built-in
           tasks are generated from `seed`; others are looked for in the directory that the environment
           variable RESFORMER_DATA names (also in its folder `glue`), then on the hub

    Split files are called train, validation (or dev) and, for mnli, validation_matched and
    validation_mismatched (or dev_...), of which one is enough; they end in .parquet (also in several parts, as on
    the hub), .jsonl, .tsv or .csv. Labels are ids or names and come back as ids in the order of the task.

    Raises ValueError, and loads nothing, for an unknown task, a missing directory or split, missing
    columns, empty or unreadable files, missing texts, and labels that the task does not have.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    task = TASKS[name]
    if task.builtin and data is None:
        return generate(name, seed=seed)
    folder = _folder(task, data)
    if folder is None:
        return _from_hub(task)
    files = {split: _split_files(folder, split) for split in ("train", *task.splits)}
    if not files["train"] or not any(files[split] for split in task.splits):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
        raise ValueError(f"{folder} does not hold {name!r}: {_layout(task)} Found: {found}.")
    return DatasetDict({split: _read_split(task, paths) for split, paths in files.items() if paths})


def write_task(
    name: str, directory: str | Path, *, format: str = "parquet", data: str | Path | None = None, seed: int = 0
) -> list[Path]:
    """Write each split of a task as `directory/SPLIT.FORMAT`, so that `load_task(name, directory)` gives the same.

    format   parquet, tsv or jsonl; the latter two hold class names as labels
    data, seed   as for `load_task`

    Returns the files. Raises ValueError if the directory holds anything, or a text does not fit the format.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; give a new or empty directory")
    if directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"directory {directory} is not empty; give a new or empty one")
    splits = load_task(name, data, seed=seed)
    content = {directory / f"{split}.{format}": FORMATS[format](dataset) for split, dataset in splits.items()}
    directory.mkdir(parents=True, exist_ok=True)
    for path, written in content.items():
        path.write_bytes(written)
    return list(content)


def _folder(task: Task, data: str | Path | None) -> Path | None:
    """The directory of the task's files; None if no place is known to hold it."""
    if data is None and not os.environ.get(DATA):
        return None
    given = f"data directory {str(data)!r}" if data is not None else f"{DATA}={os.environ[DATA]!r}"
    root = Path(os.environ[DATA] if data is None else data).expanduser()
    if not root.is_dir():
        raise ValueError(f"{given} is not a directory; {_layout(task)}")
    names = [task.name, *([OFFICIAL[task.name].folder] if task.name in OFFICIAL else [])]
    if data is not None:
        return next((root / name for name in names if (root / name).is_dir()), root)
    places = [place / name for place in (root, root / "glue") for name in names]
    return next((place for place in places if place.is_dir()), None)


def _split_files(folder: Path, split: str) -> list[Path]:
    """The file of a split, or all its parts in order; empty if there is none."""
    pattern = re.compile(rf"({'|'.join(ALIASES[split])})(?:-\d+-of-(\d+))?\.({'|'.join(SUFFIXES)})")
    matches = [(match, path) for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))]
    kinds = {match.groups() for match, _ in matches}
    names = ", ".join(path.name for _, path in matches)
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds the split {split!r} more than once: {names}; keep one of them")
    for _, parts, _ in kinds:
        if parts and len(matches) != int(parts):
            raise ValueError(f"{folder} holds {len(matches)} of the {parts} parts of the split {split!r}: {names}")
    return [path for _, path in matches]


def _read_split(task: Task, paths: list[Path]) -> Dataset:
    official = OFFICIAL.get(task.name, Official(""))
    parts = []
    for path in paths:
        columns, found = read_table(
            path,
            {*task.columns, *official.rename},
            headerless=official.headerless,
            skip_broken=official.broken,
        )
        renamed = {official.rename.get(name, name): values for name, values in columns.items()}
        own = {name: values for name, values in columns.items() if name in task.columns}
        parts.append(_checked(task, renamed | own, found, str(path)))
    columns = {name: [value for part in parts for value in part[name]] for name in task.columns}
    return Dataset.from_dict(columns, features=task.features())


def _from_hub(task: Task) -> DatasetDict:
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if offline:
        raise ValueError(f"no data for {task.name!r}, and {offline[0]} forbids the hub: {_layout(task)}")
    splits = ["train", *task.splits]
    try:
        parts = load_dataset(HUB, task.name, split=splits)
    except OSError as error:
        raise ValueError(f"no data for {task.name!r}: {error}. Without the hub, {_layout(task)}") from error
    loaded = DatasetDict()
    for split, part in zip(splits, parts, strict=True):
        columns = columns_of(part.with_format("arrow")[:], part.features, task.columns)
        checked = _checked(task, columns, part.column_names, f"{HUB} {task.name} {split}")
        loaded[split] = Dataset.from_dict(checked, features=task.features())
    return loaded


def _layout(task: Task) -> str:
    """What to give, for messages."""
    splits = " and ".join("/".join(ALIASES[split]) for split in ("train", *task.splits[:1]))
    return (
        f"give a data directory (--data) that is or holds {task.name}/, or set {DATA} to one that holds "
        f"{task.name}/ or glue/{task.name}/, with the files {splits}, ending in .{', .'.join(SUFFIXES)} "
        "(parquet also in parts, such as train-00000-of-00001.parquet), "
        f"with the columns {', '.join(task.columns)}."
    )


def _checked(task: Task, columns: Columns, found: list[str], where: str) -> Columns:
    """The task's columns with labels as ids (scores as floats)."""
    missing = [name for name in task.columns if name not in columns]
    if missing:
        raise ValueError(
            f"{where} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"{task.name!r} needs {', '.join(task.columns)}; found {', '.join(found)}"
        )
    if not columns["label"]:
        raise ValueError(f"{where} has no rows")
    for name in task.columns:
        if name != "label":
            for row, value in enumerate(columns[name], 1):
                if not isinstance(value, str):
                    raise ValueError(f"{where}: {name!r} of row {row} is {value!r}, not a text")
    labels = list(_labels(task, columns["label"], where))
    return {name: labels if name == "label" else columns[name] for name in task.columns}


def _labels(task: Task, values: list[Any], where: str) -> Iterator[int | float]:
    """Ids of the classes, or scores."""
    ids: dict[Any, int] = {}
    for i, name in enumerate(task.labels or ()):
        ids |= {i: i, str(i): i, name: i}

    def read(value: Any) -> int | float | None:
        if task.labels is None:
            return _score(value)
        return ids.get(value) if isinstance(value, str | int | float) else None

    for row, value in enumerate(values, 1):
        label = read(value)
        if label is None:
            unlabelled = " (-1 marks the unlabelled test split)" if value in (-1, "-1") else ""
            raise ValueError(
                f"{where}: label {value!r} in row {row}{unlabelled} is none of {task.name!r}; it has {_allowed(task)}"
            )
        yield label


def _score(value: Any) -> float | None:
    """A number within `SCORES`, else None."""
    try:
        score = float(value)
    except (TypeError, ValueError):
        return None
    return score if SCORES[0] <= score <= SCORES[1] else None


def _allowed(task: Task) -> str:
    if task.labels is None:
        return f"scores from {SCORES[0]:g} to {SCORES[1]:g}"
    return ", ".join(f"{i} or {label!r}" for i, label in enumerate(task.labels))
