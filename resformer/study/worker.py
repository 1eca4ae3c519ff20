"""What happens inside a worker process: it carries out one run after another, each in its own directory."""

import contextlib
import faulthandler
import fcntl
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

from resformer.files import write_json_atomically
from resformer.study.plan import Run
from resformer.study.results import finished, read_result

Function = Callable[[Run, Path], Any]


@dataclass(frozen=True)
class Slot:
    """What one worker may use."""

    threads: int
    device: str | None  # for CUDA_VISIBLE_DEVICES; None: there is no CUDA device


def serve(connection: Connection, function: Function | str, slot: Slot) -> None:
    """Say "ready", then receive (run, directory) and say what became of it, until the connection ends.

    "finished"   the directory holds a valid result.json, made now
    "elsewhere"  another process is at this run, or finished it meanwhile
    "failed"     error.json says why. The process ends then: after an exception a device or a library
                 may be in a bad state, and a fresh process is safe
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches every process; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.enable()
    os.environ["OMP_NUM_THREADS"] = str(slot.threads)
    if slot.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.device
    carry_out = _found(function) if isinstance(function, str) else function
    if "torch" in sys.modules:  # imported, perhaps, before the variable was set
        sys.modules["torch"].set_num_threads(slot.threads)
    with contextlib.suppress(EOFError, BrokenPipeError):
        connection.send("ready")
        said = "ready"
        while said != "failed":
            said = attempt(carry_out, *connection.recv())
            connection.send(said)


def attempt(function: Function, run: Run, directory: Path) -> str:
    """Carry out one run; what became of it, in the words of `serve`."""
    result, error = directory / "result.json", directory / "error.json"
    with open(directory / "log.txt", "a") as log:
        if not _claim(log) or finished(directory):
            return "elsewhere"
        log.truncate(0)
        error.unlink(missing_ok=True)
        if result.exists():  # cut off, or of another version: not counted, and not thrown away either
            result.replace(directory / "rejected.json")
        with _output_to(log):
            try:
                function(run, directory)
                left = read_result(directory)
                if not left.finished:
                    raise RuntimeError(f"the run ended without a result: {left.problem or 'no result.json'}")
            except Exception as exception:
                line = "".join(traceback.format_exception_only(exception)).strip()
                content = {"config": run.config, "error": line, "traceback": traceback.format_exc()}
                write_json_atomically(error, content)
                return "failed"
    return "finished"


def _found(function: str) -> Function:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL, so that no orphan keeps a device busy."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _claim(log: TextIO) -> bool:
    """Whether no other process is at this run. The system frees the lock when this process ends, however."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: at worst the same work is done twice
    return True


@contextlib.contextmanager
def _output_to(log: TextIO) -> Iterator[None]:
    """Meanwhile what this process prints, libraries in C included, goes to `log`."""
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
