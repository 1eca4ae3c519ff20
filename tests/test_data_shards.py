import json
import os
import threading
import unicodedata
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from resformer.data import shards
from resformer.data.corpus import read_corpus
from resformer.data.packing import Packed, order
from resformer.data.shards import fingerprint, open_shards, tokenize_corpus
from resformer.data.tokenizer import train_subwords, train_tokenizer

REAL = Path(os.environ.get("RESFORMER_DATA", Path(__file__).parents[2] / "shared" / "data")) / "corpora"
TEXTS = [f"the {word} sat on mat {i} and [SEP] said [MASK] no" for i, word in enumerate(["cat", "dog", "owl"] * 9)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_subwords(TEXTS, vocab_size=128)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[:5], "\u200b\x00", *TEXTS[5:]]))
    return path


def stream(tokenizer):
    """The tokens that the corpus should give."""
    ids = []
    for text in TEXTS:
        # special tokens written out in a text are text
        apart = text.replace("[", " [ ").replace("]", " ] ")
        ids += [*tokenizer(apart, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    return ids


@pytest.mark.parametrize("shard_tokens", [7, 100, 2**26])
def test_documents_follow_one_another(corpus, tmp_path, tokenizer, shard_tokens):
    tokenizer(["cut"], truncation=True, max_length=3, padding="max_length")  # which must not cut the corpus
    told = []
    made = tokenize_corpus(
        [corpus], tokenizer, tmp_path / "s", progress=lambda *so_far: told.append(so_far), shard_tokens=shard_tokens
    )
    right = stream(tokenizer)
    assert (made.tokens, made.documents, made.reused) == (len(right), len(TEXTS), False)  # one has no token
    assert told[-1] == (made.documents, made.tokens)
    assert made.index["dtype"] == "uint16"
    np.testing.assert_array_equal(made.window(0, made.tokens), right)
    sizes = [path.stat().st_size // 2 for path in sorted((tmp_path / "s").glob("tokens-*.bin"))]
    assert sizes == made.index["shards"] == [*[shard_tokens] * (len(right) // shard_tokens), len(right) % shard_tokens]
    for start in range(0, len(right), 5):
        for length in (0, 1, 6, 7, 8, 30):
            if start + length <= len(right):
                np.testing.assert_array_equal(made.window(start, length), right[start : start + length])
    for start, length in ((-1, 3), (0, len(right) + 1), (5, -2), (len(right), 1)):
        with pytest.raises(ValueError, match=f"{length} tokens from {start} on are not within the {len(right)}"):
            made.window(start, length)


def test_large_vocabularies_take_four_bytes(tmp_path):
    words = [f"w{i}" for i in range(2**16)]
    (tmp_path / "t.txt").write_text(" ".join(words))
    made = tokenize_corpus([tmp_path / "t.txt"], train_tokenizer([" ".join(words)]), tmp_path / "s")
    assert made.index["dtype"] == "uint32"
    assert len(np.unique(made.window(0, made.tokens))) == 2**16 + 1


def test_a_single_source_may_be_bare(corpus, tmp_path, tokenizer):
    made = tokenize_corpus(str(corpus), tokenizer, tmp_path / "s")
    assert made.index["sources"] == [str(corpus)]


def test_batches_change_nothing(corpus, tmp_path, tokenizer, monkeypatch):
    one = tokenize_corpus([corpus], tokenizer, tmp_path / "one")
    monkeypatch.setattr(shards, "BATCH", 60)
    many = tokenize_corpus([corpus], tokenizer, tmp_path / "many")
    assert (tmp_path / "one/tokens-00000.bin").read_bytes() == (tmp_path / "many/tokens-00000.bin").read_bytes()
    assert one.index == many.index


def test_decoders_end_documents_with_eos(tmp_path, corpus):
    tokenizer = train_subwords(TEXTS, "bpe", vocab_size=320, causal=True)
    made = tokenize_corpus([corpus], tokenizer, tmp_path / "s")
    ids = made.window(0, made.tokens)
    assert ids[-1] == tokenizer.eos_token_id == made.index["separator"]
    assert tokenizer.decode(ids).split(tokenizer.eos_token)[:5] == TEXTS[:5]


# --- reuse --------------------------------------------------------------------------------------------


def test_finished_shards_are_reused(corpus, tmp_path, tokenizer, monkeypatch):
    made = tokenize_corpus([corpus], tokenizer, tmp_path / "s")
    tokenizer.save_pretrained(tmp_path / "t")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    moved = corpus.rename(tmp_path / "moved.jsonl")
    monkeypatch.setattr(shards, "_write", None)
    monkeypatch.setattr(shards, "_locked", None)  # the folder need not be writable
    found = tokenize_corpus([moved], loaded, tmp_path / "s")
    assert found.reused
    assert found.index == made.index == open_shards(tmp_path / "s").index
    np.testing.assert_array_equal(found.window(3, 90), made.window(3, 90))


def test_another_corpus_or_tokenizer_is_refused(corpus, tmp_path, tokenizer):
    tokenize_corpus([corpus], tokenizer, tmp_path / "s")
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    other = train_tokenizer(TEXTS, vocab_size=12)
    with pytest.raises(ValueError, match="with another tokenizer; give another folder") as error:
        tokenize_corpus([corpus], other, tmp_path / "s")
    assert str(corpus) in str(error.value)
    assert f"tokenizer: there '{fingerprint(tokenizer)}', asked for '{fingerprint(other)}'" in str(error.value)
    corpus.write_text('{"text": "the cat"}\n')
    with pytest.raises(ValueError, match="with another corpus; give another folder"):
        tokenize_corpus([corpus], tokenizer, tmp_path / "s")
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before


def test_an_unfinished_folder_is_begun_anew(corpus, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "BATCH", 60)
    right = tokenize_corpus([corpus], tokenizer, tmp_path / "right", shard_tokens=20)

    def stop(documents, tokens):
        if tokens > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus([corpus], tokenizer, tmp_path / "s", shard_tokens=20, progress=stop)
    assert (tmp_path / "s/tokens-00001.bin").exists()
    (tmp_path / "s/tokens-00099.bin").write_bytes(b"old")
    (tmp_path / "s/.index.json.abc.tmp").write_text("{")
    with pytest.raises(ValueError, match="no shards, or unfinished ones"):
        open_shards(tmp_path / "s")
    made = tokenize_corpus([corpus], tokenizer, tmp_path / "s", shard_tokens=20)
    assert not made.reused
    assert made.index == right.index
    for path in (tmp_path / "right").iterdir():
        assert (tmp_path / "s" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "s").iterdir())) == len(list((tmp_path / "right").iterdir()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_and_leaves_nothing_finished(corpus, tmp_path, tokenizer, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(shards, "_name", lambda number: "/dev/full")
        with pytest.raises(OSError, match="No space left on device") as error:
            tokenize_corpus([corpus], tokenizer, tmp_path / "s")
        assert error.value.filename == "/dev/full"
    assert not (tmp_path / "s/index.json").exists()
    assert not tokenize_corpus([corpus], tokenizer, tmp_path / "s").reused


def test_of_several_at_once_one_does_the_work(corpus, tmp_path, tokenizer):
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(tokenize_corpus([corpus], tokenizer, tmp_path / "s")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.reused for one in made) == [False, True, True, True]
    for one in made:
        np.testing.assert_array_equal(one.window(0, one.tokens), stream(tokenizer))


# --- damage and wrong input ---------------------------------------------------------------------------


def test_damaged_shards_are_named(corpus, tmp_path, tokenizer):
    folder = tmp_path / "s"
    tokenize_corpus([corpus], tokenizer, folder, shard_tokens=50)
    whole = (folder / "tokens-00001.bin").read_bytes()
    (folder / "tokens-00001.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"tokens-00001.bin has 98 bytes, and should have 100; remove the folder"):
        open_shards(folder)
    (folder / "tokens-00001.bin").unlink()
    with pytest.raises(ValueError, match=r"tokens-00001.bin is missing; remove the folder and tokenise again"):
        tokenize_corpus([corpus], tokenizer, folder, shard_tokens=50)
    (folder / "tokens-00001.bin").write_bytes(whole)
    index = json.loads((folder / "index.json").read_text())
    for text in (
        "{",
        "[]",
        "{}",
        *(json.dumps(index | bad) for bad in ({"version": 0}, {"tokens": 3}, {"dtype": "x"})),
    ):
        (folder / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index.json is no index of shards .*; remove the folder"):
            open_shards(folder)
    with pytest.raises(ValueError, match=r"has no index\.json"):
        open_shards(tmp_path / "nowhere")


def test_wrong_input(corpus, tmp_path, tokenizer):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"full holds notes.txt, which is no shard; give a new or empty folder"):
        tokenize_corpus([corpus], tokenizer, tmp_path / "full")
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="is a file; give a folder"):
        tokenize_corpus([corpus], tokenizer, corpus)
    with pytest.raises(ValueError, match="shard_tokens must be at least 1, got 0"):
        tokenize_corpus([corpus], tokenizer, tmp_path / "s", shard_tokens=0)
    with pytest.raises(ValueError, match="matches nothing"):
        tokenize_corpus([tmp_path / "none*"], tokenizer, tmp_path / "s")
    bare = train_tokenizer(TEXTS)
    bare.sep_token = None
    with pytest.raises(ValueError, match="neither a sep nor an eos token"):
        tokenize_corpus([corpus], bare, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    corpus.write_text('{"text": "\u200b\\u0000"}\n')
    with pytest.raises(ValueError, match="finds no token in the corpus"):
        tokenize_corpus([corpus], train_subwords(TEXTS, vocab_size=128), tmp_path / "t")


# --- samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "ends"), [(10, (2, 3)), (10, None), (33, (2, 3)), (1, None)])
def test_samples_lose_nothing_but_the_last(corpus, tmp_path, tokenizer, length, ends):
    made = tokenize_corpus([corpus], tokenizer, tmp_path / "s", shard_tokens=50)
    samples = Packed(made, length, ends)
    batch = samples.batch(np.arange(len(samples)))
    assert batch.shape == (len(samples), length)
    assert batch.dtype == np.int64
    if ends:
        assert (batch[:, 0] == 2).all()
        assert (batch[:, -1] == 3).all()
    inside = (batch[:, 1:-1] if ends else batch).ravel()
    np.testing.assert_array_equal(inside, stream(tokenizer)[: len(inside)])
    assert made.tokens - len(inside) < length
    np.testing.assert_array_equal(samples[len(samples) - 1], batch[-1])
    np.testing.assert_array_equal(samples.batch([4, 0]), batch[[4, 0]])
    for i in (-1, len(samples)):
        with pytest.raises(IndexError, match=f"sample {i} of {len(samples)}"):
            samples[i]


def test_samples_that_cannot_be(corpus, tmp_path, tokenizer):
    made = tokenize_corpus([corpus], tokenizer, tmp_path / "s")
    for length, ends in ((2, (2, 3)), (0, None), (-5, None)):
        with pytest.raises(ValueError, match=f"length={length} leaves no room for text"):
            Packed(made, length, ends)
    with pytest.raises(ValueError, match=rf"holds {made.tokens} tokens, less than one sample of {made.tokens + 1}"):
        Packed(made, made.tokens + 1)
    assert len(Packed(made, made.tokens)) == 1


def test_order_is_of_seed_and_epoch():
    first = order(1000, 3, 0)
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    np.random.seed(1)  # the global generator has no part in it
    np.testing.assert_array_equal(order(1000, 3, 0), first)
    for other in (order(1000, 3, 1), order(1000, 4, 0)):
        assert (other == first).sum() < 20


# --- a real corpus ------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no corpora in {REAL.parent}; set RESFORMER_DATA")
def test_books(tmp_path):
    """Half a million words: their bytes come back, and a sample is of the length asked for."""
    texts = read_corpus([REAL / "books_validation.parquet"])
    tokenizer = train_subwords(islice(texts, 1000), "bpe", vocab_size=2048)
    made = tokenize_corpus([REAL / "books_validation.parquet"], tokenizer, tmp_path / "s")
    words = sum(len(text.split()) for text in texts)
    assert 1.2 < made.tokens / words < 2
    assert made.documents == sum(1 for _ in texts)
    back = tokenizer.decode(made.window(0, made.tokens)).split("[SEP]")[:-1]
    assert back == [unicodedata.normalize("NFC", text) for text in texts]
    assert Packed(made, 128, (2, 3))[7].shape == (128,)
