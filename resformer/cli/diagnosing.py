"""`resformer diagnose`, `advise` and `theory`: why a scheme does what it does, and what to expect of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resformer.cli.app import app, studies
from resformer.cli.speaking import lines, quiet, say, show
from resformer.errors import unknown
from resformer.options import options_of
from resformer.train.start import Start


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
    """Measure how signals and gradients travel through a model, patched or not.

    Without --measure, one that refuses the model or the texts says why, and the others go on.
    """
    from resformer.diagnosing import subject
    from resformer.diagnostics.measures import MEASURES

    for name in measure:
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES)
    quiet()
    _folder(output)
    seen = subject(start, task=task, data=data, texts=texts, max_length=max_length, column=column, seed=seed, say=say)
    typer.echo(lines(str(seen)))
    refused: list[ValueError] = []
    for name in dict.fromkeys(measure or MEASURES):
        try:
            measured = MEASURES[name](seen.model, seen.batch)
        except ValueError as error:
            refused.append(error)
            if measure or len(refused) == len(MEASURES):  # asked for by name, or none is left
                raise
            typer.echo("\n" + lines(f"{name} was not measured: {error}"))
            continue
        typer.echo()
        show(measured.shown())
        if output is not None:
            measured.save(output)
    if output is not None:
        typer.echo(f"\nsaved: {output}")


@app.command()
def advise(
    depth: Annotated[int, typer.Option(help="Layers.")],
    width: Annotated[int, typer.Option(help="Of the stream.")] = 128,
    family: Annotated[str, typer.Option(help="Of the model; see `resformer hosts`.")] = "bert",
    heads: Annotated[int | None, typer.Option(help="Of attention. [default: one for each 64 channels]")] = None,
    ffn_ratio: Annotated[float, typer.Option(help="Inner width of the feed-forward over the width.")] = 4.0,
    weight_init: Annotated[str, typer.Option(help="bert, xavier or width_scaled.")] = "xavier",
    schemes: Annotated[list[str], typer.Option(help="One or more. [default: all that can serve]")] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="How many nets of each.")] = 3,
    task: Annotated[str, typer.Option(help="Whose examples the nets see; see `resformer data`.")] = "sentiment",
    data: Annotated[str | None, typer.Option(help="Folder with the task's data. [default: built in]")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Of `resformer study calibrate`. [default: that of the recorded study]")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes at a time. [default: one a core]")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the table and its picture: JSON, CSV, SVG.")] = None,
) -> None:
    """Compare the schemes at a depth before training, and say how well that is known to tell how training ends."""
    from resformer.advice.advise import advise
    from resformer.advice.recorded import read_calibration
    from resformer.advice.shown import table
    from resformer.study.settings import Settings

    quiet()
    _folder(output)
    known = read_calibration(calibration)
    settings = Settings(family=family, width=width, heads=heads, ffn_ratio=ffn_ratio, data=data)
    advice = advise(
        settings,
        depth,
        weight_init=weight_init,
        task=task,
        chosen=schemes,
        seeds=seeds,
        calibration=known,
        workers=workers,
        done=_every_tenth,
    )
    show(table(advice))
    if output is not None:
        advice.save(output)
        typer.echo(f"saved: {output}")


def _folder(path: Path | None) -> None:
    """Before anything is measured: a place for what is saved."""
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(f"{str(path)!r} is a file; give a folder, new or not")


def _every_tenth(number: int, of: int) -> None:
    if number == of or number * 10 // of > (number - 1) * 10 // of:
        say(f"{number} of {of} nets are measured")


@studies.command("calibrate")
def study_calibrate(
    folder: Annotated[Path, typer.Argument(help="Of the study.")],
    output: Annotated[Path, typer.Option(help="File for the figures, JSON, which `resformer advise` reads.")],
    data: Annotated[str | None, typer.Option(help="Folder with the tasks' data. [default: as the runs say]")] = None,
) -> None:
    """Measure on a study's runs whether what a net is before training tells how training ends, at a greater depth."""
    from resformer.advice.recorded import calibrate_study, write_calibration

    quiet()
    record = calibrate_study(folder, data, say)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_calibration(output, record)
    rule, test = record["rule"], record["test"]
    typer.echo(
        f"{rule['predictor']} ({rule['worse']} is worse), at depth {test['depth']}: tau {test['tau']:.2f} "
        f"({test['low']:.2f} to {test['high']:.2f}), p {test['p']:.2g}\nsaved: {output}"
    )


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

    quiet()
    _folder(report)
    outcomes = run_claims(claims or (), workers=workers, done=lambda one: say(f"{one.claim.name} is measured"))
    show(table(outcomes, explain=bool(claims)))
    if report is not None:
        write_theory(outcomes, report)
        typer.echo(f"report: {report}")
    if not all(outcome.expected for outcome in outcomes):
        raise typer.Exit(1)
