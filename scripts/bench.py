"""Speed and memory, measured side by side: see scripts/studies/benchmark/README.md.

    python scripts/bench.py                                     all suites for which there is what they need
    python scripts/bench.py --suite overhead schemes --json F   two of them, kept in F and beside it as Markdown
    python scripts/bench.py --suite schemes --only mhc --again  one row anew

What the file holds is not measured again, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import datasets
import torch
from rich.console import Console

from benchmark import depth, finetune, overhead, peers, pretrain, schemes, startup, study
from benchmark.record import Record, machine
from benchmark.steps import PEAK
from benchmark.suite import Bench, Row, Size, Suite, Values, choose, silent
from benchmark.table import markdown, terminal
from resformer.cli.speaking import quiet
from resformer.files import write_text_atomically
from resformer.train.progress import progress_bar

MODULES = (overhead, schemes, peers, pretrain, depth, startup, study, finetune)
SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in MODULES}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", metavar="NAME", help=f"all, or some of {', '.join(SUITES)}")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a row, repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, and cores on Linux")
    parser.add_argument("--depth", type=int, default=Size.depth, help="of the encoder that takes steps")
    parser.add_argument("--width", type=int, default=Size.width, help="(a multiple of 64)")
    parser.add_argument("--batch", type=int, default=Size.batch, help="inputs of 128 tokens")
    parser.add_argument("--pairs", type=int, default=15, help="timed, odd; 0: memory and operations alone")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a pretrained encoder (finetune)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="GLUE (finetune)")
    parser.add_argument("--seeds", type=int, default=5, help="(finetune)")
    parser.add_argument("--again", action="store_true", help="measure also what the file holds")
    file = Path("benchmark.json")
    parser.add_argument("--json", type=Path, metavar="F", default=file, help=f"({file}); the Markdown is F with .md")
    given = parser.parse_args(arguments)
    try:
        run(given)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        goes_on = "the same command goes on" + ", without --again" * given.again
        print(f"\nstopped; {given.json} has what was measured, and {goes_on}", file=sys.stderr)
        raise SystemExit(130) from None


def run(given: argparse.Namespace) -> None:
    if given.pairs < 0 or (given.pairs and given.pairs % 2 == 0):
        raise ValueError(f"pairs is {given.pairs}; it must be odd, so that one is in the middle, or 0")
    for name in ("threads", "seeds", "depth", "batch"):
        if (value := getattr(given, name)) < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if given.width < 64 or given.width % 64:
        raise ValueError(f"width is {given.width}; it must be a multiple of 64")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is 'cuda', and torch {torch.__version__} finds none; leave it out")
    lacking = {name: lack for name, suite in SUITES.items() if (lack := suite.lacks(given))}
    if given.suite is None:
        for name, lack in lacking.items():
            print(f"suite {name} is left out: {lack}", file=sys.stderr)
    plan = choose(SUITES, given.suite or [name for name in SUITES if name not in lacking], given.only)
    for suite in plan:
        if suite.name in lacking:
            raise ValueError(f"suite {suite.name!r} cannot be measured: {lacking[suite.name]}")
    for name in ("model", "data"):
        if (folder := getattr(given, name)) is not None and not folder.is_dir():
            raise ValueError(f"{name} is {folder}, which is no folder; give one that is there")
    beside = given.json.with_suffix(".md")
    if given.json.suffix != ".json":
        raise ValueError(
            f"json is {given.json}; its name must end in .json, since the tables are beside it in {beside}"
        )
    if not given.json.exists() and beside.exists():
        raise ValueError(f"the tables of {given.json} would replace {beside}; move that, or give another name")
    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # where there is a GPU as well
    size = Size(depth=given.depth, width=given.width, batch=given.batch)
    quiet()
    datasets.disable_progress_bars()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    record = Record(given.json, machine(device) | {"encoder": str(size)}, _command(given))
    try:
        record.write()
    except OSError as error:
        raise ValueError(f"{given.json} cannot be written ({error}); give another place") from None
    with cores(given.threads if given.device == "cpu" else None):
        measure(plan, record, device, size, given)


def measure(
    plan: dict[Suite, list[Row]], record: Record, device: torch.device, size: Size, given: argparse.Namespace
) -> None:
    """What the record does not hold yet, row by row, and each suite's table."""
    for suite, rows in plan.items():
        with progress_bar(len(rows), shown=True, what=suite.name) as update:
            for row in rows if given.again and suite.piecemeal else ():
                record.forget(suite.name, row.name)
            for number, row in enumerate(rows):
                if record.has(suite.name, row.name, given.pairs) and not (given.again or suite.piecemeal):
                    continue
                tell = lambda note, number=number, row=row: update(completed=number, note=f"{row.name}: {note}")
                bench = Bench(record, device, given.pairs, size, given.model, given.data, given.seeds, tell=tell)
                values = suite.measure(row, bench)
                if PEAK in values:
                    tell("peak memory")
                    values[PEAK] = in_fresh_process(suite, row, bench)[PEAK]
                record.keep(suite.name, row.name, values, given.pairs, of_parts=suite.piecemeal)
                write_text_atomically(given.json.with_suffix(".md"), markdown(SUITES, record))
        Console().print(terminal(suite, record))


def in_fresh_process(suite: Suite, row: Row, bench: Bench) -> Values:
    """What needs no pairs, where no other row has left anything in the allocator."""
    asked = replace(bench, pairs=0, record=Record(), tell=silent)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_without_pairs, suite.name, row.name, asked, torch.get_num_threads()).result()


def _without_pairs(suite: str, row: str, bench: Bench, threads: int) -> Values:
    quiet()
    torch.set_num_threads(threads)
    return SUITES[suite].measure(*SUITES[suite].chosen([row]), bench)


@contextmanager
def cores(count: int | None) -> Iterator[None]:
    """Meanwhile this process and those that it starts have so many cores, where the system can tell them (Linux)."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _command(given: argparse.Namespace) -> str:
    """As a reader would type it: without where somebody's files lie."""
    words = ["python scripts/bench.py", *(["--suite", *given.suite] if given.suite else [])]
    words += [f"--only '{name}'" for name in given.only]
    words += [f"--{name} {getattr(given, name)}" for name in ("device", "threads", "pairs")]
    words += [
        f"--{name} {getattr(given, name)}"
        for name in ("depth", "width", "batch")
        if getattr(given, name) != getattr(Size, name)
    ]
    words += [f"--{name} DIR" for name in ("model", "data") if getattr(given, name) is not None]
    words += [f"--seeds {given.seeds}"] * (given.model is not None)
    return " ".join(words)


if __name__ == "__main__":
    main()
