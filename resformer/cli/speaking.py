"""What the command line says, where, and in which of several processes."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from typing import Any, NoReturn

import typer

WAIT = 3.0  # seconds, in which a launcher has noticed that another process failed


def quiet() -> None:
    """Leave the terminal to our own progress: no bars and no report about the head, which is new by intent."""
    import warnings

    from transformers.utils import logging

    warnings.formatwarning = lambda message, *rest: f"note: {message}\n"
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def fail(message: str) -> NoReturn:
    """Exit with status 2 and a message: one, where several processes of a machine fail alike, since the launcher ends
    those that wait as soon as the first has failed. What only one of them meets is told after the wait."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(WAIT)
    typer.echo(f"resformer: {message}", err=True)
    sys.exit(2)


def speaks() -> bool:
    """Whether this is the one process that does, under `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, *, wrap: bool = True) -> None:
    """On stderr, of one process, in lines that a terminal shows."""
    if speaks():
        typer.echo(lines(text) if wrap else text, err=True)


def lines(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def show_once(what: Any) -> None:
    if speaks():
        show(what)


def show(what: Any) -> None:
    if isinstance(what, str):
        typer.echo(what)
        return
    from rich.console import Console

    Console().print(what)
