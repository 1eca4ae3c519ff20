"""A fine-tuned model answers a split of a task."""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from resformer.checkpoint import from_pretrained, read_config
from resformer.data.metrics import evaluate
from resformer.data.submission import file_name, submission, table
from resformer.data.tasks import Task
from resformer.files import write_text_atomically
from resformer.train import checks
from resformer.train.batches import encode
from resformer.train.load import load_tokenizer
from resformer.train.loop import make_accelerator, predict
from resformer.train.numbers import check_positive

MAX_LENGTH = 128  # tokens, as `finetune` has it


def predict_task(
    model: str | Path,
    task: Task,
    splits: DatasetDict,
    output: Path,
    *,
    format: str | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    precision: str = "fp32",
    overwrite: bool = False,
) -> dict[Path, dict[str, float]]:
    """Answer each split and write a file for it into the folder `output`.

    model       folder of a fine-tuned model, patched or not, with its tokenizer
    splits      as of `resformer.data.glue.load_split`; labels may be -1 or NaN
    format      "glue", "csv"; None: what the GLUE server takes for the test splits of GLUE, else CSV
    max_length  tokens, at which inputs are cut; None: as in the run that the model lies in, else 128

    Returns the files, each with the task's metrics over the examples whose label is known, if there are any. Raises
    ValueError, before anything is written, for a model that does not fit the task, a format that
    does not fit a split, and files that exist, unless `overwrite`.
    """
    max_length = max_length or _trained_length(Path(model)) or MAX_LENGTH
    check_positive(batch_size=batch_size, max_length=max_length)
    output = Path(output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output {str(output)!r} is a file; give a folder")
    accelerator = make_accelerator(precision)
    paths = {name: output / file_name(task, name, format) for name in splits}
    there = [path.name for path in paths.values() if path.exists()]
    if there and not overwrite:
        raise ValueError(f"the folder {str(output)!r} holds {', '.join(there)}; say --overwrite, or give a new folder")

    classifier, tokenizer = load_finetuned(str(model), task)
    checks.check_model(classifier, tokenizer, task)
    inputs = inspect.signature(classifier.forward).parameters
    encoded = {
        name: encode(_without_labels(part), tokenizer, task, max_length=max_length, inputs=inputs)
        for name, part in splits.items()
    }
    checks.check_inputs(encoded, classifier)
    order = class_order(classifier, task)
    wrapped = accelerator.prepare(classifier)
    texts: dict[Path, str] = {}
    measured: dict[Path, dict[str, float]] = {}
    for name, path in paths.items():
        logits = predict(wrapped, encoded[name], batch_size=batch_size, accelerator=accelerator)
        if not np.isfinite(logits).all():
            raise ValueError(f"model {str(model)!r} gives values that are not finite; nothing is written")
        answers = logits[:, 0] if task.labels is None else logits[:, order].argmax(-1)
        texts[path] = (submission if path.suffix == ".tsv" else table)(task, answers.tolist())
        labels = np.asarray(splits[name]["label"][:])
        known = np.isfinite(labels) if task.labels is None else labels >= 0
        measured[path] = evaluate(task, answers[known], labels[known]) if known.any() else {}
    accelerator.wait_for_everyone()  # all have looked at the folder before one writes to it
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            write_text_atomically(path, text)
    accelerator.wait_for_everyone()
    return measured


def load_finetuned(path: str, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier as it was saved, head and all, with its tokenizer.

    Raises ValueError if the folder holds no whole model with a head, none for this task, or no tokenizer.
    """
    _check_folder(path)
    config = read_config(path)
    names, wanted = _classes(config), task.labels or ("a score",)
    if len(names) != len(wanted):
        raise ValueError(
            f"model {path!r} answers {len(names)} classes ({', '.join(names)}), "
            f"{task.name!r} has {len(wanted)} ({', '.join(wanted)})"
        )
    patched = getattr(config, "resformer", None) is not None
    auto = AutoModelForSequenceClassification
    load: Any = partial(from_pretrained, auto=auto) if patched else auto.from_pretrained
    try:
        model, info = load(path, config=config, output_loading_info=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"cannot read the weights of model {path!r}: {error}") from error
    if lacks := sorted(info["missing_keys"]):
        raise ValueError(
            f"model {path!r} is not fine-tuned for classes: its weights lack {', '.join(lacks[:3])}; "
            "give the model folder of a run of finetune"
        )
    return model, load_tokenizer(path, config)


def class_order(model: PreTrainedModel, task: Task) -> list[int]:
    """For each class of the task, where the model answers it: by name, if it was saved with names of its own.

    Raises ValueError if the model's classes have other names.
    """
    names = _classes(model.config)
    if task.labels is None or names == [f"LABEL_{i}" for i in range(len(names))]:
        return list(range(len(names)))
    if set(names) != set(task.labels):
        raise ValueError(
            f"the model answers {', '.join(names)}, {task.name!r} has {', '.join(task.labels)}; "
            "it was fine-tuned for another task"
        )
    return [names.index(label) for label in task.labels]


def own_classes(path: str) -> tuple[str, ...] | None:
    """The classes that a saved model answers, None for a regression. Raises ValueError if there is no model."""
    _check_folder(path)
    names = tuple(_classes(read_config(path)))
    return None if len(names) == 1 else names


def _check_folder(path: str) -> None:
    folder = Path(path)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors*")):
        inside = f"; give {str(folder / 'model')!r}" if (folder / "model" / "config.json").is_file() else ""
        raise ValueError(f"{path!r} is not the folder of a saved model{inside}")


def _classes(config: Any) -> list[str]:
    """The names of a model's classes, in the order of its logits."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def _trained_length(model: Path) -> int | None:
    """The length at which the run that `model` lies in cut its inputs."""
    config = checks.read_json(model.parent / "config.json") or {}
    length = config.get("max_length") if "task" in config else None
    return length if isinstance(length, int) else None


def _without_labels(part: Dataset) -> Dataset:
    """With class 0, or score 0, everywhere: `encode` wants labels of the task, and logits do not depend on them."""
    return Dataset.from_dict(
        {name: part[name][:] for name in part.column_names if name != "label"} | {"label": [0] * len(part)},
        features=part.features,
    )
