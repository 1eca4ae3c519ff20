"""Results in a file that grows row by row, and so goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from resformer.files import finite, write_json_atomically
from resformer.provenance import provenance

CODE = Path(__file__).resolve().parent  # which measures, beside the package
ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC", "PYTORCH_CUDA_ALLOC", "PYTORCH_ALLOC")
PEERS = ("x-transformers", "hyper-connections")


class Record:
    """Rows by suite, and the measured parts of rows that take long.

    Args:
        path: the JSON file, read if it is there; None: kept nowhere.
        machine: on which all of it is measured.
        command: that is being run, as a reader would type it.

    Raises `ValueError` if the file is something else, or of another machine: its ratios are not those of this one.
    """

    def __init__(self, path: Path | None = None, machine: dict[str, Any] | None = None, command: str = "") -> None:
        self.path = path
        self.made = provenance(CODE) | {"command": command} | _peers()  # now: what is edited later does not run
        self.content: dict[str, Any] = {"machine": machine or {}, "suites": {}, "parts": {}}
        if path is not None and path.exists():
            self.content = _read(path)
            there = self.content["machine"]
            if other := [
                f"{key} {there.get(key)} (here {value})"
                for key, value in (machine or {}).items()
                if there.get(key) != value
            ]:
                raise ValueError(
                    f"{path} was measured with {', '.join(other)}; measure with the same, or give another file"
                )

    def row(self, suite: str, row: str) -> dict[str, Any] | None:
        """Its values and how they were made; None if it was not measured."""
        return self.content["suites"].get(suite, {}).get(row)

    def has(self, suite: str, row: str, pairs: int) -> bool:
        """Whether it was measured with so many pairs at least."""
        found = self.row(suite, row)
        return found is not None and found["made"]["pairs"] >= pairs

    def keep(self, suite: str, row: str, values: dict[str, Any], pairs: int, *, of_parts: bool = False) -> None:
        """A row as made now; one of kept parts that give what they gave before stays as made then."""
        made = self.made | {"pairs": pairs, "finished": provenance()["finished"]}
        rows, values = self.content["suites"].setdefault(suite, {}), finite(values)
        there = rows.get(row)
        if there is None or not of_parts or there["values"] != values:
            rows[row] = {"values": values, "made": made}
        self.write()

    def part(self, suite: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured before under this name, or is now, with the commit that measured it."""
        parts = self.content["parts"].setdefault(suite, {})
        if name not in parts:
            parts[name] = measure() | {key: self.made[key] for key in ("git", "dirty")}
            self.write()
        return parts[name]

    def forget(self, suite: str, row: str) -> None:
        """The parts whose names begin with the first word of a row's, and the rows that are made of them."""
        for kept in (self.content["suites"].get(suite, {}), self.content["parts"].get(suite, {})):
            for name in [name for name in kept if name.split()[0] == row.split()[0]]:
                del kept[name]

    def write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(self.path, finite(self.content))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if {"machine", "suites", "parts"} <= content.keys():
            return content
    except (ValueError, OSError, AttributeError):
        pass
    raise ValueError(f"{path} is no record of this benchmark; give another file, or move it away")


def _peers() -> dict[str, str]:
    found = {}
    for name in PEERS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, instructions that torch uses, threads of torch, device, and how the allocator was told to behave."""
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(ALLOCATOR)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": name,
        "allocator": " ".join(settings) or "as it comes",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
