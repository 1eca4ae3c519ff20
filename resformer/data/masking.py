"""Masked language modelling: which tokens are hidden, as a function of seed, epoch and sample and of nothing else.

B samples, T tokens. Every draw is a hash (SplitMix64, doi:10.1145/2660193.2660195) of where it is used, not the next
of a generator, so processes, order, batch size and resuming cannot change a mask.
"""

import numpy as np

EVALUATION = -1  # the epoch whose masks measure held-out loss: always the same
IGNORED = -100  # the label of a token that is not predicted
MASKED, REPLACED = 0.8, 0.1  # shares of the predicted tokens; the others stay as they are

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mask_batch(
    ids: np.ndarray,
    samples: np.ndarray,
    *,
    seed: int,
    epoch: int,
    vocab_size: int,
    mask_id: int,
    special: np.ndarray,
    share: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels (B T, int64) of the samples number `samples` (B) with token ids `ids` (B T).

    Of each sample round(share T) tokens are predicted, at least one, none that is special, and fewer where fewer are
    ordinary (`predicted`). Of these, 80 % become `mask_id`, 10 % a random token, never a special one, and 10 % stay,
    as in BERT (arXiv:1810.04805). Labels are the ids of the predicted tokens and -100 elsewhere.

    epoch    from 0; `EVALUATION` for the masks of evaluation
    special  ids that are never predicted nor put in, such as `tokenizer.all_special_ids`

    Raises ValueError for shapes that do not fit, a share outside (0, 1], a vocabulary of special tokens only.
    """
    ids, samples, special = np.asarray(ids), np.asarray(samples), np.unique(np.asarray(special))
    if ids.ndim != 2 or samples.shape != ids.shape[:1]:
        raise ValueError(f"ids have shape {ids.shape} and samples {samples.shape}; they must be (B, T) and (B,)")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share!r}; the share of predicted tokens is above 0 and at most 1, such as 0.15")
    special = special[special < vocab_size]
    if len(special) >= vocab_size:
        raise ValueError(f"vocab_size={vocab_size!r} with {len(special)} special tokens leaves none to predict")

    keys = samples.astype(np.uint64)[:, None]  # (B 1)
    for number in (epoch, seed):
        keys = _mix(keys + GOLDEN) ^ np.uint64(number % 2**64)
    keys = _mix(keys + GOLDEN)
    steps = GOLDEN * np.arange(1, ids.shape[1] + 1, dtype=np.uint64)  # (T)

    fixed = np.isin(ids, special)
    draw = _uniform(_mix(keys + steps))  # (B T)
    draw[fixed] = 2.0  # never chosen
    most = _most(ids, share)
    chosen = (draw <= np.partition(draw, most - 1, axis=1)[:, most - 1 : most]) & ~fixed

    rows, columns = np.nonzero(chosen)
    labels = np.full(ids.shape, IGNORED, dtype=np.int64)
    labels[rows, columns] = ids[rows, columns]
    inputs = ids.astype(np.int64)
    # Two further streams of the same keys: what becomes of a token, and by which it is replaced.
    second = _mix(~keys[rows, 0] + steps[columns])
    fate = _uniform(second)
    inputs[rows, columns] = np.where(fate < MASKED, mask_id, inputs[rows, columns])
    random = (fate >= MASKED) & (fate < MASKED + REPLACED)
    inputs[rows[random], columns[random]] = _ordinary(_mix(second[random]), vocab_size, special)
    return inputs, labels


def predicted(ids: np.ndarray, special: np.ndarray, share: float = 0.15) -> np.ndarray:
    """How many tokens of each of the samples `ids` (B T) `mask_batch` predicts, (B)."""
    return np.minimum(_most(ids, share), (~np.isin(ids, special)).sum(1))


def _most(ids: np.ndarray, share: float) -> int:
    return max(1, round(share * ids.shape[1]))


def mask_tokens(ids: np.ndarray, *, sample: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """`mask_batch` of one sample: `ids`, inputs and labels are (T)."""
    inputs, labels = mask_batch(np.asarray(ids)[None], np.array([sample]), **options)
    return inputs[0], labels[0]


def _mix(z: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64; uint64 wraps around."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Floats in [0, 1) of the upper 53 bits."""
    return (bits >> np.uint64(11)) * 2.0**-53


def _ordinary(bits: np.ndarray, vocab_size: int, special: np.ndarray) -> np.ndarray:
    """Ids drawn evenly from those that are not special."""
    ids = (bits % np.uint64(vocab_size - len(special))).astype(np.int64)
    for taken in special:  # in rising order: step over each
        ids += ids >= taken
    return ids
