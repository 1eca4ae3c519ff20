"""A population of small networks, one a seed, trained at once: what one costs, since small ones wait for the calls.

Letters: S seeds; a dot stands for the shape of one member's batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


class Population:
    """Networks of one build with weights of their own, as a function from (S .) to (S .).

    Each is built after torch's global generator was seeded with its seed, so that a member does not depend on the
    others; the generator is left as it was.
    """

    def __init__(self, build: Callable[[], nn.Module], seeds: Sequence[int]):
        self.members = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed)
                self.members.append(build())
        self.weights, self.buffers = stack_module_state(self.members)
        self.form = copy.deepcopy(self.members[0]).to("meta")

    def __call__(self, x: Tensor) -> Tensor:
        def one(weights: dict[str, Tensor], buffers: dict[str, Tensor], own: Tensor) -> Tensor:
            return functional_call(self.form, (weights, buffers), (own,))

        return vmap(one, randomness="different")(self.weights, self.buffers, x)

    def fit(
        self,
        loss: Callable[[Population, int], Tensor],
        steps: int,
        learning_rate: float,
        clip: float | None = None,
    ) -> Tensor:
        """(steps, S) training losses: Adam with a constant rate, on `loss(self, step)` of (S).

        No member feels another: the gradient of a sum is taken, and Adam acts on each number by itself.
        clip: the largest norm of a member's gradient.
        """
        weights = list(self.weights.values())
        optimizer = torch.optim.Adam(weights, lr=learning_rate)
        losses = []
        for step in range(steps):
            found = loss(self, step)
            optimizer.zero_grad()
            found.sum().backward()
            if clip is not None:
                _clip(weights, clip)
            optimizer.step()
            losses.append(found.detach())
        return torch.stack(losses)

    @torch.no_grad()
    def trained(self) -> list[nn.Module]:
        """The members as modules of their own, with the weights of now."""
        for number, member in enumerate(self.members):
            member.load_state_dict({name: value[number] for name, value in (self.weights | self.buffers).items()})
        return self.members


@torch.no_grad()
def _clip(weights: Sequence[Tensor], largest: float) -> None:
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factors = (largest / norms.clamp_min(1e-12)).clamp_max(1.0)
    for g in gradients:
        g.mul_(factors.view(-1, *[1] * (g.ndim - 1)))
