"""Tokenizers of one's own texts, for nets trained from scratch: of words, WordPiece, and byte-level BPE."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from resformer.data.corpus import Corpus
from resformer.errors import unknown

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4
CAUSAL = ("<|padding|>", "<|endoftext|>")  # of decoders; their ids are 0 and 1
NAMES = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
ALL = 2**31  # more words than any text has
LETTERS = 1000  # characters that WordPiece knows at most, as BERT's
SAMPLE = 1000  # documents on which a new tokenizer is measured


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int | None = None, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """Lower-cased words and single punctuation marks, by falling frequency, ties in alphabetical order.

    vocab_size   entries at most, the 5 special tokens included; None: every word gets one
    max_length   tokens to which `truncation=True` cuts

    Pairs are `[CLS] a [SEP] b [SEP]` with token_type_ids 0 and 1. Raises ValueError for a vocab_size without room
    for a word, and for texts without one.
    """
    if vocab_size is not None and vocab_size <= len(SPECIAL):
        raise ValueError(f"vocab_size={vocab_size!r}; it counts the {len(SPECIAL)} special tokens, so give more")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size or ALL, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == len(SPECIAL):
        raise ValueError("the texts hold no word; give at least one text that is not empty")
    _frame(tokenizer)
    return _wrapped(tokenizer, max_length, segments=True)


def train_subwords(
    texts: Iterable[str],
    kind: str = "wordpiece",
    *,
    vocab_size: int = 8192,
    lowercase: bool | None = None,
    causal: bool = False,
    max_length: int = 512,
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer as BERT's, or a byte-level BPE as those of ModernBERT or, if `causal`, of GPT-2.

    texts       read twice for WordPiece, so an iterable that can be begun again, such as a list or a `Corpus`
    kind        wordpiece: words are split at punctuation, pieces within a word begin with `##`;
                bpe: no text has an unknown token, and every text comes back as it was, but for Unicode's NFC
    vocab_size  entries at most, special tokens included; there are fewer where the texts have no more pieces that
                occur twice. Multiples of 64 suit accelerators
    lowercase   fold case and, for WordPiece, drop accents; None: yes for wordpiece, no for bpe
    causal      for decoders: `<|endoftext|>` after each text, also in pairs, and no [CLS], [SEP] or [MASK]
    max_length  tokens to which `truncation=True` cuts

    Otherwise pairs are `[CLS] a [SEP] b [SEP]`, with token_type_ids 0 and 1 for WordPiece. The same texts in any
    order give the same tokenizer. Raises ValueError for an unknown kind, for causal WordPiece, for a vocab_size
    without room for pieces, and for texts without a word.
    """
    if kind not in ("wordpiece", "bpe"):
        raise unknown("kind of tokenizer", kind, ("wordpiece", "bpe"))
    if causal and kind != "bpe":
        raise ValueError(f"kind={kind!r} is for encoders; decoders (causal) need kind='bpe'")
    special = CAUSAL if causal else SPECIAL
    least = len(special) + (256 if kind == "bpe" else 64)
    if vocab_size <= least:
        raise ValueError(
            f"vocab_size={vocab_size!r} is too small: {kind} needs more than {least}, special tokens included, "
            "such as 8192"
        )
    if kind == "wordpiece":
        return _wrapped(_wordpiece(texts, vocab_size, lowercase in (None, True)), max_length, segments=True)
    return _wrapped(_bpe(texts, vocab_size, bool(lowercase), special), max_length, segments=False)


def write_tokenizer(
    corpus: Corpus,
    folder: str | Path,
    kind: str = "wordpiece",
    *,
    vocab_size: int = 8192,
    lowercase: bool | None = None,
    causal: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PreTrainedTokenizerFast:
    """Train on a corpus as `train_subwords` does, and save in `folder`, which must be new or empty.

    progress   called with the number of documents read so far; WordPiece reads them twice
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new or empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"folder {folder} is not empty; give a new or empty one")
    texts = corpus if progress is None else _Watched(corpus, progress)
    tokenizer = train_subwords(texts, kind, vocab_size=vocab_size, lowercase=lowercase, causal=causal)
    tokenizer.save_pretrained(folder)
    return tokenizer


def measure(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], documents: int = SAMPLE) -> dict[str, float]:
    """Over the first `documents` texts, of each at most 10,000 characters: "tokens_per_word" (words by white space)
    and "unknown", the share of tokens that are."""
    sample = [text[:10_000] for text in islice(texts, documents)]
    ids = [i for text in tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"] for i in text]
    words = sum(len(text.split()) for text in sample)
    return {
        "tokens_per_word": len(ids) / max(1, words),
        "unknown": ids.count(tokenizer.unk_token_id) / max(1, len(ids)),
    }


@dataclass(frozen=True)
class _Watched:
    """Texts that tell how many of them were read."""

    texts: Iterable[str]
    progress: Callable[[int], None]

    def __iter__(self) -> Iterator[str]:
        for number, text in enumerate(self.texts, 1):
            yield text
            if number % 1000 == 0:
                self.progress(number)


def _wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    if isinstance(texts, Iterator):
        raise ValueError("WordPiece reads the texts twice; give a list or a corpus, not a generator")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers the `##` characters in the order of a hash table, which differs from process to process,
    # and breaks ties by these numbers. So they are given to it, in a fixed order, as if they were special tokens.
    letters = _letters(texts, tokenizer, min(LETTERS, vocab_size // 4))
    inner = [f"##{letter}" for letter in letters if _continues(letter, tokenizer)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL, *inner],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = Tokenizer(models.WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))  # without these special tokens
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.decoder = decoders.WordPiece(prefix="##")
    trained.add_special_tokens(list(SPECIAL))
    _frame(trained)
    return trained


def _letters(texts: Iterable[str], tokenizer: Tokenizer, limit: int) -> list[str]:
    """The most frequent characters of the normalised texts, in the order of their code points."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    normal: Counter[str] = Counter()
    for letter, count in counts.items():
        for part in tokenizer.normalizer.normalize_str(letter):
            if not part.isspace():
                normal[part] += count
    if not normal:
        raise ValueError("the texts hold no word; give at least one text that is not empty")
    return sorted(sorted(normal, key=lambda letter: (-normal[letter], letter))[:limit])


def _continues(letter: str, tokenizer: Tokenizer) -> bool:
    """Whether a character can stand within a word: punctuation and ideographs are words of their own."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(f"a{letter}"))) == 1


def _bpe(texts: Iterable[str], vocab_size: int, lowercase: bool, special: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    cases = [normalizers.Lowercase()] if lowercase else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *cases])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[
            # as in RoBERTa: a mask takes the space before it
            AddedToken(token, lstrip=token == "[MASK]", special=True, normalized=False)
            for token in special
        ],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == len(special) + len(alphabet):
        raise ValueError("the texts hold no word twice; give more text")
    if special == CAUSAL:
        end = CAUSAL[1]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, special.index(end))]
        )
    else:
        _frame(tokenizer)
    return tokenizer


def _frame(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")],
    )


def _wrapped(tokenizer: Tokenizer, max_length: int, *, segments: bool) -> PreTrainedTokenizerFast:
    causal = tokenizer.token_to_id("[CLS]") is None
    names = {"pad_token": CAUSAL[0], "eos_token": CAUSAL[1], "bos_token": CAUSAL[1]} if causal else NAMES
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        # else token_type_ids are dropped, and a pair loses which sentence is which
        model_input_names=["input_ids", *["token_type_ids"] * segments, "attention_mask"],
        **names,
    )
