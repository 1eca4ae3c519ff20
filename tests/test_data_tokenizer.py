import json

import pytest
from transformers import AutoTokenizer, BertConfig, GPT2Config, ModernBertConfig, RobertaConfig

from resformer import cli
from resformer.data.tokenizer import measure, train_subwords, train_tokenizer

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


# --- WordPiece and BPE --------------------------------------------------------------------------------

WORDS = ["walking", "walked", "talks", "talked", "naïve", "Ærø", "日本", "jumping", "jumped", "mat's", "don't", "β-ray"]
CORPUS = [" ".join(WORDS[(i * j) % 12] for j in range(1, 12)) + f", {i}!" for i in range(300)]
KINDS = {
    "wordpiece": {"kind": "wordpiece", "vocab_size": 192},
    "cased": {"kind": "wordpiece", "vocab_size": 192, "lowercase": False},
    "bpe": {"kind": "bpe", "vocab_size": 320},
    "causal": {"kind": "bpe", "vocab_size": 320, "causal": True},
}
HARD = [
    ("Walked  to the 日本 mat's\n[MASK] Ærø?", "naïve NAÏVE"),
    ("unseen Ω words 🙂",),
    ("",),
    ("[SEP] <|endoftext|>",),
]


@pytest.fixture(scope="module")
def trained():
    return {name: train_subwords(CORPUS, **options) for name, options in KINDS.items()}


@pytest.mark.parametrize("config", [None, BertConfig, ModernBertConfig, GPT2Config, RobertaConfig])
@pytest.mark.parametrize("name", KINDS)
def test_subwords_are_saved_and_loaded_to_the_bit(trained, tmp_path, name, config):
    tokenizer = trained[name]
    tokenizer.save_pretrained(tmp_path)
    if config is not None:
        config().save_pretrained(tmp_path)  # must not turn it into the family's own tokenizer
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert (loaded.model_max_length, loaded.model_input_names) == (512, tokenizer.model_input_names)
    for texts in HARD:
        assert dict(loaded(*texts)) == dict(tokenizer(*texts))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_special_tokens_and_segments(trained):
    for name in ("wordpiece", "cased", "bpe"):
        tokenizer = trained[name]
        assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id] == [0, 1, 2]
        assert [tokenizer.sep_token_id, tokenizer.mask_token_id] == [3, 4]
        assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4], "no piece is special"
    pair = trained["wordpiece"]("walked", "Talked")
    assert trained["wordpiece"].convert_ids_to_tokens(pair["input_ids"]) == [
        *["[CLS]", "walked", "[SEP]", "talked", "[SEP]"]
    ]
    assert pair["token_type_ids"] == [0, 0, 0, 1, 1]
    pair = trained["bpe"]("walked to", "don't [MASK]")
    assert set(pair) == {"input_ids", "attention_mask"}
    assert trained["bpe"].decode(pair["input_ids"]) == "[CLS]walked to[SEP]don't[MASK][SEP]"
    causal = trained["causal"]
    assert causal.convert_ids_to_tokens([0, 1]) == ["<|padding|>", "<|endoftext|>"]
    assert [causal.pad_token_id, causal.eos_token_id, causal.mask_token_id] == [0, 1, None]
    assert causal.decode(causal("a b", "c")["input_ids"]) == "a b<|endoftext|>c<|endoftext|>"


def test_pieces(trained):
    tokens = trained["wordpiece"].tokenize("walkings")
    assert tokens[0].startswith("walk")
    assert all(token.startswith("##") for token in tokens[1:])
    assert trained["wordpiece"].tokenize("NAÏVE") == ["naive"]
    assert "##日" not in trained["wordpiece"].get_vocab(), "ideographs and punctuation do not go on within a word"
    assert "##!" not in trained["wordpiece"].get_vocab()
    assert trained["cased"].tokenize("naïve") == ["naïve"]
    assert "[UNK]" in trained["wordpiece"].tokenize("Ω")
    lower = train_subwords(CORPUS, "bpe", vocab_size=320, lowercase=True)
    for text in ("Walked  to 日本 🙂 \n[SEP", " naïve\tΩ"):
        for tokenizer, right in ((trained["bpe"], text), (trained["causal"], text), (lower, text.lower())):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == right


@pytest.mark.parametrize("name", KINDS)
def test_the_same_texts_give_the_same_tokenizer(trained, name):
    """In any order; the hash tables of the trainer are in another order each time."""
    again = train_subwords(CORPUS[::-1], **KINDS[name])
    assert again.backend_tokenizer.to_str() == trained[name].backend_tokenizer.to_str()


def test_size(trained):
    assert (len(trained["bpe"]), len(trained["causal"])) == (320, 320)
    syllables = [a + b + c for a in "bdgk" for b in "aeiou" for c in "lmnr"]
    assert len(train_subwords([one + two for one in syllables for two in syllables], vocab_size=128)) == 128
    assert len(train_subwords(CORPUS, vocab_size=8192)) < 300, "there are no more pieces"
    many = ["".join(chr(0x100 + (7 * i + j) % 2000) for j in range(5)) for i in range(4000)]
    assert len(train_subwords(many, vocab_size=128)) <= 128, "also where there are more letters than entries"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "unigram"}, "unknown kind of tokenizer 'unigram'.* Known: bpe, wordpiece"),
        ({"causal": True}, "kind='wordpiece' is for encoders; decoders .causal. need kind='bpe'"),
        ({"vocab_size": 0}, "vocab_size=0 is too small: wordpiece needs more than 69"),
        ({"kind": "bpe", "vocab_size": 261}, "vocab_size=261 is too small: bpe needs more than 261"),
        ({"texts": ["", " "]}, "the texts hold no word"),
        ({"texts": ["", " "], "kind": "bpe"}, "the texts hold no word twice"),
        ({"texts": iter(CORPUS)}, "reads the texts twice; give a list or a corpus, not a generator"),
    ],
)
def test_what_no_tokenizer_can_be_trained_with(options, message):
    with pytest.raises(ValueError, match=message):
        train_subwords(**{"texts": CORPUS} | options)


# --- the command --------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in CORPUS[:150]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in CORPUS[150:]))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    output = str(tmp_path / "out" / "tok")
    with pytest.raises(SystemExit) as stop:
        cli.main(["tokenizer", "--corpus", *files, "--output", output, "--column", "body", "--no-lowercase"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    loaded = AutoTokenizer.from_pretrained(output)
    right = train_subwords(CORPUS, lowercase=False)
    assert loaded.backend_tokenizer.to_str() == right.backend_tokenizer.to_str()
    figures = measure(right, CORPUS)
    assert f"of {len(right)} entries, since the corpus has no more for the 8192 asked for, written to {output}" in text
    assert f"{figures['tokens_per_word']:.2f} tokens a word, 0.00% of tokens unknown" in text


def test_measure():
    figures = measure(train_tokenizer(["a b c"]), ["a b", "x, b", "not looked at"], documents=2)
    assert figures == {"tokens_per_word": 5 / 4, "unknown": 2 / 5}


def test_command_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(CORPUS))
    for output, message in ((tmp_path, "is not empty; give a new or empty one"), (tmp_path / "a.txt", "is a file")):
        with pytest.raises(SystemExit) as stop:
            cli.main(["tokenizer", "--corpus", str(tmp_path / "a.txt"), "--output", str(output)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["tokenizer", "--corpus", str(tmp_path / "b*"), "--output", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert "matches nothing" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
