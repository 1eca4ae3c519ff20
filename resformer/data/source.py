"""Which data a run is on, as the command line names them: a task, or files of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resformer.errors import unknown
from resformer.options import option

if TYPE_CHECKING:
    from datasets import DatasetDict

    from resformer.data.tasks import Task


@dataclass(frozen=True)
class Source:
    """A task by its name, or a file to train on and one to evaluate on."""

    task: str | None = option(None, "See `resformer data`; or give two files of your own.")
    data: str | None = option(None, "Folder with the task's data. [default: built in or hub]")
    train_file: str | None = option(None, "Your own data: csv, tsv, jsonl or parquet.")
    validation_file: str | None = option(None, "The same, to evaluate on.")
    text: str | None = option(None, "COLUMN or COLUMN,COLUMN of your files. [default: by known names]")
    label: str = option("label", "Column of your files.")
    regression: bool | None = option(None, "Targets or classes in your files. [default: as labels look]")
    train_size: int | None = option(None, "Use only the first so many training examples.", "--limit")

    def __post_init__(self) -> None:
        """Raises `ValueError` for what is neither a task nor two files, or both."""
        from resformer.data.tasks import TASKS

        if self.task is not None and self.task not in TASKS:
            raise unknown("task", self.task, TASKS, hint="`resformer data` lists them.")
        own = {"--train-file": self.train_file, "--validation-file": self.validation_file}
        if (self.task is None) != all(own.values()) or (self.task is not None and any(own.values())):
            given = ", ".join(name for name, value in ({"--task": self.task} | own).items() if value is not None)
            raise ValueError(f"give --task, or both --train-file and --validation-file; given: {given or 'none'}")
        if self.task is not None and (self.text, self.label, self.regression) != (None, "label", None):
            raise ValueError("--text, --label and --regression are of your own files; give --train-file, not --task")
        if self.task is None and self.data is not None:
            raise ValueError("--data is of --task; your own files are --train-file and --validation-file")
        if self.train_size is not None and self.train_size < 1:
            raise ValueError(f"train_size must be at least 1, got {self.train_size}")

    def described(self) -> dict[str, Any]:
        """What of it the outcome of a run depends on, besides the task."""
        names = ("train_file", "validation_file", "text", "label", "regression") if self.task is None else ()
        given = asdict(self)
        return {name: given[name] for name in (*names, "train_size") if given[name] is not None}


def load_source(source: Source, *, say: Callable[[str], None] | None = None) -> tuple[Task, DatasetDict]:
    """The task and its splits; `say` is given a line about where they are from."""
    from resformer.data.glue import load_task
    from resformer.data.own import own_task
    from resformer.data.tasks import TASKS

    if source.task is not None:
        task, splits = TASKS[source.task], load_task(source.task, source.data, say=say)
    else:
        assert source.train_file is not None
        assert source.validation_file is not None
        task, splits = own_task(
            Path(source.train_file),
            Path(source.validation_file),
            texts=source.text.split(",") if source.text else None,
            label=source.label,
            regression=source.regression,
            say=say,
        )
    if source.train_size is not None:
        splits["train"] = splits["train"].select(range(min(source.train_size, len(splits["train"]))))
    return task, splits
