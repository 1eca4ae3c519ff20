"""The command line: names, help and errors; the work is in the library."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from resformer.configfile import Config
from resformer.data.source import Source
from resformer.errors import unknown
from resformer.options import options_of
from resformer.study.settings import Settings as StudySettings
from resformer.train.destination import Destination
from resformer.train.settings import Settings
from resformer.train.start import Start

app = typer.Typer(
    help="Change how the layers of a Transformer are connected, and measure what it does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
studies = typer.Typer(help="Look at the folder of a study, and mend it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(studies, name="study")
WORDS = 8192  # entries at most of a tokenizer that is made of the words of a task
COMPILING = "torch.compile: the first steps compile the model, which can take minutes"
WAIT = 3.0  # seconds, in which a launcher has noticed that another process failed
# options that take several values
LISTS = (
    "--schemes",
    "--depths",
    "--tasks",
    "--learning-rates",
    "--weight-inits",
    "--corpus",
    "--validation",
    "--track",
    "--measure",
)
SCHEME = "NAME or NAME:OPTION=VALUE,OPTION=VALUE, such as exclusive_gate:bias=0"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user can mend is one message on stderr and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(spread(sys.argv[1:] if arguments is None else arguments))
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot use {error.filename or 'a file'}: {error.strerror or error}")
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C
            typer.echo("resformer: stopped; the same command goes on from what it has saved", err=True)
        else:
            _leave_group()
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
def tokenizer(
    corpus: Annotated[list[str], typer.Option(help="Files, folders, patterns or hub:OWNER/NAME:CONFIG:SPLIT.")],
    output: Annotated[Path, typer.Option(help="Folder to write to; new or empty.")],
    kind: Annotated[str, typer.Option(help="wordpiece or bpe.")] = "wordpiece",
    vocab_size: Annotated[int, typer.Option(help="Entries at most, special tokens included.")] = 8192,
    lowercase: Annotated[
        bool | None, typer.Option("--lowercase/--no-lowercase", help="Fold case. [default: only wordpiece does]")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="For decoders: bpe with an end of text only.")] = False,
    column: Annotated[str, typer.Option(help="That holds the text, in all but .txt.")] = "text",
) -> None:
    """Train a tokenizer on a corpus."""
    from rich.console import Console

    from resformer.data.corpus import read_corpus
    from resformer.data.tokenizer import SAMPLE, measure, write_tokenizer

    _quiet()
    texts = read_corpus(corpus, column=column)
    with Console(stderr=True).status("reading the corpus") as line:
        trained = write_tokenizer(
            texts,
            output,
            kind,
            vocab_size=vocab_size,
            lowercase=lowercase,
            causal=causal,
            progress=lambda documents: line.update(f"reading the corpus: {documents:,} documents"),
        )
    fewer = f", since the corpus has no more for the {vocab_size} asked for" if len(trained) < vocab_size else ""
    figures = measure(trained, texts)
    typer.echo(f"{kind} tokenizer of {len(trained)} entries{fewer}, written to {output}")
    typer.echo(
        f"{figures['tokens_per_word']:.2f} tokens a word, {figures['unknown']:.2%} of tokens unknown "
        f"(on the first {SAMPLE} documents)"
    )


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

    _quiet()
    to.check()
    task, splits = load_source(source, say=_say)
    words = None
    if start.model is None and start.tokenizer is None:
        texts = (text for column in task.texts for text in splits["train"][column])
        words = train_tokenizer(texts, vocab_size=WORDS, max_length=max_length)
    model, tokenizer = start_model(
        start,
        AutoModelForSequenceClassification,
        seed=settings.seed,
        length=max_length,
        precision=settings.precision,
        task=task,
        tokenizer=words,
        say=_say,
    )
    describe = start.described() | source.described()
    if settings.compile:
        _say(COMPILING)
    if to.dry_run:
        job = finetuning(model, tokenizer, task, splits, settings, max_length=max_length, describe=describe)
        _show_once(rehearse(model, job, to.output, settings, overwrite=to.overwrite))
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
        _say(f"predictions: {path}{measured}", wrap=False)


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
    _quiet()
    to.check()
    auto = AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM
    model, tokenizer = start_model(
        start, auto, seed=settings.seed, length=max_length, precision=settings.precision, say=_say
    )
    aims: dict[str, Any] = {"objective": objective, "tokens": tokens, "describe": start.described()}
    check_pretraining(
        model, tokenizer, settings, objective=objective, length=max_length, tokens=tokens, held_out=held_out
    )
    packed = pack(corpus, tokenizer, max_length, objective, shards=shards, column=column, tell=_say)
    held = pack(validation, tokenizer, max_length, objective, column=column, tell=_say) if validation else held_out
    if settings.compile:
        _say(COMPILING)
    if to.dry_run:
        job = pretraining(model, tokenizer, packed, settings, held_out=held, **aims)
        _show_once(rehearse(model, job, to.output, settings, overwrite=to.overwrite))
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


@app.command()
@options_of(StudySettings, taken="settings", partial=True)
def compare(
    settings: dict[str, Any],
    output: Annotated[Path, typer.Option(help="Folder of the study; an earlier study goes on.")],
    study: Annotated[Path | None, typer.Argument(help="TOML file with the options below.")] = None,
    schemes: Annotated[list[str] | None, typer.Option(help=f"One or more; each {SCHEME}.")] = None,
    depths: Annotated[
        list[int] | None, typer.Option(help="Numbers of layers.", parser=lambda text: _read(int, text))
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="See `resformer data`.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many, for each cell. [default: 5]")] = None,
    learning_rates: Annotated[
        list[float] | None,
        typer.Option(
            help="At their peak; of several each cell gets its own. [default: 3e-4 1e-3 3e-3, of a checkpoint a tenth]",
            parser=lambda text: _read(float, text),
        ),
    ] = None,
    weight_inits: Annotated[
        list[str] | None, typer.Option(help="Of fresh weights: bert, xavier, width_scaled. [default: xavier]")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Of the schemes. [default: pre_ln, post_ln or the first]")
    ] = None,
    controls: Annotated[bool | None, typer.Option(help="Add negative controls. [default: yes]")] = None,
    endpoint: Annotated[str | None, typer.Option(help="score or train_loss: what is tested. [default: score]")] = None,
    protocol: Annotated[str | None, typer.Option(help="controlled or cramming. [default: controlled]")] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at a time. [default: one a GPU, or a core]")] = None,
    executor: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. [default: one of its own]")] = None,
    shard: Annotated[str | None, typer.Option(help="I/N: only every N-th cell, from cell I; for job arrays.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do and what it takes.")] = False,
) -> None:
    """Train schemes x depths x tasks x seeds, each cell at the learning rate that suits it, and report."""
    import torch

    from resformer.study.execute import execute
    from resformer.study.file import read_study
    from resformer.study.pool import slots

    _quiet()
    axes = {
        "schemes": schemes,
        "depths": depths,
        "tasks": tasks,
        "seeds": seeds,
        "learning_rates": learning_rates,
        "weight_inits": weight_inits,
        "baseline": baseline,
        "controls": controls,
        "endpoint": endpoint,
        "protocol": protocol,
    }
    part, own = _shard(shard), slots(workers)
    torch.set_num_threads(own[0].threads)  # what is built and timed here is as it will be in a worker
    plan = read_study(study, {name: value for name, value in axes.items() if value is not None} | settings, _say)
    if dry_run:
        from resformer.study.forecast import forecast

        _show(forecast(plan, output, workers=len(own), say=_say))
        return
    tally = execute(
        plan, output, executor=executor, workers=workers, shard=part, command=_command(), say=_say, address=address
    )
    _tell_tally(tally)
    report(output)
    if tally.failed:
        raise typer.Exit(1)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="Folder of the study.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report. [default: that of the study]")] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write the report of a study, finished or not: a page, Markdown, tables, figures and report.json."""
    from resformer.study.document import study_document
    from resformer.study.report import nothing_finished, write

    document = study_document(study)
    path = write(document, out or study)
    typer.echo(f"report: {path}")
    if open_:
        typer.launch(path.resolve().as_uri())
    if problem := nothing_finished(document):
        typer.echo(f"resformer: {problem}", err=True)
        raise typer.Exit(1)


@studies.command("status")
def study_status(folder: Annotated[Path, typer.Argument(help="Of the study.")]) -> None:
    """Show what is done, running, failed and missing, cell by cell."""
    from resformer.study.status import status

    _show(status(folder))


@studies.command("retry")
def study_retry(
    folder: Annotated[Path, typer.Argument(help="Of the study.")],
    workers: Annotated[int | None, typer.Option(help="Runs at a time. [default: one a GPU, or a core]")] = None,
    executor: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. [default: one of its own]")] = None,
) -> None:
    """Run the failures again, and what waited for them."""
    from resformer.study.execute import retry

    tally = retry(folder, executor=executor, workers=workers, address=address)
    _tell_tally(tally)
    if tally.failed:
        raise typer.Exit(1)


@studies.command("merge")
def study_merge(
    output: Annotated[Path, typer.Argument(help="Folder to bring the runs together in: new, or of a study.")],
    sources: Annotated[list[Path], typer.Argument(help="Folders of studies, one or more.")],
) -> None:
    """Collect the finished runs of folders without a shared disk; different results of a run are an error."""
    from resformer.study.merge import merge

    merged = merge(output, sources)
    for line in merged.passed_over:
        typer.echo(f"passed over {line}", err=True)
    typer.echo(f"{merged.copied} runs copied, {merged.same} found twice with the same result")


@app.command()
@options_of(Start, taken="start", positional=("model",))
def diagnose(
    start: Start,
    measure: Annotated[list[str], typer.Option(help="One or more. [default: all]")] = [],  # noqa: B006
    task: Annotated[str | None, typer.Option(help="See `resformer data`: its texts and labels.")] = None,
    data: Annotated[str | None, typer.Option(help="File of text; with --task, its folder. [default: built in]")] = None,
    column: Annotated[str, typer.Option(help="That holds the text, in all but .txt.")] = "text",
    texts: Annotated[int, typer.Option(help="How many.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens; longer texts are cut.")] = 128,
    seed: Annotated[int, typer.Option(help="Of what is drawn: new weights, masks.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder for tables and pictures: JSON, CSV, SVG.")] = None,
) -> None:
    """Measure how signals and gradients travel through a model, patched or not."""
    from resformer.diagnosing import subject
    from resformer.diagnostics.measures import MEASURES

    for name in measure:
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES)
    _quiet()
    seen = subject(start, task=task, data=data, texts=texts, max_length=max_length, column=column, seed=seed, say=_say)
    typer.echo(_lines(str(seen)))
    for name in dict.fromkeys(measure or MEASURES):
        measured = MEASURES[name](seen.model, seen.batch)
        typer.echo()
        _show(measured.shown())
        if output is not None:
            measured.save(output)
    if output is not None:
        typer.echo(f"\nsaved: {output}")


@app.command()
def theory(
    claims: Annotated[list[str] | None, typer.Argument(help="Only these. [default: all]", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for plots, JSON and CSV.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes at a time. [default: one a core]")] = None,
) -> None:
    """Reproduce what is claimed of residual connections, and say what holds: predicted against measured."""
    from resformer.theory.report import write_theory
    from resformer.theory.run import run_claims
    from resformer.theory.table import table

    _quiet()
    outcomes = run_claims(claims or (), workers=workers, done=lambda one: _say(f"{one.claim.name} is measured"))
    _show(table(outcomes, explain=bool(claims)))
    if report is not None:
        write_theory(outcomes, report)
        typer.echo(f"report: {report}")
    if not all(outcome.expected for outcome in outcomes):
        raise typer.Exit(1)


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


def _tell_tally(tally: Any) -> None:
    counts = {
        "finished": tally.finished,
        "there before": tally.skipped,
        "failed": len(tally.failed),
        "at another process": tally.elsewhere,
        "waiting for others": tally.waiting,
    }
    typer.echo("runs: " + ", ".join(f"{n} {what}" for what, n in counts.items() if n or what in ("finished", "failed")))
    for run, error in tally.failed.items():
        typer.echo(f"  {run}: {error}", err=True)


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
    import warnings

    from transformers.utils import logging

    warnings.formatwarning = lambda message, *rest: f"note: {message}\n"
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _fail(message: str) -> NoReturn:
    """Exit with status 2 and a message: one, where several processes of a machine fail alike, since the launcher ends
    those that wait as soon as the first has failed. What only one of them meets is told after the wait."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(WAIT)
    typer.echo(f"resformer: {message}", err=True)
    sys.exit(2)


def _leave_group() -> None:
    """Take the processes of `accelerate launch` apart, which have all come to the end; else torch warns."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _speaks() -> bool:
    """Whether this is the one process that does, under `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str, *, wrap: bool = True) -> None:
    """On stderr, of one process, in lines that a terminal shows."""
    if _speaks():
        typer.echo(_lines(text) if wrap else text, err=True)


def _lines(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _show_once(what: Any) -> None:
    if _speaks():
        _show(what)


def _tell(result: dict[str, Any], output: Path) -> None:
    from resformer.train.flags import FLAGS

    if not _speaks():
        return
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result["metrics"].items())
    loss = "no loss" if result["train_loss"] is None else f"training loss {result['train_loss']:.4f}"
    typer.echo(_lines(f"{result['status']}, {loss}; {metrics or 'no metrics'}"))
    if result["status"] != "stopped":
        typer.echo(f"result: {output / 'result.json'}")
    for flag in result["flags"]:
        typer.echo(_lines(f"flag {flag}: {FLAGS[flag]}"), err=True)
    if result["status"] == "stopped":
        typer.echo("asked to stop; the same command goes on from the newest checkpoint", err=True)
        raise typer.Exit(75)
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
