"""Random numbers by name: what is drawn for a parameter follows from a seed and its name alone.

With one generator for a whole model each weight depends on all that were drawn before it: one more layer, or one more
parameter, and the nets that are compared have nothing in common. With a generator for each name they share every
weight whose name, shape and distribution they share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def fresh_seed() -> int:
    """A seed for names: one number from torch's global generator, as a DataLoader takes one for its workers.

    So `torch.manual_seed` fixes it, two models that are made one after the other differ, and where the generator
    stands afterwards tells nothing of what was drawn by name.
    """
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def generator(seed: int, name: str) -> torch.Generator:
    """The generator of a name, on the CPU: equal numbers on any machine."""
    return torch.Generator("cpu").manual_seed(_number(seed, name))


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Meanwhile torch's global generator is that of a name, for code that draws from no other; then it is as before.

    Modules are made on the CPU meanwhile (or without values, on 'meta'), for other devices draw other numbers.
    """
    here = torch.get_default_device()
    with torch.random.fork_rng(devices=[]), here if here.type == "meta" else torch.device("cpu"):
        torch.default_generator.manual_seed(_number(seed, name))
        yield


def _number(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def name_in_host(model: Any, name: str) -> str:
    """The name of a parameter or module of a transformers model, without what a head puts before those of the body."""
    return name.removeprefix(f"{model.base_model_prefix}.")
