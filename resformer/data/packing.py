"""Samples of full length out of the shards of a corpus, and their order in an epoch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resformer.data.shards import Shards


@dataclass(frozen=True)
class Packed:
    """Samples of exactly `length` tokens, one after another out of the shards; only the last, partial one is lost.

    Sample i is `[CLS] tokens[i (T-2) : (i+1) (T-2)] [SEP]` with `ends` = ids of the two, for masked language models,
    and `tokens[i T : (i+1) T]` without, for causal ones. Raises ValueError if there is no whole sample.
    """

    shards: Shards
    length: int  # T
    ends: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise ValueError(f"length={self.length!r} leaves no room for text; give more tokens a sample, such as 128")
        if len(self) < 1:
            raise ValueError(
                f"{self.shards.folder} holds {self.shards.tokens} tokens, less than one sample of {self.length}; "
                "give more text or shorter samples"
            )

    @property
    def inner(self) -> int:
        """Tokens of the corpus in a sample."""
        return self.length - (2 if self.ends else 0)

    def __len__(self) -> int:
        return self.shards.tokens // self.inner

    def __getitem__(self, i: int) -> np.ndarray:
        return self.batch([i])[0]

    def batch(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids of these samples, (B T), int64."""
        ids = np.empty((len(samples), self.length), dtype=np.int64)
        inside = ids[:, 1:-1] if self.ends else ids
        if self.ends:
            ids[:, 0], ids[:, -1] = self.ends
        for row, i in enumerate(samples):
            if not 0 <= i < len(self):
                raise IndexError(f"sample {i} of {len(self)}")
            inside[row] = self.shards.window(int(i) * self.inner, self.inner)
        return ids


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch `epoch` takes `n` samples: a permutation, (n,), that depends on nothing else."""
    return np.random.default_rng((seed, epoch)).permutation(n)
