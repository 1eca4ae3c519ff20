"""A family under test: its hosts, what they are called with, and what is compared of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto import modeling_auto

from resformer.host import find_host
from resformer.hosts import Family
from resformer.patching import patch
from resformer.plan import choose_layers, make_plan
from resformer.testing.hosts import batch_for, randomize, tiny_config, tiny_host


class HostCannot(Exception):
    """There is nothing to keep: the host does not do this unpatched, or is refused the scheme."""


Batch = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A family, with what makes its hosts and what they are called with."""

    family: Family
    make: Callable[[], nn.Module] | None = None
    given: Batch | None = None

    @cached_property
    def _made(self) -> nn.Module:
        assert self.make is not None
        return self.make()

    def host(self, auto: Any = AutoModel, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
        """A fresh host in evaluation mode, always of the same weights; of a user's own nothing else can be chosen."""
        if self.make is None:
            return tiny_host(self.family.name, auto, dtype=dtype, **changes)
        return copy.deepcopy(self._made).to(dtype).eval()

    def batch(self, model: Any, *, padded: bool = True, **wanted: Any) -> dict[str, Any]:
        """What a host is called with, beside it what of `wanted` it knows."""
        if self.given is not None:
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            given = self.given()
            return {
                name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in given.items()
            }
        known = inspect.signature(model.forward).parameters
        given = {name: x for name, x in batch_for(self.family.name, padded=padded).items() if name in known}
        if "decoder_input_ids" in known:
            given["input_ids"][:, 2] = model.config.eos_token_id  # of which BART's classifier wants equally many
        if getattr(model.config, "use_cache", False):
            wanted = {"use_cache": False} | wanted
        return given | {name: value for name, value in wanted.items() if name in known or "kwargs" in known}

    def attentions(self) -> list[str]:
        """The implementations of attention that run on any machine and that the hosts have."""
        if self.make is not None:
            return ["own"]
        model: Any = AutoModel._model_mapping[type(self.config)]
        return ["eager", "sdpa"] if model._supports_sdpa else ["eager"]

    @property
    def config(self) -> Any:
        return tiny_config(self.family.name)

    def heads(self) -> list[str]:
        """The auto classes of transformers that give a host of this family a head."""
        if self.make is not None:
            return []
        named = {name: getattr(modeling_auto, name) for name in dir(modeling_auto) if name.startswith("AutoModelFor")}
        return [name for name, auto in named.items() if type(self.config) in getattr(auto, "_model_mapping", {})]

    def speaker(self, **changes: Any) -> Any:
        """A host that generates texts."""
        if self.make is None and self.family.stacks[-1].name == "decoder":
            auto = AutoModelForSeq2SeqLM if len(self.family.stacks) > 1 else AutoModelForCausalLM
            # T5 makes its cache for as many layers as the encoder has
            changes |= {name: 2 for name in ("num_decoder_layers", "decoder_layers") if hasattr(self.config, name)}
            if type(self.config) in auto._model_mapping:
                return self.host(auto, **changes)
        raise HostCannot("it is no language model of transformers")

    def patched(self, scheme: str, init: str = "paper", **changes: Any) -> Any:
        """A patched host, the scheme's parameters then moved as if trained."""
        host = self.host(**changes)
        if reason := refusal(host, scheme, init):
            raise HostCannot(reason)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what the paper draws
            patch(host, scheme, init=init, verify=False)
        randomize(host)
        return host


def refusal(host: nn.Module, scheme: str, init: str) -> str:
    """Why a scheme cannot be planned for a host, or nothing."""
    seen = find_host(host)
    try:
        make_plan(seen, scheme, init, None, choose_layers(seen, None), {})
    except ValueError as error:
        return str(error)
    return ""


def tensors(output: Any) -> dict[str, list[Tensor]]:
    """The tensors of an output, by what it calls them."""
    named = output if isinstance(output, Mapping) else {"output": output}
    return {name: [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for name, value in named.items()}


def first(output: Any) -> Tensor:
    """What a model computes: the first tensor of its output."""
    return next(leaf for leaves in tensors(output).values() for leaf in leaves if leaf.is_floating_point())


def loss_of(model: nn.Module, given: dict[str, Any], seed: int = 0) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return first(model(**given)).square().mean()


def state_of(model: Any) -> dict[str, Any]:
    """All that patching could change."""
    modules = list(model.modules())
    return {
        "the classes of modules": [type(module) for module in modules],
        "the keys of weights": list(model.state_dict()),
        "weights": [value.clone() for value in model.state_dict().values()],
        "what is trained": [p.requires_grad for p in model.parameters()],
        "the mode of modules": [module.training for module in modules],
        "the configuration": [module.config.to_dict() for module in modules if isinstance(module, PreTrainedModel)],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "the eps of norms": [module.eps for module in modules if hasattr(module, "eps")],
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    for what, value in before.items():
        if what == "weights":
            same = len(now[what]) == len(value) and all(map(torch.equal, now[what], value))
        else:
            same = now[what] == value
        assert same, f"{what} are not as they were"


@contextmanager
def measured_first() -> Iterator[None]:
    """Around what the unpatched host is asked to do: an error is its own."""
    try:
        yield
    except Exception as error:
        raise HostCannot(f"nor does the host: {type(error).__name__} {str(error).strip().splitlines()[:1]}") from error
