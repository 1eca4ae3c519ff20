"""The commands are put on this one application; its help lists them in the order of their import."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Change how the layers of a Transformer are connected, and measure what it does.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
studies = typer.Typer(help="Look at the folder of a study, and mend it.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(studies, name="study")
