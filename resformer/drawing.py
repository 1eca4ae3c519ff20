"""Random numbers by name: what is drawn for a parameter follows from a seed and its name alone.

With one generator for a whole model each weight depends on all that were drawn before it: one more layer, or one more
parameter, and the nets that are compared have nothing in common. With a generator for each name they share every
weight whose name, shape and distribution they share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
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
    """The generator of a name; on the CPU, for each kind of device draws other numbers.

    Among CPUs, normal numbers on those without AVX2 differ from those of others in the last bits.
    """
    return torch.Generator("cpu").manual_seed(_number(seed, name))


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Meanwhile torch's global generator is that of a name, for code that draws from no other; then it is as before.

    Modules are made on the CPU meanwhile (or without values, on 'meta'), whose generator gives the numbers.
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


def redraw(model: Any, names: Iterable[str], seed: int) -> None:
    """Draw again, each by its name, the parameters that a checkpoint did not bring, as the model's class draws them.

    A class may draw a weight where its module is, or above it, as a part of a head or of the model. So all that stands
    above the weight is initialised anew for each of them, while all other weights are marked as loaded, which
    transformers leaves alone.
    """
    new = set(names)
    named = dict(model.named_parameters(remove_duplicate=False))
    brought = {id(p) for name, p in named.items() if name not in new}  # tied ones come under another name
    drawn = {name: p for name, p in sorted(named.items()) if name in new and id(p) not in brought}
    for parameter in drawn.values():
        parameter._is_hf_initialized = True
    for name, parameter in drawn.items():
        path = name.split(".")[:-1]
        above = [model.get_submodule(".".join(path[:length])) for length in range(len(path) + 1)]
        for module in above:
            module._is_hf_initialized = False
        parameter._is_hf_initialized = False
        with seeded(seed, name_in_host(model, name)):
            model.initialize_weights()
        parameter._is_hf_initialized = True
