"""`resformer diagnose` and `resformer theory`: why a scheme does what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resformer.cli.app import app
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
    """Measure how signals and gradients travel through a model, patched or not."""
    from resformer.diagnosing import subject
    from resformer.diagnostics.measures import MEASURES

    for name in measure:
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES)
    quiet()
    seen = subject(start, task=task, data=data, texts=texts, max_length=max_length, column=column, seed=seed, say=say)
    typer.echo(lines(str(seen)))
    for name in dict.fromkeys(measure or MEASURES):
        measured = MEASURES[name](seen.model, seen.batch)
        typer.echo()
        show(measured.shown())
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

    quiet()
    outcomes = run_claims(claims or (), workers=workers, done=lambda one: say(f"{one.claim.name} is measured"))
    show(table(outcomes, explain=bool(claims)))
    if report is not None:
        write_theory(outcomes, report)
        typer.echo(f"report: {report}")
    if not all(outcome.expected for outcome in outcomes):
        raise typer.Exit(1)
