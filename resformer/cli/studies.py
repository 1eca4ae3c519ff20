"""`resformer compare`, `report` and `study status | retry | merge`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from resformer.cli.app import app, studies
from resformer.cli.speaking import quiet, say, show
from resformer.options import options_of
from resformer.study.settings import Settings

SCHEME = "NAME or NAME:OPTION=VALUE,OPTION=VALUE, such as exclusive_gate:bias=0"


@app.command()
@options_of(Settings, taken="settings", partial=True)
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
        str | None, typer.Option(help="Of the schemes. [default: pre_ln, post_ln, identity or the first]")
    ] = None,
    controls: Annotated[bool | None, typer.Option(help="Add negative controls. [default: yes]")] = None,
    endpoint: Annotated[str | None, typer.Option(help="score or train_loss: what is tested. [default: score]")] = None,
    protocol: Annotated[str | None, typer.Option(help="controlled or cramming. [default: controlled]")] = None,
    workers: Annotated[int | None, typer.Option(help="Runs at a time. [default: one a GPU, or a core]")] = None,
    executor: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. [default: one of its own]")] = None,
    shard: Annotated[str | None, typer.Option(help="I/N: piece I of N, from 0 to N - 1; for job arrays.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is to do and what it takes.")] = False,
) -> None:
    """Train schemes x depths x tasks x seeds, each cell at the learning rate that suits it, and report."""
    import torch

    from resformer.study.execute import execute, executing
    from resformer.study.file import read_study
    from resformer.study.kept import as_toml, file_name
    from resformer.study.pool import slots

    quiet()
    for word in schemes or []:
        _no_file(word)
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
    given = {name: value for name, value in axes.items() if value is not None} | settings
    plan = read_study(study, given, say)
    executing(executor, workers, address)
    if part and not plan.piece(*part):
        say(f"piece {shard} has no cells: there are {len(plan.conditions())}")
        return
    if dry_run:
        from resformer.study.forecast import forecast

        show(forecast(plan, output, workers=len(own), shard=part, say=say))
        return
    file = as_toml(plan) if study is None or given else study.read_text(encoding="utf-8")
    command = _command(study, output / file_name(file))
    tally = execute(
        plan, output, executor=executor, workers=workers, shard=part, command=command, file=file, address=address
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
    from resformer.study.report import nothing_finished, to_know, write

    document = study_document(study)
    path = write(document, out or study)
    typer.echo(f"report: {path}")
    for line in to_know(document):
        typer.echo(f"resformer: {line}", err=True)
    if open_:
        typer.launch(path.resolve().as_uri())
    if problem := nothing_finished(document):
        typer.echo(f"resformer: {problem}", err=True)
        raise typer.Exit(1)


@studies.command("status")
def study_status(folder: Annotated[Path, typer.Argument(help="Of the study.")]) -> None:
    """Show what is done, running, failed and missing, cell by cell."""
    from resformer.study.status import status

    show(status(folder))


@studies.command("retry")
def study_retry(
    folder: Annotated[Path, typer.Argument(help="Of the study.")],
    workers: Annotated[int | None, typer.Option(help="Runs at a time. [default: one a GPU, or a core]")] = None,
    executor: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. [default: one of its own]")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the tasks' data. [default: as the study says]")] = None,
) -> None:
    """Run the failures again, and what waited for them; `resformer compare` runs what was never begun."""
    from resformer.study.execute import retry

    tally = retry(folder, executor=executor, workers=workers, address=address, data=data)
    _tell_tally(tally)
    if tally.waiting:
        say("`resformer compare` with the study's file runs what waits")
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
    if tally.elsewhere:
        say("not complete: another process is at the rest, in the same folder; start again when that has ended")


def _no_file(word: str) -> None:
    if word.endswith(".toml"):
        raise typer.BadParameter(f"{word!r} is read as a value of the option before it; give the study file first")


def _read(kind: type, text: Any) -> Any:
    _no_file(str(text))
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise typer.BadParameter(f"{text!r} is not {what}") from None


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"--shard must be I/N with I from 0 to N - 1, such as 0/4, the first of four; got {text!r}")
    return int(i), int(n)


def _command(study: Path | None, kept: Path) -> str:
    """As it was typed, but of the study file that is kept, since that of the user may change."""
    typed = sys.argv[1:]
    return shlex.join(["resformer", *(str(kept) if study and Path(word) == study else word for word in typed)])
