"""Predictions as files: those that the GLUE server takes, and plain CSV."""

import csv
import io
import math
from collections.abc import Sequence

from resformer.data.tasks import Task
from resformer.errors import unknown

FORMATS = ("glue", "csv")
NAMES = {  # of the files in a submission
    "cola": {"test": "CoLA"},
    "sst2": {"test": "SST-2"},
    "mrpc": {"test": "MRPC"},
    "stsb": {"test": "STS-B"},
    "qqp": {"test": "QQP"},
    "mnli": {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"},
    "qnli": {"test": "QNLI"},
    "rte": {"test": "RTE"},
    "wnli": {"test": "WNLI"},
}
WORDS = ("mnli", "qnli", "rte")  # answered with class names, the others with numbers
SCORES = (0.0, 5.0)  # of STS-B


def file_name(task: Task, split: str, format: str | None = None) -> str:
    """The name of the file with the predictions of a split; format None: the server's where it has one, else CSV.

    Raises ValueError for an unknown format, and for "glue" where the server takes no such file.
    """
    if format is not None and format not in FORMATS:
        raise unknown("format", format, FORMATS)
    official = NAMES.get(task.name, {})
    if format == "csv" or (format is None and split not in official):
        return f"{task.name}_{split}.csv"
    if split not in official:
        takes = f"of {task.name} it takes {', '.join(official)}" if official else f"{task.name!r} is no task of GLUE"
        raise ValueError(f"the GLUE server takes no predictions of {task.name} {split}; {takes}; use --format csv")
    return f"{official[split]}.tsv"


def submission(task: Task, predictions: Sequence[float]) -> str:
    """The file for the GLUE server: a header, then the number of each row, from 0, and its answer.

    predictions   class ids, or scores, which are cut to 0 to 5 and written with 3 decimals

    Raises ValueError for predictions that are not finite or no class of the task.
    """
    rows = (f"{index}\t{_official(task, value)}\n" for index, value in enumerate(predictions))
    return "index\tprediction\n" + "".join(rows)


def table(task: Task, predictions: Sequence[float]) -> str:
    """CSV with the columns index, from 0, and prediction: class names, or scores as they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("index", "prediction"))
    for index, value in enumerate(predictions):
        writer.writerow((index, repr(_score(value)) if task.labels is None else task.labels[_class(task, value)]))
    return text.getvalue()


def _official(task: Task, value: float) -> str:
    if task.labels is None:
        low, high = SCORES
        return f"{min(max(_score(value), low), high):.3f}"
    number = _class(task, value)
    return task.labels[number] if task.name in WORDS else str(number)


def _score(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a prediction is {value!r}, not a finite number")
    return float(value)


def _class(task: Task, value: float) -> int:
    if value not in range(len(task.labels or ())):
        raise ValueError(f"a prediction is {value!r}, which is no class of {task.name!r}")
    return int(value)
