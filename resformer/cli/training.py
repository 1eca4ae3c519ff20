"""`resformer finetune`, `predict` and `pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resformer.cli.app import app
from resformer.cli.speaking import lines, quiet, say, show_once, speaks
from resformer.configfile import Config
from resformer.data.source import Source
from resformer.errors import unknown
from resformer.options import options_of
from resformer.train.destination import Destination
from resformer.train.settings import Settings
from resformer.train.start import Start

WORDS = 8192  # entries at most of a tokenizer that is made of the words of a task
COMPILING = "torch.compile: the first steps compile the model, which can take minutes"


@app.command()
@options_of(Settings, taken="settings")
@options_of(Start, taken="start")
@options_of(Source, taken="source")
@options_of(Destination, taken="to")
def finetune(
    to: Destination,
    source: Source,
    start: Start,
    settings: Settings,
    max_length: Annotated[int, typer.Option(help="Tokens; longer inputs are cut.")] = 128,
    config: Config = None,
) -> None:
    """Fine-tune a model on a task or on files of your own, with a residual scheme patched in."""
    from transformers import AutoModelForSequenceClassification

    from resformer.data.source import load_source
    from resformer.data.tokenizer import train_tokenizer
    from resformer.train.finetune import finetune as run
    from resformer.train.finetune import finetuning
    from resformer.train.load import start_model
    from resformer.train.rehearsal import rehearse

    quiet()
    to.check()
    task, splits = load_source(source, say=say)
    words = None
    if start.model is None and start.tokenizer is None:
        texts = (text for column in task.texts for text in splits["train"][column][:])
        words = train_tokenizer(texts, vocab_size=WORDS, max_length=max_length)
    model, tokenizer = start_model(
        start,
        AutoModelForSequenceClassification,
        seed=settings.seed,
        length=max_length,
        precision=settings.precision,
        task=task,
        tokenizer=words,
        say=say,
    )
    describe = start.described() | source.described()
    if settings.compile:
        say(COMPILING)
    if to.dry_run:
        job = finetuning(model, tokenizer, task, splits, settings, max_length=max_length, describe=describe)
        show_once(rehearse(model, job, to.output, settings, overwrite=to.overwrite))
        return
    result = run(
        model,
        tokenizer,
        task,
        splits,
        to.output,
        settings,
        max_length=max_length,
        describe=describe,
        **to.given(),
    )
    _tell(result, to.output)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Folder of a fine-tuned model, as finetune saves it.")],
    output: Annotated[Path, typer.Option(help="Folder for the predictions.")],
    task: Annotated[str | None, typer.Option(help="See `resformer data`; or give a file of your own.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the task's data. [default: as for finetune]")] = None,
    split: Annotated[str, typer.Option(help="test, validation, train, or one of mnli's two.")] = "test",
    format: Annotated[str | None, typer.Option(help="glue or csv. [default: glue for test splits of GLUE]")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.")] = 32,
    max_length: Annotated[int | None, typer.Option(help="Tokens. [default: as in training, or 128]")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier predictions.")] = False,
    file: Annotated[Path | None, typer.Option(help="Your own: csv, tsv, jsonl or parquet.")] = None,
    text: Annotated[str | None, typer.Option(help="Its columns, as for finetune.")] = None,
) -> None:
    """Answer a split of a task, in the files that the GLUE server takes or as CSV, or a file of your own."""
    from resformer.data.tasks import TASKS

    if (task is None) == (file is None):
        raise ValueError(f"give --task or --file, {'one of them' if task else 'to say what is to be predicted'}")
    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS, hint="`resformer data` lists them.")
    from resformer.data.glue import load_split
    from resformer.data.own import own_split
    from resformer.train.predict import own_classes, predict_task

    quiet()
    if file is not None:
        kind, splits = own_split(file, own_classes(model), texts=text.split(",") if text else None)
    else:
        assert task is not None
        kind, splits = TASKS[task], load_split(task, split, data, say=say)
    written = predict_task(
        model,
        kind,
        splits,
        output,
        format=format,
        batch_size=batch_size,
        max_length=max_length,
        precision=precision,
        overwrite=overwrite,
    )
    for path, metrics in written.items():
        measured = "".join(f", {name} {value:.4f}" for name, value in metrics.items())
        say(f"predictions: {path}{measured}", wrap=False)


@app.command()
@options_of(Settings, taken="settings")
@options_of(Start, taken="start")
@options_of(Destination, taken="to")
def pretrain(
    corpus: Annotated[list[str], typer.Option(help="Files, folders, patterns or hub:OWNER/NAME:CONFIG:SPLIT.")],
    to: Destination,
    start: Start,
    settings: Settings,
    validation: Annotated[list[str], typer.Option(help="Other text, held out. [default: the last samples]")] = [],  # noqa: B006
    objective: Annotated[str, typer.Option(help="mlm or clm.")] = "mlm",
    max_length: Annotated[int, typer.Option(help="Tokens of a sample, all of them text.")] = 128,
    tokens: Annotated[int | None, typer.Option(help="Length of the run, in place of epochs and steps.")] = None,
    held_out: Annotated[int, typer.Option(help="Last samples held out, without --validation.")] = 512,
    column: Annotated[str, typer.Option(help="That holds the text, in all but .txt.")] = "text",
    shards: Annotated[Path | None, typer.Option(help="Folder for the corpus as tokens. [default: a cache]")] = None,
    config: Config = None,
) -> None:
    """Pre-train a model on text, by masked or causal language modelling."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from resformer.train.load import start_model
    from resformer.train.pretrain import OBJECTIVES, check_pretraining, pack, pretraining
    from resformer.train.pretrain import pretrain as run
    from resformer.train.rehearsal import rehearse

    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    quiet()
    to.check()
    auto = AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM
    model, tokenizer = start_model(
        start, auto, seed=settings.seed, length=max_length, precision=settings.precision, say=say
    )
    aims: dict[str, Any] = {"objective": objective, "tokens": tokens, "describe": start.described()}
    check_pretraining(
        model, tokenizer, settings, objective=objective, length=max_length, tokens=tokens, held_out=held_out
    )
    packed = pack(corpus, tokenizer, max_length, objective, shards=shards, column=column, tell=say)
    held = pack(validation, tokenizer, max_length, objective, column=column, tell=say) if validation else held_out
    if settings.compile:
        say(COMPILING)
    if to.dry_run:
        job = pretraining(model, tokenizer, packed, settings, held_out=held, **aims)
        show_once(rehearse(model, job, to.output, settings, overwrite=to.overwrite))
        return
    result = run(
        model,
        tokenizer,
        packed,
        to.output,
        settings,
        held_out=held,
        **to.given(),
        **aims,
    )
    _tell(result, to.output)


def _tell(result: dict[str, Any], output: Path) -> None:
    from resformer.train.flags import FLAGS

    if not speaks():
        return
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
    loss = "no loss" if result["train_loss"] is None else f"training loss {result['train_loss']:.4f}"
    typer.echo(lines(f"{result['status']}, {loss}; {metrics or 'no metrics'}"))
    if result["status"] != "stopped":
        typer.echo(f"result: {output / 'result.json'}")
    for flag in result["flags"]:
        typer.echo(lines(f"flag {flag}: {FLAGS[flag]}"), err=True)
    if result["status"] == "stopped":
        typer.echo("asked to stop; the same command goes on from the newest checkpoint", err=True)
        raise typer.Exit(75)
    if result["status"] == "diverged":
        typer.echo("the loss was not finite: lower --learning-rate, or raise --warmup; no model is kept", err=True)
        raise typer.Exit(3)
