"""`resformer schemes` and `resformer hosts`: what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from resformer.cli.app import app
from resformer.cli.speaking import quiet, show


@app.command()
def schemes(
    name: Annotated[str | None, typer.Argument(help="Show all about one scheme.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README.")] = False,
) -> None:
    """List the residual schemes, with one line and a reference each."""
    from resformer.listing import scheme_card, schemes_markdown, schemes_table

    show(scheme_card(name) if name else schemes_markdown() if markdown else schemes_table())


@app.command()
def hosts(
    name: Annotated[
        str | None, typer.Argument(help="Show all about one family, or about the model of a folder or hub id.")
    ] = None,
) -> None:
    """List the families of models that can be patched."""
    from resformer.listing import host_card, hosts_table

    if name:
        quiet()
    show(host_card(name) if name else hosts_table())
