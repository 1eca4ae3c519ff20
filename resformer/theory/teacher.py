"""A task for small networks: which of two classes a random network of one hidden layer puts Gaussian inputs into.

Letters: S seeds, N examples, B of a batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from resformer.diagnostics.population import Population
from resformer.diagnostics.small_nets import perceptrons

WIDTH, HIDDEN, HELD_OUT, BATCH = 32, 64, 1024, 128
CHANCE = 0.693  # ln 2, the loss of a constant guess: both classes have half of the examples


class Classifier(nn.Module):
    """(B D) -> (B): perceptrons joined by a scheme, and a linear readout."""

    def __init__(self, depth: int, scheme: str, **options: object):
        super().__init__()
        self.stack = perceptrons(depth, WIDTH, scheme, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(x))[..., 0]


class Examples:
    """Inputs (S N D) and labels (S N), 0 or 1, a teacher a seed; `size` of them to train on, and 1024 held out."""

    def __init__(self, seeds: Sequence[int], size: int):
        self.size = size
        drawn = [_draw(seed, size + HELD_OUT) for seed in seeds]
        self.inputs, self.labels = (torch.stack(parts) for parts in zip(*drawn, strict=True))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(S B D), (S B) of the training part, the same places for all seeds."""
        places = torch.randint(self.size, (BATCH,), generator=torch.Generator().manual_seed(step))
        return self.inputs[:, places], self.labels[:, places]

    def held_out(self) -> tuple[Tensor, Tensor]:
        return self.inputs[:, self.size :], self.labels[:, self.size :]


def train(
    build: Callable[[], nn.Module], examples: Examples, seeds: Sequence[int], steps: int, learning_rate: float
) -> tuple[Population, Tensor]:
    """A population of one seed each, and its training losses (steps S)."""

    def loss(nets: Population, step: int) -> Tensor:
        inputs, labels = examples.batch(step)
        return cross_entropy(nets(inputs), labels, reduction="none").mean(1)

    nets = Population(build, seeds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for schemes that draw in training
        return nets, nets.fit(loss, steps, learning_rate)


def _draw(seed: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, WIDTH, generator=generator)
    hidden = torch.tanh(inputs @ torch.randn(WIDTH, HIDDEN, generator=generator) / 3)
    scores = hidden @ torch.randn(HIDDEN, generator=generator)
    return inputs, (scores > scores.median()).float()
