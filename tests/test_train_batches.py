"""Encoding, grouping by length, and the order of examples."""

import numpy as np
import pytest
import torch
from training_fakes import PAIR, SCORE, TASK, tiny_bert, tiny_data, tiny_tokenizer

from resformer.train.batches import divide, encode, ordered, share, shuffled, training_batches

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


def encoded(task=TASK, max_length=64, **changes):
    tokenizer = tiny_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return encode(tiny_data(task)["train"], tokenizer, task, max_length=max_length, inputs=INPUTS)


def lengths(count=1000, seed=0):
    return np.random.default_rng(seed).integers(3, 90, count)


@pytest.mark.parametrize("count", [1, 7, 64, 1000, 1003])
def test_an_epoch_has_every_example_once(count):
    batches = shuffled(lengths(count), 8, seed=0, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(count))
    assert sum(len(batch) != 8 for batch in batches) == (count % 8 > 0)


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return np.concatenate(shuffled(lengths(), 8, seed=seed, epoch=epoch)).tolist()

    first = order(3, 2)
    torch.rand(10)
    np.random.rand(10)
    assert order(3, 2) == first
    assert order(3, 3) != first
    assert order(4, 2) != first


def test_batches_hold_similar_lengths_in_random_order():
    sizes = lengths(4000)
    batches = shuffled(sizes, 16, seed=0, epoch=0)
    padded = sum(sizes[batch].max() * len(batch) for batch in batches)
    assert sizes.sum() / padded > 0.9  # unsorted: about 0.5
    means = np.array([sizes[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_small_data_are_not_cut_into_the_same_batches_each_epoch():
    sizes = np.arange(64)
    epochs = [{frozenset(batch.tolist()) for batch in shuffled(sizes, 8, seed=0, epoch=i)} for i in range(2)]
    assert not epochs[0] & epochs[1]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_each_batch_in_equal_parts(processes):
    for batch in shuffled(lengths(100), 12, seed=0, epoch=0):
        parts = [share(batch, rank, processes) for rank in range(processes)]
        assert len({len(part) for part in parts}) == 1
        assert set(np.concatenate(parts)) == set(batch)
    assert len(share(np.array([5]), 2, 3)) == 1


@pytest.mark.parametrize("size", [None, 1, 4])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_divided_batch_is_whole_and_its_shares_add_up(processes, size):
    for count in (12, 7, 2, 1):
        batch = np.arange(100, 100 + count)
        divided = [divide(batch, rank, processes, size) for rank in range(processes)]
        assert len({len(parts) for parts in divided}) == 1, "as many parts on every process"
        parts = [part for parts in divided for part in parts]
        assert sum(share for _, share in parts) == pytest.approx(1.0)
        assert sorted(i for part, share in parts if share for i in part) == batch.tolist()
        assert all(0 < len(part) <= (size or count) for part, _ in parts)
        assert all(share == pytest.approx(len(part) / count) for part, share in parts if share)


def test_batches_go_on_from_any_step():
    whole = encoded()
    batches = training_batches(whole, 24, seed=1)  # 3 to an epoch
    steps = [next(batches)[0][0] for _ in range(10)]
    for begin in (0, 1, 3, 7):
        later = training_batches(whole, 24, seed=1, begin=begin)
        for step in steps[begin:]:
            assert torch.equal(next(later)[0][0]["input_ids"], step["input_ids"])


def test_evaluation_starts_with_the_longest_examples():
    sizes = lengths(50)
    batches = ordered(sizes, 8)
    assert sorted(np.concatenate(batches)) == list(range(50))
    assert sizes[batches[0][0]] == sizes.max()
    assert sizes[batches[-1][-1]] == sizes.min()


@pytest.mark.parametrize("task", [TASK, PAIR])
@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_is_what_the_tokenizer_pads(task, side):
    tokenizer, split = tiny_tokenizer(), tiny_data(task)["train"]
    tokenizer.padding_side, tokenizer.model_input_names = side, ["input_ids", "token_type_ids", "attention_mask"]
    index = np.array([5, 0, 40])
    whole = encode(split, tokenizer, task, max_length=16, inputs=INPUTS)
    texts = [[split[int(i)][name] for i in index] for name in task.texts]
    wanted = tokenizer(
        *texts, truncation="longest_first", max_length=16, padding=True, pad_to_multiple_of=8, return_tensors="pt"
    )
    batch = whole.collate(index)
    assert batch.pop("labels").tolist() == [split[int(i)]["label"] for i in index]
    assert set(batch) == set(wanted)
    for name, tensor in batch.items():
        torch.testing.assert_close(tensor, wanted[name])


def test_long_inputs_are_cut_and_counted():
    whole, cut = encoded(), encoded(max_length=8)
    assert whole.truncated == 0
    assert cut.truncated == (whole.lengths > 8).sum() > 0
    assert cut.lengths.max() == 8
    assert (cut.columns["input_ids"][cut.starts[1:] - 1] == 3).all()  # [SEP] stays


def test_columns_that_the_model_does_not_take_are_dropped():
    split = encode(tiny_data()["train"], tiny_tokenizer(), TASK, max_length=64, inputs=("input_ids", "attention_mask"))
    assert set(split.columns) == {"input_ids", "attention_mask"}


def test_regression_labels_are_floats():
    labels = encoded(SCORE).collate(np.arange(4))["labels"]
    assert labels.dtype == torch.float32


def test_a_label_outside_the_task_is_named():
    split = tiny_data()["train"].map(lambda row: row | {"label": -1})
    with pytest.raises(ValueError, match=r"labels 0 to 1 \(no, yes\).*such as -1"):
        encode(split, tiny_tokenizer(), TASK, max_length=64, inputs=INPUTS)


def test_the_order_is_independent_of_model_and_of_processes():
    def seen(processes, model=None):
        whole = encoded()
        streams = [training_batches(whole, 8, seed=1, rank=rank, processes=processes) for rank in range(processes)]
        batches = []
        for _ in range(20):
            parts = [batch["input_ids"] for stream in streams for batch, _ in next(stream)]
            if model is not None:
                model(input_ids=parts[0])  # dropout draws random numbers
            batches.append(sorted(tuple(row[row != 0].tolist()) for part in parts for row in part))
        return batches

    first = seen(1)
    assert seen(1, tiny_bert(dropout=0.5).train()) == first
    assert seen(1, tiny_bert(layers=4, dropout=0.5).train()) == first
    assert seen(2) == first
