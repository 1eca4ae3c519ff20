"""What a patched host of any family keeps with a KV cache, compiled and exported."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from resformer.patching import patch
from resformer.testing.hosts import batch, randomize
from resformer.testing.mechanics import relative
from resformer.testing.subject import (
    HostCannot,
    Subject,
    first,
    measured_first,
    refusal,
)


def check_cache(subject: Subject, name: str) -> None:
    """Token by token with a KV cache a decoder gives the scores of the whole text, and generates the same text."""
    host = subject.speaker()
    with measured_first():
        _check_cache(host)
    if reason := refusal(host, name, "paper"):
        raise HostCannot(reason)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        randomize(patch(host, name, init="paper", verify=False))
    try:
        _check_cache(host)
    except ValueError as error:
        if repr(name) in str(error) and "use_cache=False" in str(error):  # it cannot have one here, and says so
            raise HostCannot(str(error)) from error
        raise


def _check_cache(model: Any) -> None:
    ids = batch()["input_ids"]
    fixed = {"input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    key = "decoder_input_ids" if fixed else "input_ids"
    whole = model(**fixed, **{key: ids}, use_cache=False).logits
    past, steps = None, []
    for part in (ids[:, :3], *ids[:, 3:].split(1, dim=1)):
        output = model(**fixed, **{key: part}, past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    error = relative(torch.cat(steps, dim=1), whole)
    assert error < 1e-6, f"with a cache the scores differ, {error:.1e} relative"
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    if fixed:
        settings["decoder_start_token_id"] = 1  # not that of padding, which M2M-100 does not count
    texts = [model.generate(input_ids=ids, **settings, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts), "with a cache it generates another text"


def check_compile(subject: Subject, name: str) -> None:
    """One graph, forward and backward, with the outputs and gradients of the model itself."""
    with measured_first():
        _check_compile(subject.host(dtype=torch.float32), subject)
    _check_compile(subject.patched(name, dtype=torch.float32), subject)


def _check_compile(model: Any, subject: Subject) -> None:
    torch._dynamo.reset()
    other, given = copy.deepcopy(model), subject.batch(model)
    run = torch.compile(lambda **kwargs: first(other(**kwargs)), fullgraph=True, backend="aot_eager")
    expected, found = first(model(**given)), run(**given)
    assert relative(found, expected) < 1e-4, "compiled, it computes something else"
    expected.square().mean().backward()
    found.square().mean().backward()
    for (path, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), f"compiled, a gradient reaches {path} in one of the two"
        if p.grad is not None and q.grad is not None:
            assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4), f"compiled, another gradient reaches {path}"


def check_export(subject: Subject, name: str) -> None:
    """`torch.export` gives a program with the model's output."""
    with measured_first():
        _check_export(subject.host(dtype=torch.float32), subject)
    _check_export(subject.patched(name, dtype=torch.float32), subject)


def _check_export(model: Any, subject: Subject) -> None:
    given = subject.batch(model)
    fed = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in given.items() if name not in fed}

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **kwargs: Any) -> Tensor:
            return first(self.model(**kwargs, **fixed))

    with torch.no_grad():
        program = torch.export.export(First(), (), fed)
        error = relative(program.module()(**fed), first(model(**given)))
    assert error < 1e-4, f"exported, it computes something else, {error:.1e} relative"
