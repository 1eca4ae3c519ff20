"""The command line: names, help and errors; the work is in the library."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from resformer.errors import unknown
from resformer.study.plan import parse_scheme

app = typer.Typer(
    help="Change how the layers of a Transformer are connected, and measure what it does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
LISTS = ("--schemes", "--depths", "--tasks", "--learning-rates")  # options that take several values
SCHEME = "NAME or NAME:OPTION=VALUE,OPTION=VALUE, such as exclusive_gate:bias=0"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user can mend is one message on stderr and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(spread(sys.argv[1:] if arguments is None else arguments))
    except ValueError as error:
        typer.echo(f"resformer: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"resformer: cannot use {error.filename or 'a file'}: {error.strerror or error}", err=True)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C
            typer.echo("resformer: stopped; what is finished of a comparison stays, and is not run again", err=True)
        raise


@app.command()
def schemes(
    name: Annotated[str | None, typer.Argument(help="Show all about one scheme.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README.")] = False,
) -> None:
    """List the residual schemes, with one line and a reference each."""
    from resformer.listing import scheme_card, schemes_markdown, schemes_table

    _show(scheme_card(name) if name else schemes_markdown() if markdown else schemes_table())


@app.command()
def hosts(
    name: Annotated[
        str | None, typer.Argument(help="Show all about one family, or about the model of a folder or hub id.")
    ] = None,
) -> None:
    """List the families of models that can be patched."""
    from resformer.listing import host_card, hosts_table

    if name:
        _quiet()
    _show(host_card(name) if name else hosts_table())


@app.command()
def data(
    task: Annotated[str | None, typer.Argument(help="Write this task; without it, list all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to; new or empty.")] = None,
    format: Annotated[str, typer.Option(help="parquet, tsv or jsonl.")] = "parquet",
    source: Annotated[str | None, typer.Option("--data", help="Folder that holds the task's data.")] = None,
    seed: Annotated[int, typer.Option(help="Of the built-in tasks.")] = 0,
) -> None:
    """List the tasks, or write one of them to files."""
    if task is None:
        from resformer.listing import tasks_table

        _show(tasks_table())
        return
    if output is None:
        raise ValueError(f"data {task} needs --output, the folder to write to")
    from resformer.data.glue import write_task

    write_task(task, output, format=format, data=source, seed=seed)
    typer.echo(f"{task} written to {output}")


@app.command()
def finetune(
    model: Annotated[str, typer.Option(help="Folder or hub id of a transformers checkpoint, patched or not.")],
    output: Annotated[Path, typer.Option(help="Folder for result.json, train.jsonl and the model.")],
    task: Annotated[str | None, typer.Option(help="See `resformer data`; or give two files of your own.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the task's data. [default: built in or hub]")] = None,
    scheme: Annotated[str | None, typer.Option(help=f"{SCHEME}. [default: the model as it is]")] = None,
    init: Annotated[str, typer.Option(help="Of the scheme: preserve or paper.")] = "preserve",
    placement: Annotated[str | None, typer.Option(help="Of the norms: native, pre, post, sandwich, none.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training split.")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 5e-5,
    scheme_lr_multiplier: Annotated[float, typer.Option(help="For the scheme's parameters, on top.")] = 1.0,
    weight_decay: Annotated[float, typer.Option(help="Of matrices; never of the scheme.")] = 0.01,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.1,
    schedule: Annotated[str, typer.Option(help="linear, hold or constant.")] = "linear",
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    max_length: Annotated[int, typer.Option(help="Tokens.")] = 128,
    train_size: Annotated[int | None, typer.Option(help="Use only the first so many training examples.")] = None,
    seed: Annotated[int, typer.Option(help="Of head, order and dropout.")] = 0,
    save_model: Annotated[bool, typer.Option(help="Keep the model.")] = True,
    train_file: Annotated[Path | None, typer.Option(help="Your own data: csv, tsv, jsonl or parquet.")] = None,
    validation_file: Annotated[Path | None, typer.Option(help="The same, to evaluate on.")] = None,
    text: Annotated[str | None, typer.Option(help="COLUMN or COLUMN,COLUMN. [default: by known names]")] = None,
    label: Annotated[str, typer.Option(help="Column of your own data.")] = "label",
    regression: Annotated[bool | None, typer.Option(help="Targets or classes. [default: as labels look]")] = None,
) -> None:
    """Fine-tune a model on a task or on files of your own, with a residual scheme patched in."""
    from resformer.data.tasks import TASKS

    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS, hint="`resformer data` lists them.")
    own = {"--train-file": train_file, "--validation-file": validation_file}
    if (task is None) != (None not in own.values()) or (task is not None and any(own.values())):
        given = ", ".join(name for name, value in ({"--task": task} | own).items() if value is not None)
        raise ValueError(f"give --task, or both --train-file and --validation-file; given: {given or 'none'}")
    if task is not None and (text, label, regression) != (None, "label", None):
        raise ValueError("--text, --label and --regression are of your own files; give --train-file, not --task")
    if task is None and data is not None:
        raise ValueError("--data is of --task; your own files are --train-file and --validation-file")
    name, options = parse_scheme(scheme) if scheme else (None, {})
    from resformer.data.glue import load_task
    from resformer.data.own import own_task
    from resformer.train.finetune import finetune as run
    from resformer.train.load import load_classifier

    _quiet()
    if task is not None:
        kind, splits = TASKS[task], load_task(task, data, say=_say)
    else:
        assert train_file is not None
        assert validation_file is not None
        columns = text.split(",") if text else None
        kind, splits = own_task(
            train_file, validation_file, texts=columns, label=label, regression=regression, say=_say
        )
    if train_size is not None and train_size < 1:
        raise ValueError(f"train_size must be at least 1, got {train_size}")
    if train_size is not None:
        splits["train"] = splits["train"].select(range(min(train_size, len(splits["train"]))))
    classifier, tokenizer = load_classifier(
        model, kind, scheme=name, init=init, placement=placement, options=options, seed=seed
    )
    result = run(
        classifier,
        tokenizer,
        kind,
        splits,
        output,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        scheme_lr_multiplier=scheme_lr_multiplier,
        warmup=warmup,
        schedule=schedule,
        clip=clip,
        precision=precision,
        max_length=max_length,
        seed=seed,
        save_model=save_model,
        describe={
            "model": model,
            "scheme": scheme,
            "init": init if scheme else None,
            "placement": placement,
            "train_size": train_size,
            **({} if task else {"train_file": str(train_file), "validation_file": str(validation_file)}),
        },
    )
    _tell(result, output)


@app.command()
def compare(
    schemes: Annotated[list[str], typer.Option(help=f"One or more; each {SCHEME}.")],
    depths: Annotated[list[int], typer.Option(help="Numbers of layers.", parser=lambda text: _read(int, text))],
    tasks: Annotated[list[str], typer.Option(help="See `resformer data`.")],
    output: Annotated[Path, typer.Option(help="Folder of the study; an earlier study goes on.")],
    seeds: Annotated[int, typer.Option(help="How many, for each cell.")] = 1,
    learning_rates: Annotated[
        list[float], typer.Option(help="At their peak.", parser=lambda text: _read(float, text))
    ] = [1e-3],  # noqa: B006
    width: Annotated[int, typer.Option(help="Of the stream.")] = 32,
    heads: Annotated[int, typer.Option(help="Of attention.")] = 2,
    ffn: Annotated[int | None, typer.Option(help="Inner width. [default: 4 times the width]")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 32,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.0,
    schedule: Annotated[str, typer.Option(help="hold, linear or constant.")] = "hold",
    weight_decay: Annotated[float, typer.Option(help="Of matrices; never of the scheme.")] = 0.01,
    scheme_lr_multiplier: Annotated[float, typer.Option(help="For the scheme's parameters, on top.")] = 1.0,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = 1.0,
    dropout: Annotated[float, typer.Option(help="Share of activations.")] = 0.0,
    init: Annotated[str, typer.Option(help="Of the schemes: paper or preserve.")] = "paper",
    weight_init: Annotated[str, typer.Option(help="Of the host: xavier, bert or width_scaled.")] = "xavier",
    max_length: Annotated[int, typer.Option(help="Tokens.")] = 128,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    train_size: Annotated[int | None, typer.Option(help="Use only the first so many training examples.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the tasks' data. [default: built in or hub]")] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at a time. [default: one a GPU, or a core]")] = None,
    shard: Annotated[str | None, typer.Option(help="I/N: only every N-th run, from run I; for job arrays.")] = None,
) -> None:
    """Train schemes x depths x tasks x seeds from scratch, in one process a core, and report."""
    from resformer.study.execute import execute
    from resformer.study.plan import Settings, Study
    from resformer.study.report import write_report

    settings = Settings(
        width=width,
        heads=heads,
        ffn=ffn,
        dropout=dropout,
        init=init,
        weight_init=weight_init,
        steps=steps,
        batch_size=batch_size,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        scheme_lr_multiplier=scheme_lr_multiplier,
        clip=clip,
        precision=precision,
        max_length=max_length,
        train_size=train_size,
        data=data,
    )
    study = Study(tuple(schemes), tuple(depths), tuple(tasks), seeds, tuple(learning_rates), settings)
    tally = execute(study, output, workers=workers, shard=_shard(shard), command=_command())
    report = write_report(output)
    typer.echo(f"{tally.finished} runs finished, {tally.skipped} were there, {len(tally.failed)} failed")
    for run, error in tally.failed.items():
        typer.echo(f"  {run}: {error}", err=True)
    typer.echo(f"report: {report}")
    if tally.failed:
        raise typer.Exit(1)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="Folder of the study.")],
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write the report of a study, finished or not: report.html, report.md, results.csv."""
    from resformer.study.report import write_report

    path = write_report(study)
    typer.echo(f"report: {path}")
    if open_:
        typer.launch(path.resolve().as_uri())


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

    _quiet()
    if file is not None:
        kind, splits = own_split(file, own_classes(model), texts=text.split(",") if text else None)
    else:
        assert task is not None
        kind, splits = TASKS[task], load_split(task, split, data, say=_say)
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
        _say(f"predictions: {path}{measured}")


def spread(arguments: list[str]) -> list[str]:
    """`--depths 2 8 32` as `--depths 2 --depths 8 --depths 32`, which is the only form that click reads."""
    result: list[str] = []
    option = None
    for argument in (part for whole in arguments for part in _parted(whole)):
        if argument.startswith("--"):
            option = argument if argument in LISTS else None
            if option is None:
                result.append(argument)
        elif option is None:
            result.append(argument)
        else:
            result += [option, argument]
    return result


def _parted(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name in LISTS else [argument]


def _read(kind: type, text: Any) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise typer.BadParameter(f"{text!r} is not {what}") from None


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit()):
        raise ValueError(f"--shard must be I/N, such as 0/4, got {text!r}")
    return int(i), int(n)


def _command() -> str:
    return shlex.join(["resformer", *sys.argv[1:]])


def _quiet() -> None:
    """Leave the terminal to our own progress: no bars and no report about the head, which is new by intent."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # under accelerate launch one process speaks
        typer.echo(line, err=True)


def _tell(result: dict[str, Any], output: Path) -> None:
    if os.environ.get("RANK", "0") != "0":  # under accelerate launch one process speaks
        return
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
    typer.echo(f"{result['status']}, training loss {result['train_loss']}; {metrics or 'no metrics'}")
    typer.echo(f"result: {output / 'result.json'}")
    if result["status"] == "diverged":
        typer.echo("the loss was not finite: lower --learning-rate, or raise --warmup; no model is kept", err=True)
        raise typer.Exit(3)


def _show(what: Any) -> None:
    if isinstance(what, str):
        typer.echo(what)
        return
    from rich.console import Console

    Console().print(what)


if __name__ == "__main__":
    main()
