"""One fine-tuning run: a model, a task, a folder with the result."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resformer.data.metrics import evaluate, loss, score
from resformer.data.tasks import Task
from resformer.train import checks
from resformer.train.batches import Encoded, encode, fingerprint, training_batches
from resformer.train.cost import reset_peak_memory
from resformer.train.flags import flags
from resformer.train.job import Evaluation, Job
from resformer.train.loop import make_accelerator, predict
from resformer.train.numbers import check_positive
from resformer.train.result import describe_run, finish, merged
from resformer.train.run import run
from resformer.train.settings import Settings

SUFFIXES = {"validation_mismatched": "_mm"}  # of the metrics on a split; none for the others
COMPILED = 32  # of whose multiples the inputs of a compiled model are long, so that few lengths are compiled


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data: DatasetDict,
    output: Path,
    settings: Settings | None = None,
    *,
    max_length: int = 128,
    resume: str = "auto",
    overwrite: bool = False,
    save_model: bool = True,
    push_to: str | None = None,
    progress: bool = True,
    describe: dict[str, Any] | None = None,
    diagnostics: dict[str, Any] | None = None,
    encode: Callable[..., Encoded] = encode,
) -> dict[str, Any]:
    """Train `model` on the training split of `data`, evaluate it, write `output/result.json`.

    Args:
        model: patched or not, with a sequence-classification head; trained in place.
        settings: length, optimizer and machine; see `resformer.train.settings.Settings`.
        max_length: tokens; longer inputs are cut.
        resume, overwrite: see `resformer.train.run.run`.
        push_to: a repository of the hub to which the model goes, OWNER/NAME; None: nothing leaves this machine.
        describe: further entries of `result["config"]`, such as the scheme and the depth.
        diagnostics: measured by the caller, kept as `result["diagnostics"]`.
        encode: makes tokens of a split; a caller with many runs on the same data can keep what it makes.

    Runs of different models on the same data with one seed see the same batches in the same order, whatever
    random numbers the models draw, and on any number of processes. A scheme that takes its start from data (admin) is
    calibrated on the first batch, unless it comes calibrated; one with a schedule goes on from where it stands.

    `output` gets what `run` writes, model/ if `save_model`, and result.json last, in one move: a run is finished
    exactly when that is there. Under `accelerate launch` every process calls this, and the main one writes.

    Returns what is in result.json; the score is the mean over the evaluation splits, of the model as it is at the end,
    and `result["best"]` is that of the best evaluation on the way. A loss that is not finite ends the run with status
    "diverged", no score and no model; one that was asked to stop has status "stopped" and no result.json. Raises
    `ValueError`, before any work, for arguments, a model, a tokenizer, data or a folder that do not fit.
    """
    settings = settings or Settings()
    checks.check_hub_name(push_to)
    checks.check_folder(output := Path(output), overwrite=overwrite)
    checks.check_resume(resume, overwrite=overwrite)
    job = finetuning(model, tokenizer, task, data, settings, max_length=max_length, describe=describe, encode=encode)
    reset_peak_memory(job.accelerator.device)
    outcome = run(model, job, output, settings, resume=resume, overwrite=overwrite, progress=progress)
    result = describe_run(outcome, job, model, settings) | {"diagnostics": diagnostics or {}}
    return finish(result, output, model, tokenizer, accelerator=job.accelerator, save_model=save_model, push_to=push_to)


def finetuning(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    data: DatasetDict,
    settings: Settings,
    *,
    max_length: int = 128,
    describe: dict[str, Any] | None = None,
    encode: Callable[..., Encoded] = encode,
) -> Job:
    """What `finetune` runs, with all its checks."""
    check_positive(max_length=max_length)
    special = tokenizer.num_special_tokens_to_add(pair=len(task.texts) == 2)
    if max_length <= special:
        raise ValueError(
            f"max_length is {max_length}, and {special} tokens are special; give room for text, such as 128"
        )
    checks.check_trackers(settings.track)
    evaluated = checks.check_splits(data, task)
    checks.check_model(model, tokenizer, task)
    torch.set_float32_matmul_precision(settings.matmul_precision)
    accelerator = make_accelerator(settings.precision)
    names = ("train", *evaluated)
    inputs = frozenset(inspect.signature(model.forward).parameters)
    splits = {name: encode(data[name], tokenizer, task, max_length=max_length, inputs=inputs) for name in names}
    checks.check_inputs(splits, model)
    train = splits["train"]
    epoch = math.ceil(len(train) / settings.batch_size)
    given = {"task": task.name, "max_length": max_length, "data_sha256": fingerprint(splits)}
    return Job(
        config=merged(describe or {}, given | settings.resolved(epoch)),
        accelerator=accelerator,
        epoch=epoch,
        batches=partial(_batches, train, settings),
        first=lambda: next(training_batches(train, settings.batch_size, seed=settings.seed))[0][0],
        evaluate=partial(_evaluate, task, data, splits, settings.batch_size, accelerator),
        flags=partial(_flags, task, splits),
        units=("examples", len(train) / epoch),
        tokens=float(train.lengths.sum()) / epoch,
        heaviest=lambda n: train.collate(np.argsort(-train.lengths, kind="stable")[:n]),
    )


def _flags(task: Task, splits: dict[str, Encoded], last: Evaluation, train_loss: float) -> list[str]:
    name, train = next(iter(last.found)), splits["train"]  # the first split that is evaluated
    truncated = train.truncated / len(train)
    return flags(task, last.found[name], splits[name].labels, train_loss=train_loss, truncated=truncated)


def _batches(train: Encoded, settings: Settings, begin: int, rank: int, processes: int) -> Any:
    return training_batches(
        train,
        settings.batch_size,
        seed=settings.seed,
        begin=begin,
        rank=rank,
        processes=processes,
        size=settings.micro_batch_size,
        multiple=COMPILED if settings.compile else 8,
    )


def _evaluate(
    task: Task, data: DatasetDict, splits: dict[str, Encoded], batch_size: int, accelerator: Accelerator, model: Any
) -> Evaluation:
    """On every evaluation split; what was found are the answers by split."""
    logits = {
        name: predict(model, split, batch_size=batch_size, accelerator=accelerator)
        for name, split in splits.items()
        if name != "train"
    }
    if not all(np.isfinite(one).all() for one in logits.values()):
        return Evaluation(math.nan, {})
    answers = {name: _answers(task, one) for name, one in logits.items()}
    reached = fmean(score(task, evaluate(task, answers[name], splits[name].labels)) for name in answers)
    counts = {name: len(splits[name]) for name in answers}
    losses = {f"loss{SUFFIXES.get(name, '')}": loss(task, logits[name], splits[name].labels) for name in answers}
    return Evaluation(reached, _metrics(task, data, answers) | losses, counts, answers)


def _answers(task: Task, logits: np.ndarray) -> np.ndarray:
    """Classes, or the scores of a regression, (examples,)."""
    return logits[:, 0] if task.labels is None else logits.argmax(-1)


def _metrics(task: Task, data: DatasetDict, predictions: dict[str, np.ndarray]) -> dict[str, float]:
    """Metrics of each evaluation split, each difficulty within it, and the share of its commonest label."""
    metrics: dict[str, float] = {}
    for name, predicted in predictions.items():
        suffix, labels = SUFFIXES.get(name, ""), np.asarray(data[name]["label"][:])
        metrics |= {f"{metric}{suffix}": value for metric, value in evaluate(task, predicted, labels).items()}
        if "difficulty" in data[name].column_names:
            difficulty = np.asarray(data[name]["difficulty"])
            for level in np.unique(difficulty):
                here = evaluate(task, predicted[difficulty == level], labels[difficulty == level])
                level = str(level).replace(" ", "_")
                metrics |= {f"{metric}_{level}{suffix}": value for metric, value in here.items()}
        if task.labels is not None:
            metrics[f"majority{suffix}"] = float(np.bincount(labels).max() / len(labels))
    return metrics
