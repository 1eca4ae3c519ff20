"""What a run refuses, before any work."""

import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resformer.data.tasks import Task
from resformer.errors import unknown
from resformer.sizes import longest_input
from resformer.train.batches import Encoded
from resformer.train.checkpoints import step_of
from resformer.train.settings import Settings


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """The model answers as many classes as the task has, and pads with the token that the tokenizer pads with."""
    name = type(model).__name__
    if "labels" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no labels; load the model with AutoModelForSequenceClassification")
    classes = len(task.labels or ("score",))
    if model.config.num_labels != classes:
        raise ValueError(
            f"{name} has num_labels {model.config.num_labels}, task {task.name!r} needs {classes} "
            f"({', '.join(task.labels) if task.labels else 'regression'}); load it with num_labels={classes}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no padding token, which batches need; set tokenizer.pad_token "
            f"(such as tokenizer.pad_token = {'tokenizer.eos_token' if tokenizer.eos_token else '...'}) "
            "and model.config.pad_token_id = tokenizer.pad_token_id"
        )
    if model.config.pad_token_id != tokenizer.pad_token_id:
        raise ValueError(
            f"the tokenizer pads with token {tokenizer.pad_token_id}, {name} expects {model.config.pad_token_id}; "
            "set model.config.pad_token_id = tokenizer.pad_token_id if the tokenizer is the right one"
        )


def check_trackers(names: Sequence[str]) -> None:
    """Every tracker is known to accelerate, and its package is installed."""
    ready = {str(name) for name in get_available_trackers()}
    own = set(LOGGER_TYPE_TO_CLASS) - set(LoggerType.list())  # registered by the user
    for name in names:
        if name not in {*LoggerType.list(), *own} - {"all"}:
            raise unknown("tracker", name, {*LoggerType.list(), *own} - {"all"})
        if name not in ready | own:
            raise ValueError(f"tracker {name!r} is not installed; pip install {name}, or leave it out of --track")


def check_hub_name(name: str | None) -> None:
    """A repository of the hub is named OWNER/NAME."""
    if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"push_to is {name!r}; name a repository of the hub, OWNER/NAME")


def check_splits(data: DatasetDict, task: Task) -> tuple[str, ...]:
    """The evaluation splits of the task that the data have (MNLI may lack one); all splits have what is needed."""
    there = tuple(name for name in task.splits if name in data)
    if "train" not in data or not there:
        raise ValueError(
            f"task {task.name!r} needs the split 'train' and one of {', '.join(task.splits)}; "
            f"the data have {', '.join(data) or 'none'}"
        )
    for name in ("train", *there):
        if len(data[name]) == 0:
            raise ValueError(f"the split {name!r} of the data for task {task.name!r} is empty")
        missing = [column for column in (*task.texts, "label") if column not in data[name].column_names]
        if missing:
            raise ValueError(
                f"the split {name!r} lacks the columns {', '.join(missing)} of task {task.name!r}; "
                f"it has {', '.join(data[name].column_names)}"
            )
    return there


def check_inputs(splits: dict[str, Encoded], model: PreTrainedModel) -> None:
    """Every token is in the model's vocabulary, every input within its positions."""
    tokens = max(int(split.columns["input_ids"].max()) for split in splits.values()) + 1
    vocabulary = model.config.vocab_size
    if tokens > vocabulary:
        raise ValueError(
            f"the tokenizer gives token {tokens - 1}, the model has {vocabulary}; "
            "use the tokenizer that belongs to the model"
        )
    longest = max(int(split.lengths.max()) for split in splits.values())
    positions = longest_input(model)
    if positions is not None and longest > positions:
        raise ValueError(f"the longest input has {longest} tokens, the model takes {positions}; lower max_length")


def check_folder(output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """The folder is new, empty, or holds an unfinished run, or, to overwrite, any run; returns its configuration."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {str(output)!r} is a file; give a folder")
    names = sorted(path.name for path in output.glob("[!.]*"))
    if not names:
        return {}
    stored = read_json(output / "config.json")
    if stored is None:
        raise ValueError(
            f"the output folder {str(output)!r} is not empty and holds no run "
            f"({', '.join(names[:4])}{' ...' if len(names) > 4 else ''}); give a new folder"
        )
    if not overwrite and read_json(output / "result.json") is not None:
        raise ValueError(
            f"this run is finished, its result is {str(output / 'result.json')!r}; give a new folder, or --overwrite "
            "to delete that run and start again"
        )
    return stored


def check_resume(resume: str, *, overwrite: bool = False) -> Path | None:
    """The checkpoint that is named, which is there; None for "auto" and "never"."""
    if resume in ("auto", "never"):
        return None
    step_of(checkpoint := Path(resume))
    if overwrite:
        raise ValueError(f"overwrite begins again, and resume={resume!r} goes on; give one of the two")
    if not checkpoint.is_dir():
        raise ValueError(f"resume is {resume!r}, and there is no such folder; give 'auto', 'never' or a checkpoint")
    return checkpoint


def check_output(output: Path, config: dict[str, Any], *, overwrite: bool = False) -> None:
    """`check_folder`, and an unfinished run in it is of this very configuration."""
    stored = check_folder(output, overwrite=overwrite)
    if stored and not overwrite and (other := differences(stored, config)):
        raise ValueError(
            f"the output folder {str(output)!r} holds an unfinished run of another configuration:\n"
            + "\n".join(other)
            + "\nGive the same to go on, a new folder, or --overwrite to delete that run and start again"
        )


def differences(stored: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """A line for each entry of two configurations that differs.

    What is not stored may not have been there to be stored: a setting that came later, the hash of data not yet read.
    """
    here = json.loads(json.dumps(config))
    hashes = {key: value for key, value in here.items() if key.endswith("_sha256")}
    there = asdict(Settings()) | hashes | stored
    return [
        f"  {key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in {**stored, **here}
        if there.get(key) != here.get(key)
    ]


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if the file is absent, cut or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
