"""How the data of the tasks lie on disk and on the hub: folders, files, column names, numbers of rows."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_from_disk

from resformer.data.tables import Table, columns_of, read_table
from resformer.data.tasks import Task

SUFFIXES = ("parquet", "jsonl", "json", "tsv", "csv")


@dataclass(frozen=True)
class Official:
    """The data that the authors of a task published."""

    folder: str  # in their archive
    rows: dict[str, int] = field(default_factory=dict)  # of each split, those without a label left out
    rename: dict[str, str] = field(default_factory=dict)  # their column -> ours
    headerless: tuple[str, ...] = ()  # the columns, if their TSV has no header
    broken: bool = False  # some rows for training are torn apart by line breaks
    prefix: str = ""  # of their file names
    undecided: str | None = None  # the label of examples on which the annotators did not agree; they are left out
    hub: str = "nyu-mll/glue"
    config: str | None = None  # on the hub; None: the name of the task

    def hub_config(self, task: Task) -> str:
        return self.config or task.name


_MNLI = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}

OFFICIAL = {
    "cola": Official(
        "CoLA",
        {"train": 8_551, "validation": 1_043, "test": 1_063},
        headerless=("source", "label", "mark", "sentence"),
    ),
    "sst2": Official("SST-2", {"train": 67_349, "validation": 872, "test": 1_821}),
    "mrpc": Official(
        "MRPC",
        {"train": 3_668, "validation": 408, "test": 1_725},
        {"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"},
    ),
    "stsb": Official("STS-B", {"train": 5_749, "validation": 1_500, "test": 1_379}, {"score": "label"}),
    "qqp": Official(
        "QQP", {"train": 363_846, "validation": 40_430, "test": 390_965}, {"is_duplicate": "label"}, broken=True
    ),
    "mnli": Official(
        "MNLI",
        {
            "train": 392_702,
            "validation_matched": 9_815,
            "validation_mismatched": 9_832,
            "test_matched": 9_796,
            "test_mismatched": 9_847,
        },
        _MNLI,
    ),
    "qnli": Official("QNLI", {"train": 104_743, "validation": 5_463, "test": 5_463}),
    "rte": Official("RTE", {"train": 2_490, "validation": 277, "test": 3_000}),
    "wnli": Official("WNLI", {"train": 635, "validation": 71, "test": 146}),
    "snli": Official(
        "snli_1.0",
        {"train": 549_367, "validation": 9_842, "test": 9_824},
        _MNLI,
        prefix="snli_1.0_",
        undecided="-",
        hub="stanfordnlp/snli",
        config="plain_text",
    ),
}


def official(task: Task) -> Official:
    """What is known of the task's official data; nothing of tasks that are made here."""
    return OFFICIAL.get(task.name, Official(task.name))


def find_folder(root: Path, task: Task) -> Path | None:
    """The folder named like the task, or like its official archive, in `root` or `root/glue`."""
    places = (place / name for place in (root, root / "glue") for name in (task.name, official(task).folder))
    return next((place for place in places if place.is_dir()), None)


def read_splits(folder: Path, task: Task, splits: tuple[str, ...]) -> dict[str, Table]:
    """Those of the splits that the folder holds, with the task's own column names.

    Raises ValueError for a split that is there twice or in part, and for files that cannot be read.
    """
    found = {split: _read_split(folder, task, split) for split in splits}
    return {split: table for split, table in found.items() if table is not None}


def from_dataset(dataset: Dataset, task: Task, where: str) -> Table:
    """The task's columns of a data set."""
    keep = {*task.columns, *official(task).rename}
    columns = columns_of(dataset.with_format("arrow")[:], dataset.features, keep)
    return _renamed(Table(columns, dataset.column_names, where), task)


def accepted(task: Task, splits: tuple[str, ...]) -> str:
    """What can be given, for messages."""
    names = " and ".join("/".join(_aliases(split)) for split in splits)
    return (
        f"give a data directory (--data) that is or holds {task.name}/, or set RESFORMER_DATA to one that holds "
        f"{task.name}/ or glue/{task.name}/, with the files {names}, ending in .{', .'.join(SUFFIXES)} "
        "(parquet also in parts, such as train-00000-of-00001.parquet), with the columns "
        f"{', '.join(task.columns)}; or as the official archive has them ({official(task).folder}/), or as "
        "Dataset.save_to_disk wrote them."
    )


def _aliases(split: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((split, split.replace("validation", "dev"))))


def _read_split(folder: Path, task: Task, split: str) -> Table | None:
    paths = _split_files(folder, split, official(task).prefix)
    saved = [folder / name for name in _aliases(split) if (folder / name / "state.json").is_file()]
    if len(paths) + len(saved) > 1 and saved:
        names = ", ".join(path.name for path in (*paths, *saved))
        raise ValueError(f"{folder} holds the split {split!r} more than once: {names}; keep one of them")
    if saved:
        return _read_saved(saved[0], task)
    if paths:
        return _joined([_read_file(path, task, split) for path in paths])
    return _read_msr(folder, task, split) if task.name == "mrpc" else None


def _split_files(folder: Path, split: str, prefix: str) -> list[Path]:
    """The file of a split, or all its parts in order; empty if there is none."""
    names = "|".join(_aliases(split))
    pattern = re.compile(rf"({re.escape(prefix)})?({names})(?:-\d+-of-(\d+))?\.({'|'.join(SUFFIXES)})")
    matches = [(match, path) for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))]
    kinds = {match.groups() for match, _ in matches}
    listed = ", ".join(path.name for _, path in matches)
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds the split {split!r} more than once: {listed}; keep one of them")
    for _, _, parts, _ in kinds:
        if parts and len(matches) != int(parts):
            raise ValueError(f"{folder} holds {len(matches)} of the {parts} parts of the split {split!r}: {listed}")
    return [path for _, path in matches]


def _read_file(path: Path, task: Task, split: str) -> Table:
    known = official(task)
    table = read_table(
        path,
        {*task.columns, *known.rename},
        headerless=known.headerless,
        skip_broken=known.broken and not split.startswith("test"),  # every test row has to be answered
    )
    return _renamed(table, task)


def _read_saved(folder: Path, task: Task) -> Table:
    try:
        dataset = load_from_disk(str(folder))
    except Exception as error:  # of datasets, pyarrow or json, as the damage is
        raise ValueError(f"cannot read the saved data set {folder}: {error}; save it again") from error
    assert isinstance(dataset, Dataset)
    return from_dataset(dataset, task, str(folder))


def _read_msr(folder: Path, task: Task, split: str) -> Table | None:
    """MRPC as its authors publish it: GLUE took the validation split out of their file for training, by ids."""
    path = folder / f"msr_paraphrase_{'test' if split == 'test' else 'train'}.txt"
    if not path.is_file():
        return None
    table = read_table(path, {*official(task).rename, "#1 ID", "#2 ID"})
    if split != "test":
        lists = [folder / name for name in ("dev_ids.tsv", "mrpc_dev_ids.tsv") if (folder / name).is_file()]
        if not lists:
            raise ValueError(
                f"{folder} holds {path.name}, but not GLUE's dev_ids.tsv, which says what of it is for validation; "
                "add that file, or give train.tsv and dev.tsv"
            )
        if absent := [name for name in ("#1 ID", "#2 ID") if name not in table.columns]:
            raise ValueError(f"{path} lacks the columns {', '.join(absent)}; found {', '.join(table.found)}")
        held_out = {tuple(line.split()) for line in lists[0].read_text(encoding="utf-8").splitlines()}
        ids = zip(table.columns["#1 ID"], table.columns["#2 ID"], strict=True)
        table = table.select([row for row, pair in enumerate(ids) if (pair in held_out) == (split == "validation")])
    return _renamed(table, task)


def _renamed(table: Table, task: Task) -> Table:
    """Official column names as ours, where ours is not there as well."""
    rename = official(task).rename
    own = {name: values for name, values in table.columns.items() if name in task.columns}
    renamed = {rename.get(name, name): values for name, values in table.columns.items()}
    columns = {name: values for name, values in (renamed | own).items() if name in task.columns}
    return Table(columns, table.found, table.where, table.lines)


def _joined(parts: list[Table]) -> Table:
    """The parts of a split as one table; each was read from a file with the same columns."""
    if len(parts) == 1:
        return parts[0]
    for part in parts[1:]:
        if part.columns.keys() != parts[0].columns.keys():
            raise ValueError(f"{part.where} has other columns than {parts[0].where}: {', '.join(part.found)}")
    columns = {name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns}
    return Table(columns, parts[0].found, f"{parts[0].where} to {Path(parts[-1].where).name}")
