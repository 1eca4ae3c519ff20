"""Every test runs offline, on one torch thread, and quietly. Set before anything heavy is imported."""

import gc
import ipaddress
import os
import socket

import pytest

os.environ |= {
    "OMP_NUM_THREADS": "1",  # torch reads it when imported, subprocesses inherit it
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def pytest_collection_finish():
    """What the libraries have made by now stays: the collector need not look it through again and again."""
    gc.freeze()


def is_local(family: int, address: object) -> bool:
    """Whether an address is on this machine: a Unix socket or the loopback interface."""
    if family == getattr(socket, "AF_UNIX", None):
        return True
    host = address[0] if isinstance(address, tuple) else address
    try:
        return host == "localhost" or ipaddress.ip_address(str(host)).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that leaves the machine fails, whatever the library that tried."""

    def guarded(connect):
        def connect_locally(self, address):
            if not is_local(self.family, address):
                raise OSError(f"a test tried to connect to {address!r}; tests run offline")
            return connect(self, address)

        return connect_locally

    create = socket.create_connection

    def create_locally(address, *args, **kwargs):
        if not is_local(socket.AF_INET, address):
            raise OSError(f"a test tried to connect to {address!r}; tests run offline")
        return create(address, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "create_connection", create_locally)
