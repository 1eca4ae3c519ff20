"""A tiny random BERT, a word tokenizer and tasks in memory, for the tests of training."""

import random

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from resformer.data.tasks import Task

torch.set_num_threads(1)

WORDS = ["good", "bad", "the", "film", "was", "very", "and", "plot"]
TASK = Task("toy", "does the text say good", ("sentence",), ("no", "yes"), ("accuracy",), builtin=True)
PAIR = Task("toy_pair", "same first word", ("left", "right"), ("no", "yes"), ("accuracy", "f1"))
SCORE = Task("toy_score", "share of good", ("sentence",), None, ("pearson", "spearman"))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def tiny_bert(*, num_labels: int = 2, layers: int = 2, seed: int = 0, dropout: float = 0.0, **changes: int):
    numbers = {"vocab_size": 12, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        **(numbers | {"max_position_embeddings": 64, "num_hidden_layers": layers} | changes),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=num_labels,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def tiny_data(task: Task = TASK, *, train: int = 64, validation: int = 40, seed: int = 0) -> DatasetDict:
    """Texts of 2 to 14 words of which the label can be told; "difficulty" for a built-in task."""
    rng = random.Random(seed)

    def sentence() -> list[str]:
        return rng.choices(WORDS[1:], k=rng.randint(2, 14))

    def example(i: int) -> dict[str, object]:
        words, label = sentence(), i % 2
        if len(task.texts) == 2:
            other = sentence()
            other[0] = words[0] if label else rng.choice([w for w in WORDS if w != words[0]])
            return {"left": " ".join(words), "right": " ".join(other), "label": label}
        if label:
            words[rng.randrange(len(words))] = "good"
        if task.labels is None:
            return {"sentence": " ".join(words), "label": words.count("good") / len(words)}
        return {"sentence": " ".join(words), "label": label, "difficulty": "long one" if len(words) > 8 else "short"}

    return DatasetDict(
        {
            name: Dataset.from_list([example(i) for i in range(size)])
            for name, size in {"train": train, **dict.fromkeys(task.splits, validation)}.items()
        }
    )
