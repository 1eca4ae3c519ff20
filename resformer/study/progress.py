"""How far a study is, on standard error: one bar on a terminal, otherwise a line for each run."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from resformer.study.plan import Run
from resformer.study.results import Result

WIDTH = 80  # of the plain lines, in characters


class Progress:
    """To be used as a context. The time left is estimated from the work done, counted in layers x steps."""

    def __init__(self, runs: Sequence[Run], console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.runs, self.done = len(runs), 0
        self.work, self.worked = sum(map(_work, runs)), 0
        self.began = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[left]}"))
        self.bar = Bar(*columns, console=self.console, expand=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(f"0/{self.runs} runs", total=self.work, left="")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self, run: Run, outcome: str, result: Result) -> None:
        """One run has ended: "finished", "failed" or "elsewhere"."""
        self.done += 1
        self.worked += _work(run)
        spent = time.monotonic() - self.began
        remaining = spent * (self.work - self.worked) / self.worked
        left = f"{duration(remaining)} left" if self.done < self.runs else duration(spent)
        self.bar.update(self.task, completed=self.worked, description=f"{self.done}/{self.runs} runs", left=left)
        if outcome == "finished":
            outcome = result.status if result.score is None else f"{result.score:.3f}"
        if outcome in ("failed", "diverged") or not self.console.is_terminal:
            count = f"{self.done:>{len(str(self.runs))}}/{self.runs}"
            self.say(_fit(f"{count}  {outcome:<9} {left:<11} {run}"))
        if outcome == "failed":
            self.say(_fit(f"  {result.error}"))
            self.say(f"  see {result.directory.name}/error.json and log.txt")


def duration(seconds: float) -> str:
    """Seconds in the units people think in: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _work(run: Run) -> int:
    return run.depth * run.settings.steps


def _fit(line: str) -> str:
    line = " ".join(line.splitlines())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
