import numpy as np
import pytest

from resformer.data.masking import EVALUATION, IGNORED, mask_batch, mask_tokens

SPECIAL = np.array([0, 1, 2, 3, 4])
MASK, VOCAB = 4, 300
OPTIONS = {"vocab_size": VOCAB, "mask_id": MASK, "special": SPECIAL}
B, T = 512, 128


@pytest.fixture(scope="module")
def ids():
    ids = np.random.default_rng(0).integers(5, VOCAB, (B, T))
    ids[:, 0], ids[:, -1], ids[::3, 50] = 2, 3, 3
    return ids


def mix(z):
    z &= 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def reference(ids, *, seed, epoch, sample, vocab_size, mask_id, special, share):
    """BERT's rule, token by token, with SplitMix64 on whole numbers."""
    golden = 0x9E3779B97F4A7C15
    key = mix(sample + golden) ^ epoch % 2**64
    key = mix((mix(key + golden) ^ seed % 2**64) + golden)
    draws = {t: mix(key + golden * (t + 1)) for t, i in enumerate(ids) if i not in special}
    chosen = set(sorted(draws, key=draws.get)[: max(1, round(share * len(ids)))])
    ordinary = [i for i in range(vocab_size) if i not in special]
    inputs, labels = list(ids), [IGNORED] * len(ids)
    for t in chosen:
        labels[t] = ids[t]
        second = mix((key ^ (2**64 - 1)) + golden * (t + 1))
        fate = (second >> 11) / 2**53
        if fate < 0.8:
            inputs[t] = mask_id
        elif fate < 0.9:
            inputs[t] = ordinary[mix(second) % len(ordinary)]
    return inputs, labels


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**40, EVALUATION)])
@pytest.mark.parametrize("share", [0.15, 0.01, 1.0])
def test_reference_and_single_form(ids, seed, epoch, share):
    samples = np.array([0, 1, 17, 2**40, *range(100, 120)])
    options = OPTIONS | {"seed": seed, "epoch": epoch, "share": share}
    inputs, labels = mask_batch(ids[: len(samples)], samples, **options)
    assert inputs.dtype == labels.dtype == np.int64
    for row, sample in enumerate(map(int, samples)):
        single = mask_tokens(ids[row], sample=sample, **options)
        np.testing.assert_array_equal(single[0], inputs[row])
        np.testing.assert_array_equal(single[1], labels[row])
        slow = reference(ids[row].tolist(), sample=sample, **options)
        assert slow == (inputs[row].tolist(), labels[row].tolist())


def test_a_mask_is_of_seed_epoch_and_sample_alone(ids):
    """Whatever the order, the batch, the dtype on disk, or what was masked before."""
    samples = np.arange(B)
    before = ids.copy()
    inputs, labels = mask_batch(ids, samples, seed=1, epoch=2, **OPTIONS)
    np.testing.assert_array_equal(ids, before)
    back = np.random.default_rng(1).permutation(B)
    for part in np.array_split(back, 7):
        again = mask_batch(ids[part].astype(np.uint16), samples[part], seed=1, epoch=2, **OPTIONS)
        np.testing.assert_array_equal(again[0], inputs[part])
        np.testing.assert_array_equal(again[1], labels[part])


def within(count, n, p):
    """Whether a count is within five standard deviations of n p."""
    return abs(count - n * p) < 5 * np.sqrt(n * p * (1 - p))


def test_shares(ids):
    inputs, labels = mask_batch(ids, np.arange(B), seed=0, epoch=0, **OPTIONS)
    ordinary = ~np.isin(ids, SPECIAL)
    chosen = labels != IGNORED
    assert not (chosen & ~ordinary).any()
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(inputs[~chosen], ids[~chosen])
    assert (chosen.sum(axis=1) == round(0.15 * T)).all(), "as many in each sample"
    n = chosen.sum()
    masked, kept = (inputs == MASK) & chosen, (inputs == ids) & chosen
    random = chosen & ~masked & ~kept
    assert within(masked.sum(), n, 0.8)
    hit = 1 / (VOCAB - len(SPECIAL))  # a random token that is the token itself
    assert within(kept.sum(), n, 0.1 + 0.1 * hit)
    assert within(random.sum(), n, 0.1 - 0.1 * hit)
    assert not np.isin(inputs[random], SPECIAL).any()
    for place in range(1, T - 1):
        if place != 50:
            assert within(chosen[:, place].sum(), B, round(0.15 * T) / (T - 3)), place


def test_random_tokens_are_even_over_all_that_are_not_special():
    special = np.array([0, 7, 8, 19, 500])  # in the middle, at the end, and out of the vocabulary
    ids = np.full((400, 100), 5)
    inputs, _ = mask_batch(ids, np.arange(400), seed=0, epoch=0, vocab_size=20, mask_id=0, special=special, share=1.0)
    counts = np.bincount(inputs[(inputs != 0) & (inputs != 5)], minlength=20)
    assert not counts[[0, 7, 8, 19]].any()
    others = np.setdiff1d(np.arange(20), [0, 5, 7, 8, 19])
    assert all(within(counts[i], 40_000, 0.1 / 16) for i in others)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"epoch": EVALUATION}, {"seed": 1}, {"sample": 1}, {"place": 1}])
def test_draws_are_independent(ids, change):
    """Tokens chosen twice are as many as chance gives, across neighbouring epochs, seeds, samples and places."""
    plain = np.full((B, T), 9)

    def chosen(epoch=0, seed=0, sample=0, place=0):
        labels = mask_batch(plain, np.arange(B) + sample, seed=seed, epoch=epoch, **OPTIONS)[1]
        return np.roll(labels, place, axis=1) != IGNORED

    assert within((chosen() & chosen(**change)).sum(), B * T, 0.15**2)


def test_every_sample_has_a_loss(ids):
    labels = mask_batch(ids[:, :6], np.arange(B), seed=0, epoch=0, share=1e-6, **OPTIONS)[1]
    assert ((labels != IGNORED).sum(axis=1) == 1).all()
    bare = np.array([[2, 3, 3], [2, 9, 3]])
    inputs, labels = mask_batch(bare, np.arange(2), seed=0, epoch=0, **OPTIONS)
    assert labels.tolist() == [[IGNORED] * 3, [IGNORED, 9, IGNORED]], "special tokens alone have none"
    assert inputs[0].tolist() == [2, 3, 3]


def test_masks_stay_as_they_were():
    """A resumed run, or one compared with it, may have begun with an earlier version."""
    _, labels = mask_tokens(np.full(64, 9), sample=5, seed=42, epoch=1, **OPTIONS)
    assert np.flatnonzero(labels != IGNORED).tolist() == [3, 5, 7, 15, 19, 26, 45, 48, 49, 55]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.0}, "share is 0.0; the share of predicted tokens is above 0 and at most 1"),
        ({"share": 1.5}, "share is 1.5"),
        ({"vocab_size": 5}, "vocab_size=5 with 5 special tokens leaves none to predict"),
        ({"samples": np.arange(2)}, r"ids have shape \(3, 8\) and samples \(2,\)"),
        ({"ids": np.zeros(3, int)}, r"ids have shape \(3,\) and samples \(3,\)"),
    ],
)
def test_wrong_input(change, message):
    given = {"ids": np.full((3, 8), 9), "samples": np.arange(3), "seed": 0, "epoch": 0, **OPTIONS} | change
    with pytest.raises(ValueError, match=message):
        mask_batch(given.pop("ids"), given.pop("samples"), **given)
