"""A user's own classification or regression data: a task made from two files."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from resformer.data.layouts import SUFFIXES
from resformer.data.tables import Table, read_table
from resformer.data.tasks import TASKS, Task

CLASSES = 100  # more distinct labels than this are no classes
TEXTS = (("text",), ("text1", "text2"), *dict.fromkeys(task.texts for task in TASKS.values()))  # known by name
INTEGER = re.compile(r"[+-]?\d+")


def own_task(
    train: str | Path,
    validation: str | Path,
    *,
    texts: Sequence[str] | None = None,
    label: str = "label",
    regression: bool | None = None,
    name: str = "own",
    say: Callable[[str], None] | None = None,
) -> tuple[Task, DatasetDict]:
    """A task and its data from two files: .csv, .tsv, .jsonl, .json (one object a line) or .parquet.

    texts       the column with the text, or two with a pair; None: the columns named as in a known task
                (text, sentence, sentence1 and sentence2, premise and hypothesis ...)
    label       the column with the labels
    regression  None: numbers written with a decimal point are targets, all else are classes
    say         is called once with a line: the columns, the classes or the range of the targets, the rows

    Classes are the distinct labels for training, whole numbers in numeric and others in alphabetical order. The score
    is the mean of accuracy and F1 (of the second class of two, else the macro average), of a regression that of
    Pearson and Spearman. CSV is that of RFC 4180; a TSV knows no quotes; "NA" is text.

    Raises ValueError, naming file and line, for files that are missing, empty, malformed or not UTF-8, columns that
    are missing, texts that are empty or no text, labels that are missing, of which there is one alone or more than
    100, and labels for validation that training lacks.
    """
    paths = {"train": Path(train).expanduser(), "validation": Path(validation).expanduser()}
    for split, path in paths.items():
        _check_file(path, split)
    if paths["train"].samefile(paths["validation"]):
        raise ValueError(f"{train} is given for training and for validation; give two files without common examples")
    tables = {split: read_table(path) for split, path in paths.items()}
    texts = _text_columns(tables["train"], label, texts)
    for table in tables.values():
        _check(table, texts)
        _check_labels(table, label)
    classes, why = _classes(tables["train"], label, regression)
    task = _task(name, f"{paths['train'].name}, {paths['validation'].name}", texts, classes)
    read = _target if classes is None else _class_id(classes)
    data = DatasetDict()
    for split, table in tables.items():
        labels = [read(value, table.at(row)) for row, value in enumerate(table.columns[label])]
        if classes is None and min(labels) == max(labels):
            raise ValueError(f"all labels of {table.where} are {labels[0]:g}; a regression needs several")
        data[split] = _dataset(task, table, texts, labels)
    if say is not None:
        if classes is None:
            every = data["train"]["label"][:]
            kind = f"regression from {min(every):g} to {max(every):g}"
        else:
            kind = f"{len(classes)} classes ({', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''})"
        rows = ", ".join(f"{split} {len(part):,} rows" for split, part in data.items())
        say(f"{name}: text {' and '.join(texts)}; label {label}: {kind}{why}; {rows}")
    return task, data


def own_split(
    path: str | Path,
    classes: tuple[str, ...] | None,
    *,
    texts: Sequence[str] | None = None,
    label: str = "label",
    name: str = "own",
) -> tuple[Task, DatasetDict]:
    """The task of a model with these classes (None: a regression), and the examples of one file, as the split "test".

    The file and `texts` are as for `own_task`; the columns must come in the order of training. Labels are not read:
    all are -1, or NaN in a regression. Raises ValueError as `own_task` does.
    """
    path = Path(path).expanduser()
    _check_file(path, "test")
    table = read_table(path)
    texts = _text_columns(table, label, texts)
    _check(table, texts)
    task = _task(name, path.name, texts, classes)
    return task, DatasetDict({"test": _dataset(task, table, texts, [math.nan if classes is None else -1] * len(table))})


def _task(name: str, summary: str, texts: Sequence[str], classes: tuple[str, ...] | None) -> Task:
    columns = tuple("text_label" if text == "label" else text for text in texts)  # "label" is the label's, in a Task
    f1 = "f1" if classes is not None and len(classes) == 2 else "macro_f1"
    metrics = ("pearson", "spearman") if classes is None else ("accuracy", f1)
    return Task(name, summary, columns, classes, metrics, reference="the user's own data")


def _dataset(task: Task, table: Table, texts: Sequence[str], labels: list[Any]) -> Dataset:
    content = {column: table.columns[text] for column, text in zip(task.texts, texts, strict=True)}
    return Dataset.from_dict(content | {"label": labels}, features=task.features())


def _check_file(path: Path, split: str) -> None:
    if not path.is_file():
        raise ValueError(f"the {split} file {str(path)!r} does not exist" + " or is no file" * path.exists())
    if path.suffix.lstrip(".") not in SUFFIXES:
        raise ValueError(f"the {split} file {str(path)!r} must end in .{', .'.join(SUFFIXES)}")


def _text_columns(table: Table, label: str, texts: Sequence[str] | None) -> tuple[str, ...]:
    """Those given, else the only known text columns that the file has; a pair goes before its parts."""
    if texts is not None:
        if len(texts) not in (1, 2) or len({*texts, label}) != len(texts) + 1:
            listed = ", ".join(texts)
            raise ValueError(f"texts {listed} and label {label}: give one text column or two, and another label")
        return tuple(texts)
    there = [texts for texts in TEXTS if label not in texts and set(texts) <= set(table.columns)]
    widest = [texts for texts in there if not any(set(texts) < set(other) for other in there)]
    if len(widest) != 1:
        reason = " or ".join("+".join(texts) for texts in widest) or "none that is known by its name"
        raise ValueError(
            f"which columns of {table.where} hold the text: {reason}? Say it (--text COLUMN, or --text COLUMN,COLUMN "
            f"for a pair); it has {', '.join(table.found)}"
        )
    return widest[0]


def _check(table: Table, texts: Sequence[str]) -> None:
    """There are rows, and each has its texts."""
    _check_columns(table, texts)
    for name in texts:
        for row, value in enumerate(table.columns[name]):
            if not isinstance(value, str):
                raise ValueError(f"{table.at(row)}: {name!r} is {value!r}, not a text")
            if not value.strip():
                raise ValueError(f"{table.at(row)}: {name!r} is empty; leave the row out or fill it")


def _check_labels(table: Table, label: str) -> None:
    """Each row has its label."""
    _check_columns(table, [label])
    for row, value in enumerate(table.columns[label]):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{table.at(row)}: the label is missing; leave the row out or fill it")
        if not isinstance(value, str | int | float):
            raise ValueError(f"{table.at(row)}: the label {value!r} is neither a text nor a number")


def _check_columns(table: Table, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise ValueError(
            f"{table.where} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has "
            f"{', '.join(table.found)}; name the columns (--text, --label)"
        )
    if not len(table):
        raise ValueError(f"{table.where} has no rows")


def _classes(table: Table, label: str, regression: bool | None) -> tuple[tuple[str, ...] | None, str]:
    """The class names, or None for a regression; and why, where nobody said it."""
    if regression:
        return None, ""
    values = table.columns[label]
    names = {_name(value) for value in values}
    whole = all(INTEGER.fullmatch(name) for name in names)
    if regression is None and not whole and all(_number(value) is not None for value in values):
        if len(names) <= CLASSES and all(float(name).is_integer() for name in names):
            listed = ", ".join(sorted(names, key=float)[:5])
            raise ValueError(
                f"the labels of {table.where} are whole numbers written as decimals ({listed}): classes or targets? "
                "Say --regression or --no-regression"
            )
        return None, " (the labels are decimals; --no-regression makes them classes)"
    if len(names) > CLASSES:
        hint = "; for numbers to be predicted say --regression" if whole else ""
        raise ValueError(
            f"{table.where} has {len(names)} different labels in {label!r}, such as {sorted(names)[0]!r}; at most "
            f"{CLASSES} are taken as classes{hint}; is it the column of the labels (--label)?"
        )
    if len(names) == 1:
        raise ValueError(f"all labels of {table.where} are {names.pop()!r}; a classification needs two classes")
    order = (lambda name: (int(name), name)) if whole else (lambda name: (0, name))
    return tuple(sorted(names, key=order)), ""


def _name(value: Any) -> str:
    """A label as the name of a class: JSON's true is "true"."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _number(value: Any) -> float | None:
    """A finite number, else None; a truth value is none."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _target(value: Any, where: str) -> float:
    number = _number(value)
    if number is None:
        raise ValueError(f"{where}: the label {value!r} is not a finite number, which a regression needs")
    return number


def _class_id(classes: tuple[str, ...]) -> Callable[[Any, str], int]:
    ids = {name: i for i, name in enumerate(classes)}

    def read(value: Any, where: str) -> int:
        name = _name(value)
        if name not in ids:
            shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
            raise ValueError(f"{where}: the label {name!r} is not among those for training: {shown}")
        return ids[name]

    return read
