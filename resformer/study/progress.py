"""How far a study is, on standard error: one bar on a terminal, otherwise a line for each run that ends."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from resformer.study.plan import Condition, Run
from resformer.study.results import Result
from resformer.study.worker import Unit
from resformer.train.progress import duration

WIDTH = 80  # of the plain lines, in characters
AGAIN = {"memory": "out of memory, again with half the micro-batch", "died": "its process died, again"}


class Progress:
    """To be used as a context. `runs` are all that are asked for, of which `before` were finished already.

    A run whose learning rate is not chosen yet counts as the run that it will be. The time left is estimated task by
    task from the runs that have ended, by the time they took for their work: layers x width^2 x length.
    """

    def __init__(self, runs: Iterable[Unit], before: Iterable[Unit] = (), console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.began = time.monotonic()
        self.left: Counter[Condition] = Counter()  # runs of each that have not ended well
        self.work: Counter[str] = Counter()  # of each task, that is to be done
        self.worked: Counter[str] = Counter()  # of each task, that was done here
        self.seconds: defaultdict[str, float] = defaultdict(float)  # that it took, of one slot
        self.since: dict[Unit, float] = {}  # when those that are running began
        self.done = self.failed = self.total = 0
        self.told = (-1, 0)  # cells done and runs failed when last a line told of them
        for run in runs:
            self.total += 1
            if isinstance(run, Run):
                self.left[run.condition] += 1
            self.work[_task(run)] += work(run)
        for run in before:
            self.skip(run)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[left]}"))
        self.bar = Bar(*columns, console=self.console, expand=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(self.standing(), total=self.total, completed=self.done, left="")

    def __enter__(self) -> Progress:
        self.bar.start()
        self._tell()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def skip(self, run: Unit) -> None:
        """One run was finished before."""
        self.done += 1
        if isinstance(run, Run):
            self.left[run.condition] -= 1
        self.work[_task(run)] -= work(run)

    def start(self, run: Unit) -> None:
        """One run has begun."""
        self.since[run] = time.monotonic()
        self._show()

    def advance(self, run: Unit, outcome: str, result: Result) -> None:
        """One run has ended, in the words of `attempt`."""
        now = time.monotonic()
        spent = now - self.since.pop(run, now)  # one whose process died before it began has not started
        if outcome not in ("elsewhere", "skipped"):
            self.seconds[_task(run)] += spent
        if outcome in AGAIN:
            self.say(_fit(f"{AGAIN[outcome]}: {run}"))
            self._show()
            return
        if outcome == "finished":
            self.worked[_task(run)] += work(run)
            self.skip(run)
            outcome = result.status if result.score is None else f"{result.score:.3f}"
        elif outcome == "skipped":
            self.skip(run)
        else:  # to be done another time, or by another
            self.work[_task(run)] -= work(run)
            self.failed += outcome == "failed"
        self._show()
        if outcome in ("failed", "diverged") or not self.console.is_terminal:
            count = f"{self.done:>{len(str(self.total))}}/{self.total}"
            self.say(_fit(f"{count}  {outcome:<9} {self.remaining():<11} {run}"))
        if outcome == "failed":
            self.say(_fit(f"  {result.error}"))
            self.say(f"  see {result.directory.name}/error.json and log.txt")
        self._tell()

    def standing(self) -> str:
        """Cells and runs that are done, running and failed, in few words."""
        counts = [f"{self._cells()}/{len(self.left)} cells", f"{self.done}/{self.total} runs"]
        more = {"running": len(self.since), "failed": self.failed}
        return ", ".join(counts + [f"{number} {what}" for what, number in more.items() if number])

    def remaining(self) -> str:
        """The time left, or "" while no run has ended; at the end the time it took."""
        now = time.monotonic()
        if not +self.work:
            return duration(now - self.began)
        if not self.worked:
            return ""
        done, under_way = sum(self.seconds.values()), sum(now - begun for begun in self.since.values())
        pace = {task: self.seconds[task] / amount for task, amount in self.worked.items()}
        overall = done / self.worked.total()  # for a task of which no run has ended
        wanted = sum(amount * pace.get(task, overall) for task, amount in (+self.work).items()) - under_way
        slots = max(1.0, (done + under_way) / max(now - self.began, 1e-9))  # busy at a time, on average
        return f"{duration(max(wanted, 0.0) / slots)} left"

    def _cells(self) -> int:
        return sum(not left for left in self.left.values())

    def _tell(self) -> None:
        """Where there is no bar: a line at the beginning, and whenever a cell is complete or a run has failed."""
        if not self.console.is_terminal and self.told != (now := (self._cells(), self.failed)):
            self.told = now
            self.say(", ".join(filter(None, [self.standing(), self.remaining()])))

    def _show(self) -> None:
        self.bar.update(self.task, completed=self.done, description=self.standing(), left=self.remaining())


def work(run: Unit) -> int:
    """What a run costs, in a unit that is the same for all runs of a task."""
    settings = run.config
    length = settings["steps"] if "steps" in settings else settings["epochs"] * 1000
    return round(settings["depth"] * run.settings.width**2 * length)


def _task(run: Unit) -> str:
    return run.condition.task if isinstance(run, Run) else "pre-training"


def _fit(line: str) -> str:
    line = " ".join(line.splitlines())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
