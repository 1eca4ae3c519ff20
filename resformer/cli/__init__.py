"""The command line: names, help and errors; the work is in the library."""

from __future__ import annotations

import os
import sys

import typer

from resformer.cli.app import app
from resformer.cli.speaking import fail
from resformer.cli.spreading import spread

# isort: off
from resformer.cli import listing, data, training, studies, diagnosing  # noqa: F401  commands, in the order of the help
# isort: on


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user can mend is one message on stderr and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(spread(sys.argv[1:] if arguments is None else arguments))
    except ValueError as error:
        fail(str(error))
    except ChildProcessError as error:  # no worker of a study could start
        fail(str(error))
    except OSError as error:
        fail(f"cannot use {error.filename or 'a file'}: {error.strerror or error}")
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C
            typer.echo("resformer: stopped; the same command goes on from what it has saved", err=True)
        else:
            _leave_group()
        raise


def _leave_group() -> None:
    """Take the processes of `accelerate launch` apart, which have all come to the end; else torch warns."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
