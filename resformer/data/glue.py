"""Tasks as data sets: generated, from local files, from the cache of `datasets`, or from the hub."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from datasets.packaged_modules.cache.cache import Cache

from resformer.data.builtin import generate
from resformer.data.layouts import accepted, find_folder, from_dataset, official, read_splits
from resformer.data.tables import FORMATS, Columns, Table
from resformer.data.tasks import TASKS, Task
from resformer.errors import unknown

DATA = "RESFORMER_DATA"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
SCORES = (0.0, 5.0)  # of STS-B, the only regression
UNLABELLED = (-1, -1.0, "-1", "-1.0", "", None)  # how files say that a label is not given

Say = Callable[[str], None]


def load_task(name: str, data: str | Path | None = None, *, seed: int = 0, say: Say | None = None) -> DatasetDict:
    """The train and evaluation splits of a task, with the columns `Task.columns`.

    data   a directory that holds the split files, itself or in a folder named like the task. None: built-in
           tasks are generated from `seed`; others are looked for in the directory that the environment
           variable RESFORMER_DATA names (also in its folder `glue`), in the cache of `datasets`, and on the hub
    say    is called once with a line: where the data were found, the rows of each split, how many examples
           without a label were left out (snli), and where the official data have another number of rows

    Split files are called train, validation (or dev) and, for mnli, validation_matched and
    validation_mismatched (or dev_...), of which one is enough; they end in .parquet (also in several parts, as on
    the hub), .jsonl, .tsv or .csv. Folders of `save_to_disk` and of the official archives are read as they are.
    Labels are ids or names and come back as ids in the order of the task.

    Raises ValueError, and loads nothing, for an unknown task, a missing directory or split, missing
    columns, empty or unreadable files, missing texts, and labels that the task does not have.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    task = TASKS[name]
    return _load(task, data, (("train",), task.splits), labelled=True, seed=seed, say=say)


def load_split(
    name: str, split: str, data: str | Path | None = None, *, seed: int = 0, say: Say | None = None
) -> DatasetDict:
    """The splits called `split`, for prediction: of mnli, "test" is test_matched and test_mismatched, or one of them.

    Labels may be missing, as a column or in rows, or be -1: these come back as -1, those of a regression as NaN.
    The rest is as for `load_task`. Raises ValueError also for a split that the task does not have.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    task = TASKS[name]
    known = ("train", *task.splits, *task.tests)
    wanted = tuple(known_split for known_split in known if known_split == split or known_split.startswith(f"{split}_"))
    if not wanted:
        raise unknown("split", split, known, of=f"task {name!r}")
    return _load(task, data, (wanted,), labelled=False, seed=seed, say=say)


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


def _load(
    task: Task,
    data: str | Path | None,
    needed: tuple[tuple[str, ...], ...],
    *,
    labelled: bool,
    seed: int,
    say: Say | None,
) -> DatasetDict:
    """The splits in `needed`, of each group at least one."""
    splits = tuple(split for group in needed for split in group)
    if task.builtin and data is None:
        generated = generate(task.name, seed=seed)
        loaded = DatasetDict({split: generated[split] for split in splits})
        where, dropped = f"its grammar with seed {seed}", dict.fromkeys(splits, 0)
    else:
        tables, where = _find(task, data, splits, needed)
        loaded, dropped = DatasetDict(), {}
        for split, table in tables.items():
            kept = _decided(task, table) if labelled else table
            columns = _checked(task, kept, labelled)
            loaded[split] = Dataset.from_dict(columns, features=task.features())
            dropped[split] = len(table) - len(kept)
    if say is not None:
        say(_summary(task, loaded, where, dropped))
    return loaded


def _find(
    task: Task, data: str | Path | None, splits: tuple[str, ...], needed: tuple[tuple[str, ...], ...]
) -> tuple[dict[str, Table], str]:
    """The first place that has the task, and what it holds of the splits."""
    layout = accepted(task, tuple(group[0] for group in needed))
    folder = _folder(task, data, layout)
    if folder is not None:
        tables = read_splits(folder, task, splits)
        if not all(any(split in tables for split in group) for group in needed):
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
            raise ValueError(f"{folder} does not hold {task.name!r}: {layout} Found: {found}.")
        return tables, str(folder)
    hub, config = official(task).hub, official(task).hub_config(task)
    cached = _cached(hub, config)
    if cached is None or not set(splits) <= set(cached):
        cached, place = _from_hub(task, hub, config, splits, layout), f"{hub} on the hub"
    else:
        place = f"{hub} in the cache of datasets"
    return {split: from_dataset(cached[split], task, f"{hub} {config} {split}") for split in splits}, place


def _folder(task: Task, data: str | Path | None, layout: str) -> Path | None:
    """The directory of the task's files; None if no place is known to hold it."""
    if data is None and not os.environ.get(DATA):
        return None
    given = f"data directory {str(data)!r}" if data is not None else f"{DATA}={os.environ[DATA]!r}"
    root = Path(os.environ[DATA] if data is None else data).expanduser()
    if not root.is_dir():
        raise ValueError(f"{given} is not a directory; {layout}")
    found = find_folder(root, task)
    return found or (root if data is not None else None)


def _cached(hub: str, config: str) -> DatasetDict | None:
    """What `datasets` keeps of an earlier download, without asking the hub."""
    try:
        name = hub.rpartition("/")[2]
        return Cache(repo_id=hub, dataset_name=name, config_name=config, version="auto", hash="auto").as_dataset()
    except (ValueError, OSError):  # it has none, or half of one
        return None


def _from_hub(task: Task, hub: str, config: str, splits: tuple[str, ...], layout: str) -> DatasetDict:
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    if offline:
        raise ValueError(
            f"no data for {task.name!r}, the cache of datasets does not hold {hub} either, and {offline[0]} forbids "
            f"the hub: {layout}"
        )
    try:
        parts = load_dataset(hub, config, split=list(splits))
    except OSError as error:
        raise ValueError(f"no data for {task.name!r}: {error}. Without the hub, {layout}") from error
    return DatasetDict(dict(zip(splits, parts, strict=True)))


def _summary(task: Task, loaded: DatasetDict, where: str, dropped: dict[str, int]) -> str:
    """Where the data are from, and how many rows there are."""
    parts = []
    for split, dataset in loaded.items():
        part = f"{split} {len(dataset):,} rows"
        if dropped[split]:
            part += f" ({dropped[split]:,} without a label are left out)"
        rows = official(task).rows.get(split, len(dataset))
        if rows != len(dataset):
            part += f" (the official data have {rows:,})"
        parts.append(part)
    return f"{task.name} from {where}: {', '.join(parts)}"


def _decided(task: Task, table: Table) -> Table:
    """Without the rows on whose label the annotators did not agree."""
    if official(task).undecided is None or "label" not in table.columns:
        return table
    without = (official(task).undecided, *UNLABELLED)
    kept = [row for row, label in enumerate(table.columns["label"]) if label not in without]
    return table if len(kept) == len(table) else table.select(kept)


def _checked(task: Task, table: Table, labelled: bool) -> Columns:
    """The task's columns with labels as ids (scores as floats)."""
    needed = [name for name in task.columns if labelled or name in task.texts]
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise ValueError(
            f"{table.where} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"{task.name!r} needs {', '.join(needed)}; found {', '.join(table.found)}"
        )
    if not len(table):
        raise ValueError(f"{table.where} has no rows")
    for name in needed:
        if name != "label":
            for row, value in enumerate(table.columns[name]):
                if not isinstance(value, str):
                    raise ValueError(f"{table.at(row)}: {name!r} is {value!r}, not a text")
    absent = [None] * len(table)
    columns = {name: table.columns.get(name, absent) for name in task.columns}
    return columns | {"label": list(_labels(task, table, columns["label"], labelled))}


def _labels(task: Task, table: Table, values: list[Any], labelled: bool) -> Iterator[int | float]:
    """Ids of the classes, or scores."""
    ids: dict[Any, int] = {}
    for i, name in enumerate(task.labels or ()):
        ids |= {i: i, str(i): i, name: i}
    unlabelled = () if labelled else (*UNLABELLED, official(task).undecided)

    def read(value: Any) -> int | float | None:
        if isinstance(value, str | int | float | None) and value in unlabelled:
            return math.nan if task.labels is None else -1
        if task.labels is None:
            return _score(value)
        return ids.get(value) if isinstance(value, str | int | float) else None

    for row, value in enumerate(values):
        label = read(value)
        if label is None:
            hint = " (-1 marks the unlabelled test split)" if value in (-1, "-1") else ""
            raise ValueError(
                f"{table.at(row)}: label {value!r}{hint} is none of {task.name!r}; it has {_allowed(task)}"
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
