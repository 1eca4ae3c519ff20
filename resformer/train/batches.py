"""Tokenised examples, grouped by length into batches whose order only the data and a seed decide."""

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from resformer.data.tasks import Task

CHUNK = 1000  # examples tokenised at a time
MEGABATCH = 50  # batches over which examples are sorted by length


@dataclass(frozen=True)
class Encoded:
    """A tokenised split: ragged columns, each one flat array, example i at `starts[i]:starts[i + 1]`."""

    columns: dict[str, np.ndarray]  # "input_ids", "attention_mask", ...: int32, (tokens of all examples,)
    starts: np.ndarray  # int64, (examples + 1,)
    labels: np.ndarray  # int64 classes or float32 targets, (examples,)
    padding: dict[str, int]  # what each column is padded with
    left: bool  # pad on the left
    truncated: int  # examples that were cut to the maximal length, as far as the tokenizer tells

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (examples,)."""
        return np.diff(self.starts)

    def collate(self, index: np.ndarray, multiple: int = 8) -> dict[str, Tensor]:
        """Examples `index` as tensors (B T) and "labels" (B); T is the longest, rounded up to `multiple`."""
        lengths = self.lengths[index]
        width = -(-int(lengths.max()) // multiple) * multiple
        batch = {name: np.full((len(index), width), self.padding[name]) for name in self.columns}
        for row, (start, length) in enumerate(zip(self.starts[index], lengths, strict=True)):
            where = slice(width - length, None) if self.left else slice(length)
            for name, flat in self.columns.items():
                batch[name][row, where] = flat[start : start + length]
        return {name: torch.from_numpy(rows) for name, rows in (batch | {"labels": self.labels[index]}).items()}


def encode(
    split: Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, *, max_length: int, inputs: Container[str]
) -> Encoded:
    """Tokenise every example of `split` once, pairs cut from the longer text first, to `max_length` tokens.

    `inputs` names the arguments of the model; other columns of the tokenizer are dropped.
    Raises `ValueError` for a label outside the task.
    """
    parts: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    truncated = 0
    for start in range(0, len(split), CHUNK):
        rows = split[start : start + CHUNK]
        tokens = tokenizer(
            *(rows[text] for text in task.texts), truncation="longest_first", max_length=max_length, verbose=False
        )
        truncated += sum(bool(encoding.overflowing) for encoding in tokens.encodings or ())
        lengths += map(len, tokens["input_ids"])
        for name in filter(inputs.__contains__, tokens):
            parts.setdefault(name, []).append(np.concatenate(tokens[name], dtype=np.int32, casting="unsafe"))
    return Encoded(
        columns={name: np.concatenate(arrays) for name, arrays in parts.items()},
        starts=np.cumsum([0, *lengths], dtype=np.int64),
        labels=_labels(split, task),
        padding={
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
            **{name: 0 for name in parts if name not in ("input_ids", "token_type_ids")},
        },
        left=tokenizer.padding_side == "left",
        truncated=truncated,
    )


def fingerprint(splits: dict[str, Encoded]) -> str:
    """SHA-256 of all that a model is shown of the splits: tokens and labels, in their order."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        arrays = {**split.columns, "starts": split.starts, "labels": split.labels}
        for kind, array in arrays.items():
            digest.update(f"{name} {kind} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _labels(split: Dataset, task: Task) -> np.ndarray:
    if task.labels is None:
        return np.asarray(split["label"][:], dtype=np.float32)
    labels = np.asarray(split["label"][:], dtype=np.int64)
    outside = labels[(labels < 0) | (labels >= len(task.labels))]
    if outside.size:
        raise ValueError(
            f"task {task.name!r} has labels 0 to {len(task.labels) - 1} ({', '.join(task.labels)}); "
            f"the data has {outside.size} others, such as {outside[0]}. -1 marks examples without a label"
        )
    return labels


def shuffled(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, each an array of example numbers; every example is in exactly one.

    Examples are shuffled, sorted by length within runs of at most 50 batches (and a quarter of the epoch,
    so that small data are mixed too), cut into batches, and the batches shuffled. One batch may be short.
    """
    rng = np.random.default_rng((seed, epoch))
    batches = -(-len(lengths) // batch_size)
    run = batch_size * min(MEGABATCH, max(1, batches // 4))
    order = rng.permutation(len(lengths))
    runs = (order[start : start + run] for start in range(0, len(order), run))
    cut = [batch for part in runs for batch in _cut(part[np.argsort(lengths[part], kind="stable")], batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]


def ordered(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches for evaluation, from the longest examples to the shortest: the first needs the most memory."""
    return _cut(np.argsort(-lengths, kind="stable"), batch_size)


def share(batch: np.ndarray, rank: int, processes: int) -> np.ndarray:
    """The part of a batch that process `rank` computes; all parts are of one size.

    A short batch that does not divide is filled up with examples of its own.
    """
    return np.resize(batch, -(-len(batch) // processes) * processes)[rank::processes]


def divide(batch: np.ndarray, rank: int, processes: int, size: int | None) -> list[tuple[np.ndarray, float]]:
    """Process `rank`'s parts of a batch, each of at most `size` examples, with the share of each in its mean.

    The parts are as many on every process. One without an example computes the batch's first, at a share of 0.
    """
    own = batch[rank::processes]
    most = -(-len(batch) // processes)
    parts = np.array_split(own, -(-most // (size or most)))
    return [(part, len(part) / len(batch)) if len(part) else (batch[:1], 0.0) for part in parts]


def training_batches(
    encoded: Encoded,
    batch_size: int,
    *,
    seed: int,
    begin: int = 0,
    rank: int = 0,
    processes: int = 1,
    size: int | None = None,
    multiple: int = 8,
) -> Iterator[list[tuple[dict[str, Tensor], float]]]:
    """This process's parts of the training batches from step `begin` on, epoch after epoch without end.

    `batch_size` counts examples over all processes, and `size` those of one part, so that neither the number of
    processes nor the memory of each changes what is learned. Each part comes with its share in the mean of the batch.
    """
    steps = -(-len(encoded) // batch_size)
    for epoch in count(begin // steps):
        for batch in shuffled(encoded.lengths, batch_size, seed=seed, epoch=epoch)[begin % steps :]:
            yield [(encoded.collate(i, multiple), part) for i, part in divide(batch, rank, processes, size)]
        begin = 0


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]
