"""Packed samples of text as batches of a language model, and what could be told of them without context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from resformer.data.masking import EVALUATION, IGNORED, MASKED, REPLACED, mask_batch, predicted
from resformer.data.packing import Packed, order
from resformer.train.batches import divide
from resformer.train.loop import Part
from resformer.train.masked_head import pick

SHARE = 0.15  # of the tokens of a sample that are predicted
MOST = 4096  # samples whose tokens are counted
BATCH = 256  # samples at a time


@dataclass(frozen=True)
class Text:
    """Packed samples, and what becomes of them as a function of seed, epoch and number alone.

    Args:
        samples: those of `packed` that are meant.
        masked: whether tokens are hidden, for masked language modelling; else each is told from those before it.
        picks: whether labels are given with their positions, and for predicted tokens alone.
    """

    packed: Packed
    samples: range
    tokenizer: PreTrainedTokenizerBase
    masked: bool
    seed: int = 0
    picks: bool = False

    @cached_property
    def special(self) -> np.ndarray:
        """Ids that are never predicted nor put in."""
        return np.asarray(self.tokenizer.all_special_ids if self.masked else (), dtype=np.int64)

    def hidden(self, chosen: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids that the model is given and labels, (B T) both, of samples number `chosen` (B)."""
        numbers = np.asarray(self.samples)[chosen]
        ids = self.packed.batch(numbers)
        if not self.masked:
            return ids, ids
        return mask_batch(
            ids,
            numbers,
            seed=0 if epoch == EVALUATION else self.seed,
            epoch=epoch,
            vocab_size=len(self.tokenizer),
            mask_id=self.tokenizer.mask_token_id,
            special=self.special,
            share=SHARE,
        )

    def batch(self, chosen: np.ndarray, epoch: int) -> dict[str, Tensor]:
        """Samples number `chosen` (B) as "input_ids" (B T) and "labels"."""
        inputs, labels = self.hidden(chosen, epoch)
        if (labels == IGNORED).all():  # the mean over nothing is no number; such a part has a share of 0
            labels[0, 0] = inputs[0, 0]
        given = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
        return pick(given) if self.picks else given

    def counts(self, chosen: np.ndarray) -> np.ndarray:
        """Predicted tokens of each sample, (B)."""
        if not self.masked:
            return np.full(len(chosen), self.packed.length - 1)
        return predicted(self.packed.batch(np.asarray(self.samples)[chosen]), self.special, SHARE)

    def parts(self, chosen: np.ndarray, epoch: int, rank: int, processes: int, size: int | None) -> list[Part]:
        """Process `rank`'s parts of a batch, each of at most `size` samples, with its share of the predicted tokens."""
        counts = self.counts(chosen)
        total = max(1, counts.sum())
        return [
            (self.batch(chosen[places], epoch), float(counts[places].sum() / total) if share else 0.0)
            for places, share in divide(np.arange(len(chosen)), rank, processes, size)
        ]

    def batches(self, size: int, micro: int | None, begin: int, rank: int, processes: int) -> Iterator[list[Part]]:
        """This process's parts of the batches of `size` samples from step `begin` on; the last samples of an epoch,
        that fill no batch, are left out."""
        steps = len(self.samples) // size
        for epoch in count(begin // steps):
            row = order(len(self.samples), self.seed, epoch)
            for step in range(begin % steps, steps):
                yield self.parts(row[step * size : (step + 1) * size], epoch, rank, processes, micro)
            begin = 0


def frequencies(text: Text) -> np.ndarray:
    """How often each token that can be predicted comes, (vocabulary,), each seen once more than it is; of samples
    spread over the text."""
    counted = np.zeros(len(text.tokenizer), dtype=np.int64)
    for i in text.samples[:: max(1, len(text.samples) // MOST)]:
        counted += np.bincount(text.packed[i], minlength=len(counted))
    counted += 1
    counted[text.special] = 0
    return counted / counted.sum()


def unigram_loss(seen: np.ndarray, held: Text) -> float:
    """Nats a held-out token under frequencies (vocabulary,)."""
    counted = np.zeros(len(seen), dtype=np.int64)
    for i in held.samples[:: max(1, len(held.samples) // MOST)]:
        counted += np.bincount(held.packed[i], minlength=len(seen))
    here = (seen > 0) & (counted > 0)
    return float(-(counted[here] * np.log(seen[here])).sum() / counted[here].sum())


def context_free_loss(seen: np.ndarray, held: Text) -> float:
    """Nats a predicted token of the best guess from frequencies and from what stands in its own place: some predicted
    tokens are left as they are, so this is less than the unigram loss.

    With p the frequencies, V tokens that can be put in, shares k kept and r replaced: P(y) = p(y) at a mask, and
    P(y | i) = p(y) (k [i = y] + r / V) / (k p(i) + r / V) at the ordinary token i.
    """
    kept, random = 1 - MASKED - REPLACED, REPLACED / (seen > 0).sum()
    total, tokens = 0.0, 0
    for start in range(0, len(held.samples), BATCH):
        inputs, labels = held.hidden(np.arange(start, min(start + BATCH, len(held.samples))), EVALUATION)
        there = labels != IGNORED
        given, y = inputs[there], labels[there]
        guess = seen[y] * (kept * (given == y) + random) / (kept * seen[given] + random)
        guess = np.where(given == held.tokenizer.mask_token_id, seen[y], guess)
        total, tokens = total - float(np.log(guess).sum()), tokens + len(y)
    return total / max(1, tokens)
