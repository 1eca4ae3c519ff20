"""Stop a run between two steps when the system asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM and SIGUSR1 (which schedulers send before a time limit) do not end the process; the function
    given says whether one came. Outside the main thread, where Python allows no handlers, nothing changes."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
