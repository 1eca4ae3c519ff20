"""Peak memory of a run."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak so far, where the system can: on CUDA devices, and of the process on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not Linux, or a container that forbids it
            CLEAR.write_text("5")  # man 5 proc: the peak resident size becomes the present one


def peak_memory_mb(device: torch.device) -> float:
    """MiB: tensors allocated on a CUDA device; otherwise the resident size of this process, interpreter and all.

    The peak is since `reset_peak_memory`, or since the start of the process where the system cannot reset it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError, StopIteration):  # not Linux
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    # On Linux it would begin with the peak of who started this process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
