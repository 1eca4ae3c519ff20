"""A progress bar on standard error, of one line, for one process and only on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Update = Callable[..., None]


@contextmanager
def progress_bar(steps: int, *, shown: bool, seconds: float | None = None, what: str = "training") -> Iterator[Update]:
    """Within, `update(completed=, note=)` moves the bar; nothing is shown unless `shown` and on a terminal.

    With `seconds` the run ends by the clock, and the bar shows no share.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn() if seconds else TimeRemainingColumn(compact=True),
    )
    visible = shown and console.is_terminal
    with Progress(*columns, console=console, disable=not visible, expand=True, transient=True) as progress:
        task = progress.add_task(what, total=None if seconds else steps, note="")
        yield lambda **changes: progress.update(task, **changes)
