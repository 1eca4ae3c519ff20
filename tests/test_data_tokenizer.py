import pytest
from transformers import AutoTokenizer, BertConfig

from resformer.data.tokenizer import train_tokenizer

TEXTS = ["The dog's owner, the farmer", "a farmer, a DOG and a cat"]


def test_vocabulary_is_by_frequency_then_alphabet():
    tokenizer = train_tokenizer(TEXTS)
    ids = tokenizer.get_vocab()
    by_id = sorted(ids, key=ids.__getitem__)
    assert by_id[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert by_id[5:] == ["a", ",", "dog", "farmer", "the", "'", "and", "cat", "owner", "s"]
    assert train_tokenizer(TEXTS[::-1]).get_vocab() == ids
    assert tokenizer.pad_token_id == 0


def test_a_pair_has_segments():
    tokenizer = train_tokenizer(TEXTS)
    pair = tokenizer("The dog", "a zebra!")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == [
        *["[CLS]", "the", "dog", "[SEP]"],
        *["a", "[UNK]", "[UNK]", "[SEP]"],
    ]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    single = tokenizer(["a", "the dog and a cat"], padding=True)
    assert single["token_type_ids"] == [[0] * 7] * 2
    assert single["attention_mask"] == [[1] * 3 + [0] * 4, [1] * 7]
    assert single["input_ids"][0][3:] == [0] * 4


def test_vocabulary_and_length_are_limited():
    tokenizer = train_tokenizer(TEXTS, vocab_size=7, max_length=6)
    assert len(tokenizer) == 7
    assert set(tokenizer.get_vocab()) > {"a", ","}
    assert len(tokenizer("a " * 50, truncation=True)["input_ids"]) == 6


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_it_is_saved_and_loaded(tmp_path, beside_a_model):
    tokenizer = train_tokenizer(TEXTS, max_length=9)
    tokenizer.save_pretrained(tmp_path)
    if beside_a_model:
        BertConfig().save_pretrained(tmp_path)  # must not turn it into BERT's own tokenizer
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [("The Dog's cat?",), ("the dog", "A farmer")]:
        assert dict(loaded(*text)) == dict(tokenizer(*text))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.model_max_length, loaded.pad_token_id, loaded.mask_token) == (9, 0, "[MASK]")


def test_what_gives_no_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=5; it counts the 5 special tokens"):
        train_tokenizer(TEXTS, vocab_size=5)
    with pytest.raises(ValueError, match="the texts hold no word"):
        train_tokenizer(["", "  "])
