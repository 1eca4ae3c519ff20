"""What happens inside a process that carries out runs, one after another, each in its own directory."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

from resformer.files import write_json_atomically
from resformer.study.plan import Run
from resformer.study.pretraining import Encoder
from resformer.study.results import finished, read_result, run_id

Unit = Run | Encoder  # what is carried out
Function = Callable[[Any, Path, int | None], Any]
LOG = "log.txt"  # also what is locked while a process is at a run
LEAVE = signal.SIGUSR2  # to a worker whose study is over; SIGTERM a run takes, to save what it has first
# What torch says in errors of other kinds when memory ran out: of the CPU's allocator, of CUDA, of cuBLAS.
NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Slot:
    """What one worker may use."""

    threads: int
    device: str | None = None  # for CUDA_VISIBLE_DEVICES; None: as it is


def serve(connection: Connection, function: Function | str, slot: Slot) -> None:
    """Say "ready", then receive the arguments of `attempt` and say what became of the run, until the connection ends.

    The process ends after a run that failed or ran out of memory: then a device or a library may be in a bad state,
    and a fresh process is safe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches every process; the parent decides
    signal.signal(LEAVE, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    carry_out = prepared(function, slot)
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send("ready")
        said = "ready"
        while said not in ("failed", "memory"):
            said = attempt(carry_out, *connection.recv())
            connection.send(said)


def prepared(function: Function | str, slot: Slot) -> Function:
    """The function of a module or of "module:name", and this process as its slot allows."""
    faulthandler.enable()
    os.environ["OMP_NUM_THREADS"] = str(slot.threads)
    if slot.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.device
    if isinstance(function, str):
        module, _, name = function.partition(":")
        function = getattr(importlib.import_module(module), name)
    if "torch" in sys.modules:  # imported, perhaps, before the variable was set
        sys.modules["torch"].set_num_threads(slot.threads)
    assert callable(function)
    return function


def attempt(
    function: Function, run: Unit, directory: Path, micro_batch_size: int | None = None, patience: float = 0.5
) -> str:
    """Carry out one run, and say what became of it.

    "finished"   the directory holds a valid result.json, made now
    "elsewhere"  another process is at this run, after so many seconds of `patience`, or finished it meanwhile
    "memory"     there was not enough for `micro_batch_size` examples (None: the whole batch): half may do
    "failed"     error.json says why
    """
    result, error = directory / "result.json", directory / "error.json"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOG, "a") as log:
        if not _claim(log, patience) or done(run, directory):
            return "elsewhere"
        error.unlink(missing_ok=True)
        if result.exists():  # cut off, or of another version or run: not counted, and not thrown away either
            result.replace(rejected(directory))
        if run_id(read_result(directory).config) != run.id:  # what fine-tuning added, to go on by, is kept
            write_json_atomically(directory / "config.json", run.config)
        with _output_to(log):
            try:
                function(run, directory, micro_batch_size)
                left = read_result(directory)
                if not left.finished:
                    raise RuntimeError(f"the run ended without a result: {left.problem or 'no result.json'}")
                if left.micro_batch_size != micro_batch_size:
                    result.replace(rejected(directory))
                    raise RuntimeError(
                        f"result.json has settings.micro_batch_size {left.micro_batch_size}, not {micro_batch_size}"
                    )
            except Exception as exception:
                if _out_of_memory(exception) and smaller(run, micro_batch_size) is not None:
                    return "memory"
                line = "".join(traceback.format_exception_only(exception)).strip()
                record(run, directory, line, traceback.format_exc())
                return "failed"
    return "finished"


def done(run: Unit, directory: Path) -> bool:
    """Whether there is nothing left to do: of an encoder the model has to be there too, which `merge` leaves behind."""
    return finished(directory) and (isinstance(run, Run) or (directory / "model").is_dir())


def smaller(run: Unit, micro_batch_size: int | None) -> int | None:
    """Half as many examples at once, at least one; None where it was one already."""
    size = run.config["batch_size"] if micro_batch_size is None else micro_batch_size
    return size // 2 or None


def record(run: Unit, directory: Path, error: str, details: str | None = None) -> None:
    """Leave error.json; without `details` the end of the log stands for them."""
    log = directory / LOG
    if details is None:
        details = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomically(directory / "error.json", {"config": run.config, "error": error, "traceback": details})


def running(directory: Path) -> bool:
    """Whether a process is at the run in this directory; on a shared disk only if that has locks."""
    try:
        with open(directory / LOG) as log:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def rejected(directory: Path) -> Path:
    """A name for a result that does not count."""
    number = 1
    while (path := directory / f"rejected-{number}.json").exists():
        number += 1
    return path


def note(directory: Path, line: str) -> None:
    """Add a line to the log of a run that no process is at."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / LOG, "a") as log:
        log.write(f"{line}\n")


def _leave(number: int, frame: object) -> None:
    """End in the ordinary way, in which semaphores are given back: tqdm makes one in every process that has a bar."""
    sys.exit(128 + number)


def _end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL, so that no orphan keeps a device busy."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _claim(log: TextIO, patience: float) -> bool:
    """Whether no other process is at this run. The system frees the lock when this process ends, however."""
    end = time.monotonic() + patience  # one that only looks, or is ending, holds it for a moment
    while True:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
            continue
        except OSError:
            pass  # a file system without locks: at worst the same work is done twice
        return True


@contextlib.contextmanager
def _output_to(log: TextIO) -> Iterator[None]:
    """Meanwhile everything that this process prints goes to the log, also what is written by C code."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    try:
        for number, _ in kept:
            os.dup2(log.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
