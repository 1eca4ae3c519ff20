"""What has to go on working around a patched host: transformers, torch, copies, files."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from resformer.checkpoint import from_pretrained
from resformer.layer import Residual
from resformer.patching import patch, unpatch
from resformer.testing.hosts import (
    attentions,
    batch,
    batch_for,
    checkpoint,
    example,
    gradients,
    head_for,
    randomize,
    tiny_host,
)

CLASSIFY = AutoModelForSequenceClassification


def patched(
    family: str, name: str, options: dict[str, Any], auto: Any = None, *, init: str = "paper", **host: Any
) -> PreTrainedModel:
    """A patched host, the scheme's parameters then moved as if trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the paper draws
        model = patch(tiny_host(family, auto or head_for(family), **host), name, init=init, verify=False, **options)
    randomize(model)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|, in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def residuals(model: nn.Module) -> list[Residual]:
    return [module for module in model.modules() if isinstance(module, Residual)]


def check_hidden_states(family: str, name: str, options: dict[str, Any]) -> None:
    """As many hidden states as the host shows, each (B T D), the last of them the output; attentions for each layer."""
    model = patched(family, name, options, layers=3)
    states = model(**batch(), output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(2, 7, 16)] * 4
    assert torch.equal(states[-1], model.base_model(**batch()).last_hidden_state)
    if not example(name, options).repeats:
        assert len(model(**batch(), output_attentions=True).attentions) == 3
    if "sdpa" not in attentions(family):
        return
    sdpa = patched(family, name, options, layers=3, attention="sdpa")
    given = batch(padded=True)
    one, other = (tiny_host(family, head_for(family), layers=3, attention=a)(**given).logits for a in ("eager", "sdpa"))
    if relative(one, other) < 1e-6:  # the sdpa of an older transformers leaves Gemma 2's cap out
        found, expected = sdpa(**given).logits, model(**given).logits
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # eager takes its softmax in float32


def check_checkpointing(family: str, name: str, options: dict[str, Any]) -> None:
    """Both modes of gradient checkpointing give the gradients of none, and compute each layer exactly twice."""
    plain: dict[str, Tensor | None] = {}
    for reentrant in (None, False, True):
        model: Any = patched(family, name, options, layers=3).train()
        if reentrant is not None:
            checkpoint(model, {"use_reentrant": reentrant})
            model.enable_input_require_grads()
        calls: list[int] = []
        for number, own in enumerate(residuals(model)):
            last: Any = own.schemes[-1]
            last.step = partial(_counted, calls, number, last.step)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model(**batch_for(family, labels=True), use_cache=False).loss.backward()
        times = 1 if reentrant is None else 2
        assert sorted(calls) == sorted([*range(len(residuals(model)))] * times), f"layers computed: {calls}"
        found = gradients(model)
        plain = plain or found
        for path, gradient in plain.items():
            other = found[path]
            assert (gradient is None) == (other is None), f"use_reentrant={reentrant}: {path}"
            if gradient is not None and other is not None:  # sums may be taken in another order
                message = f"use_reentrant={reentrant}: {path}"
                torch.testing.assert_close(other, gradient, rtol=1e-10, atol=1e-12, msg=message)


def _counted(calls: list[int], number: int, step: Callable[..., Any], *given: Any) -> Any:
    calls.append(number)
    return step(*given)


def check_copies(family: str, name: str, options: dict[str, Any]) -> None:
    """`deepcopy` and `pickle` give models of their own, that compute the same and can be unpatched."""
    model = patched(family, name, options)
    expected = model(**batch_for(family)).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch_for(family)).logits, expected)
        assert type(other).__qualname__ == type(model).__qualname__
        unpatch(other)
    assert torch.equal(model(**batch_for(family)).logits, expected), "unpatching a copy changed the model"


def check_half_precision(family: str, name: str, options: dict[str, Any]) -> None:
    """bfloat16 and float16 weights, and float32 weights under autocast."""
    for dtype in (torch.bfloat16, torch.float16):
        half = patch(tiny_host(family, head_for(family), dtype=dtype), name, init="paper", verify=False, **options)
        assert {p.dtype for p in half.parameters()} == {dtype}
        assert half(**batch_for(family)).logits.isfinite().all()
    mixed = patched(family, name, options, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mixed(**batch_for(family, labels=True), use_cache=False).loss
    loss.backward()
    assert loss.isfinite()


def check_round_trip(family: str, name: str, options: dict[str, Any], init: str = "paper") -> None:
    """Saved and loaded, by its own head and as a base model: the same weights, flags and outputs, to the bit."""
    attention = attentions(family)[-1]  # what loading chooses
    model = patched(family, name, options, init=init, attention=attention, layers=3)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        pairs: list[tuple[Any, Any]] = [(from_pretrained(directory, head_for(family)), model)]
        if model.base_model is not model:  # T5's head holds its stacks itself
            pairs.append((from_pretrained(directory, AutoModel), model.base_model))
    for found, expected in pairs:
        state: dict[str, Tensor] = expected.state_dict()
        assert found.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
        flags = [{path for path, p in m.named_parameters() if p.requires_grad} for m in (found, expected)]
        assert flags[0] == flags[1]
        # copies: sums of products may round otherwise where weights lie in memory as a file had them
        outputs = [copy.deepcopy(m).eval()(**batch_for(family, padded=True))[0] for m in (found, expected)]
        assert torch.equal(*outputs)


MECHANICS: dict[str, Callable[[str, str, dict[str, Any]], None]] = {
    "hidden_states": check_hidden_states,
    "checkpointing": check_checkpointing,
    "copies": check_copies,
    "half_precision": check_half_precision,
    "round_trip": check_round_trip,
}


def check_compile(family: str, name: str, options: dict[str, Any], backend: str = "aot_eager") -> None:
    """One graph, forward and backward, with the outputs and gradients of the model itself.

    In evaluation mode: what a scheme draws in training differs between the two ways.
    """
    torch._dynamo.reset()
    model = patched(family, name, options, dtype=torch.float32)
    other = copy.deepcopy(model)
    given = batch_for(family) | {"use_cache": False}
    run = torch.compile(lambda **kw: other(**kw).logits, fullgraph=True, backend=backend)
    expected, found = model(**given).logits, run(**given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for (path, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=path)


def check_export(family: str, name: str, options: dict[str, Any]) -> None:
    """`torch.export` gives a program with the model's output."""
    model = patched(family, name, options, AutoModel, dtype=torch.float32)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    given = batch_for(family, padded=True)
    with torch.no_grad():
        program = torch.export.export(Last(), (given["input_ids"], given["attention_mask"]))
        found = program.module()(given["input_ids"], given["attention_mask"])
        torch.testing.assert_close(found, model(**given).last_hidden_state, rtol=1e-4, atol=1e-5)


def check_generate(name: str, options: dict[str, Any]) -> None:
    """GPT-2 generates with a KV cache what it generates without."""
    model: Any = patched("gpt2", name, options, AutoModelForCausalLM)
    given = {"input_ids": batch()["input_ids"], "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, use_cache=True), model.generate(**given, use_cache=False))


def check_padding(name: str, options: dict[str, Any]) -> None:
    """A text has the same states alone as padded in a batch."""
    model: Any = patched("bert", name, options)
    given = batch(padded=True)
    alone = model.bert(given["input_ids"][1:, :-2]).last_hidden_state
    together = model.bert(**given).last_hidden_state[1:, :-2]
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
