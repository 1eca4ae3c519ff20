"""Tiny models that are measured, and all of a model that a measurement must leave alone."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import resformer
from resformer.testing.hosts import batch_for, head_for, randomize, tiny_host

# post-LN, pre-LN, several streams, a history, values of attention carried along, side by side, a layer that is a vector
# field, shared layers, two stacks
SUBJECTS = (
    ("bert", None),
    ("gpt2", None),
    ("gpt2", "hyper_connections"),
    ("bert", "denseformer"),
    ("gpt2", "value_residual"),
    ("gpt_neox", None),
    ("gpt2", "ode"),
    ("albert", None),
    ("t5", "rezero"),
)


def subject(family: str, scheme: str | None = None, *, layers: int = 3, **options: Any) -> Any:
    """A tiny model in double precision with a head, and, if patched, with parameters as if trained."""
    model = tiny_host(family, head_for(family), layers=layers)
    if scheme is not None:
        randomize(resformer.patch(model, scheme, init="paper", **options), scale=0.3)
    return model


def given(family: str) -> dict[str, Tensor]:
    """Two texts, one of them padded, with labels for the head of the family."""
    inputs = batch_for(family, padded=True, labels=True)
    if head_for(family) is AutoModelForCausalLM:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What may not change: weights, classes, modes, hooks, flags, attributes, configuration, random state."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        "weights": {name: p.detach().clone() for name, p in model.state_dict(keep_vars=True).items()},
        "same": {name: id(p) for name, p in model.named_parameters()},
        "trained": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "classes": {name: type(module) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: [list(getattr(module, one)) for one in hooks] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "config": model.config.to_dict(),
        "random": torch.get_rng_state(),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found.pop("weights"), expected.pop("weights"), rtol=0, atol=0)
    assert torch.equal(found.pop("random"), expected.pop("random"))
    for name, value in expected.items():
        assert found[name] == value, name
