"""A word-level tokenizer of one's own texts, with BERT's special tokens, for nets trained from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # their ids are 0 to 4
ALL = 2**31  # more words than any text has


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
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        # else token_type_ids are dropped, and a pair loses which sentence is which
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{token[1:-1].lower()}_token": token for token in SPECIAL},
    )
