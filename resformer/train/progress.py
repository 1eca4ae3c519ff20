"""Progress on standard error, for one process: a bar of one line on a terminal, and elsewhere a line a minute."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 60.0  # seconds
Update = Callable[..., None]


@contextmanager
def progress_bar(steps: int, *, shown: bool, seconds: float | None = None, what: str = "training") -> Iterator[Update]:
    """Within, `update(completed=, note=)` moves the bar; nothing is shown unless `shown`, nor before the first update:
    of several processes, of which one does the work and the others wait, that one shows it.

    With `seconds` the run ends by the clock, and the bar shows no share. What is no terminal, such as the log of a
    scheduler, gets a line at most every `EVERY` seconds.
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
    progress = Progress(*columns, console=console, disable=not visible, expand=True, transient=True)
    total = None if seconds else steps
    task = progress.add_task(what, total=total, note="")
    said = time.monotonic()

    def update(**changes: Any) -> None:
        nonlocal said
        progress.start()  # nothing but the first time
        progress.update(task, **changes)
        if shown and not visible and time.monotonic() - said >= EVERY:
            said = time.monotonic()
            now = progress.tasks[task]
            of = f" of {total:,}" if total else ""
            sys.stderr.write(f"{what}: {now.completed:,.0f}{of}  {now.fields['note']}\n")

    try:
        yield update
    finally:
        if progress.live.is_started:
            progress.stop()


def duration(seconds: float) -> str:
    """Seconds in the units people think in: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
