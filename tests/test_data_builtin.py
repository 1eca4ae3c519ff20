import random
from itertools import pairwise

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from resformer.data import builtin
from resformer.data.builtin import GRAMMARS, generate
from resformer.data.tasks import TASKS

SEEDS = range(3)
# What a logistic regression on word counts may reach at most.
CEILING = {"sentiment": 0.60, "agreement": 0.56, "agreement_nested": 0.56, "entailment": 0.58}


@pytest.fixture(scope="module")
def generated():
    """Columns as lists, by task and seed, then by split."""
    return {
        (name, seed): {split: part.to_dict() for split, part in generate(name, seed=seed).items()}
        for name in GRAMMARS
        for seed in SEEDS
    }


def texts(name, split):
    return list(zip(*(split[column] for column in TASKS[name].texts), strict=True))


def correct(name, data):
    """Of each validation example, whether the regression on word counts gets it right."""
    counts = CountVectorizer(token_pattern=r"\S+")
    features = counts.fit_transform(" ".join(text) for text in texts(name, data["train"]))
    model = LogisticRegression(max_iter=1000).fit(features, data["train"]["label"])
    validation = counts.transform(" ".join(text) for text in texts(name, data["validation"]))
    return model.predict(validation) == np.array(data["validation"]["label"])


def test_every_grammar_has_a_ceiling():
    assert set(CEILING) == set(GRAMMARS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_word_counts_do_not_solve_it(name, seed, generated):
    right = correct(name, generated[name, seed])
    assert right.mean() <= CEILING[name]
    if name == "sentiment":
        negated = np.array(generated[name, seed]["validation"]["difficulty"]) == "negated"
        assert right[negated].mean() <= 0.25


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_splits_are_apart_and_balanced(name, seed, generated):
    data, task = generated[name, seed], TASKS[name]
    assert {split: len(part["label"]) for split, part in data.items()} == {"train": 8000, "validation": 1000}
    train, validation = texts(name, data["train"]), texts(name, data["validation"])
    assert len(set(validation)) == len(validation)
    assert not set(validation) & set(train)
    assert sum(data["train"]["label"]) == 4000
    hard = np.isin(data["validation"]["difficulty"], task.hard)
    labels = np.array(data["validation"]["label"])
    assert [labels[hard].sum(), (~hard).sum(), labels[~hard].sum()] == [250, 500, 250]
    # Shuffled: neither label nor difficulty can be told from the position.
    for part in (labels, hard, np.array(data["train"]["label"])):
        assert abs(part[: len(part) // 2].mean() - 0.5) < 0.07
    assert set(data["train"]["difficulty"]) == set(data["validation"]["difficulty"])
    assert set(task.hard) < set(data["train"]["difficulty"])
    assert list(data["train"]) == list(task.columns)


def test_the_seed_decides(generated):
    for name in GRAMMARS:
        again = generate(name, train=40, validation=20, seed=1)
        assert again["train"].to_dict() == generate(name, train=40, validation=20, seed=1)["train"].to_dict()
        assert texts(name, again["train"]) != texts(name, generate(name, train=40, validation=20)["train"])
    longer = generate("entailment", train=400, validation=20, seed=1)
    assert (
        longer["validation"].to_dict()
        == generate("entailment", train=40, validation=20, seed=1)["validation"].to_dict()
    )


def test_the_global_generator_is_left_alone():
    random.seed(1)
    state = random.getstate()
    generate("agreement", train=10, validation=10)
    assert random.getstate() == state


def test_odd_sizes_are_balanced_to_one():
    data = generate("sentiment", train=7, validation=5)
    assert sum(data["train"]["label"]) in (3, 4)
    assert sum(data["validation"]["label"]) in (2, 3)


def polarity(clause):
    positive = clause.split()[-1] in builtin.POSITIVE
    return positive != (" not " in clause)


def main_clause(sentence):
    """Read off the conjunctions, independently of how the sentence was made."""
    if " but " in sentence:
        return sentence.split(" but ")[1]
    if " , " in sentence:
        return sentence.split(" , ")[1]
    return sentence.split(" although ")[0]


def test_sentiment_is_that_of_the_main_clause(generated):
    train = generated["sentiment", 0]["train"]
    for sentence, label, difficulty in zip(train["sentence"], train["label"], train["difficulty"], strict=True):
        main = main_clause(sentence)
        assert label == polarity(main)
        assert difficulty == ("negated" if " not " in main else "plain" if main == sentence else "contrast")
    share = np.mean([" not " in main_clause(sentence) for sentence in train["sentence"]])
    assert 0.27 < share < 0.33


def is_plural(noun):
    return noun.endswith("s")


def test_agreement_is_with_the_first_noun(generated):
    train = generated["agreement", 0]["train"]
    for sentence, label, difficulty in zip(train["sentence"], train["label"], train["difficulty"], strict=True):
        words = sentence.split()
        nouns = [is_plural(after) for word, after in pairwise(words) if word == "the"]
        assert label == (is_plural(words[-2]) != nouns[0])
        assert difficulty.split()[0] == str(sum(noun != nouns[0] for noun in nouns))


def test_nested_verbs_close_in_reverse_order(generated):
    train = generated["agreement_nested", 0]["train"]
    for sentence, label, difficulty in zip(train["sentence"], train["label"], train["difficulty"], strict=True):
        words = sentence.split()
        nouns = [is_plural(after) for word, after in pairwise(words) if word == "the"]
        inner = [word for word in words if word.rstrip("s") in builtin.TRANSITIVE]
        verbs = [is_plural(verb) for verb in [*inner, words[-2]]]
        assert len(verbs) == len(nouns) == int(difficulty.split()[0]) + 1
        assert label == all(verb != noun for verb, noun in zip(verbs, reversed(nouns), strict=True))


def holds(sentence, world):
    """Whether the sentence is true in a world: a set of (noun, verb), one for each individual that acts."""
    negated = sentence.startswith("it is false that ")
    quantifier, _, noun, verb = sentence.removeprefix("it is false that ").split()[:4]
    nouns, verbs = builtin.KINDS.get(noun, [noun]), builtin.ACTIONS.get(verb, [verb])
    acts = [action in verbs for kind, action in world if kind in nouns]
    return {"every": all(acts), "some": any(acts), "no": not any(acts)}[quantifier] != negated


def test_entailment_is_truth_in_every_world(generated):
    train = {name: values[:400] for name, values in generated["entailment", 0]["train"].items()}
    kinds = [noun for nouns in builtin.KINDS.values() for noun in nouns]
    actions = [verb for verbs in builtin.ACTIONS.values() for verb in verbs]
    rng = random.Random(0)
    for first, second, label in zip(train["sentence1"], train["sentence2"], train["label"], strict=True):
        words = {word for text in (first, second) for word in text.split()}
        # Small worlds about the words at hand find every counter-example.
        near = [noun for noun in kinds if any(noun in builtin.KINDS.get(word, [word]) for word in words)]
        done = [verb for verb in actions if any(verb in builtin.ACTIONS.get(word, [word]) for word in words)]
        worlds = (
            [(rng.choice(near), rng.choice([*done, "sleeps"])) for _ in range(rng.randint(1, 4))] for _ in range(300)
        )
        refuted = any(holds(first, world) and not holds(second, world) for world in worlds)
        assert label == refuted, (first, second)


def test_pairs_differ_in_one_word(generated):
    for first, second in texts("entailment", generated["entailment", 1]["train"]):
        assert sum(a != b for a, b in zip(first.split(), second.split(), strict=True)) == 1


def test_a_wrong_name_and_a_wrong_size_are_refused():
    with pytest.raises(ValueError, match=r"unknown built-in task 'sentimant'.*sentiment"):
        generate("sentimant")
    with pytest.raises(ValueError, match="unknown built-in task 'rte'"):
        generate("rte")
    with pytest.raises(ValueError, match="validation=3: a split needs at least 4"):
        generate("sentiment", validation=3)


def test_more_than_the_grammar_can_write_is_refused(monkeypatch):
    monkeypatch.setattr(builtin, "PLACES", ["at home"])
    monkeypatch.setattr(builtin, "AGES", ["old"])
    monkeypatch.setattr(builtin, "TRIES", 3000)
    with pytest.raises(ValueError, match="'entailment' cannot write 7000 examples, only about"):
        generate("entailment", train=4, validation=7000)
