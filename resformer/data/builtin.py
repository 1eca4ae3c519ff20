"""Built-in tasks: seeded grammars that write English-like sentences in GLUE format.

Word counts do not solve them: each label depends on how words combine (polarity and negation, verb and
subject, quantifier and direction). In validation they say nothing at all, since half of it is made of the
examples on which they mislead; in the training split of `sentiment` they are a first foothold.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from resformer.data.tasks import TASKS
from resformer.errors import unknown

if TYPE_CHECKING:
    from datasets import DatasetDict


class Example(NamedTuple):
    texts: tuple[str, ...]
    label: int
    difficulty: str


# --- sentiment ----------------------------------------------------------------------------------------

REVIEWED = ["film", "plot", "cast", "script", "music", "ending", "dialogue", "pacing", "acting", "humour"]
# A filler stands between "not" and the adjective, so that no n-gram shows both.
FILLERS = ["in my view", "to my mind", "for me at least", "by most accounts", "on the whole", "as i see it"]
DEGREES = ["really", "very", "especially", "particularly", "truly"]
NEGATIVE = ["bad", "dull", "clumsy", "tedious", "bland", "silly", "weak", "cold"]
POSITIVE = ["good", "funny", "moving", "clever", "charming", "gripping", "fresh", "warm"]
CONTRASTS = ("{side} but {main}", "although {side} , {main}", "{main} although {side}", "while {side} , {main}")
NEGATED = 0.3  # an even share would make the label a pure XOR, on which training stalls for long


def sentiment(rng: Random) -> Example:
    """`the film is [not] FILLER very good`, alone or beside a concession; the main clause decides."""

    def clause(subject: str) -> tuple[str, bool, bool]:
        positive, negated = rng.random() < 0.5, rng.random() < NEGATED
        adjective = rng.choice(POSITIVE if positive else NEGATIVE)
        words = ["the", subject, "is", *["not"] * negated, rng.choice(FILLERS), rng.choice(DEGREES), adjective]
        return " ".join(words), positive != negated, negated

    subject, other = rng.sample(REVIEWED, 2)
    main, positive, negated = clause(subject)
    single = rng.random() < 3 / 7
    text = main if single else rng.choice(CONTRASTS).format(main=main, side=clause(other)[0])
    return Example((text,), int(positive), "negated" if negated else "plain" if single else "contrast")


# --- agreement ----------------------------------------------------------------------------------------
# Number is 0 (singular) or 1 (plural): nouns take the s in the plural, verbs in the singular.
# Few nouns and verbs, whose numbers have to be learned, and more of the rest, so that sentences differ.

NOUNS = ["farmer", "teacher", "doctor", "pilot", "artist", "baker", "singer", "driver", "dog", "horse"]
PREPOSITIONS = ["near", "behind", "beside", "above", "below", "with"]
ADVERBS = ["often", "never", "still", "rarely", "always", "usually", "sometimes", "seldom"]
INTRANSITIVE = ["sleep", "smile", "laugh", "wait", "sing", "listen"]
TRANSITIVE = ["see", "like", "follow", "help", "admire", "know"]
ENDINGS = ["here", "there", "outside", "alone", "again", "today"]


def _noun(rng: Random, plural: int) -> str:
    return "the " + rng.choice(NOUNS) + "s" * plural


def _verb(rng: Random, verbs: list[str], plural: int) -> str:
    return rng.choice(verbs) + "s" * (not plural)


def _main_verb(rng: Random, plural: int) -> str:
    return f"{rng.choice(ADVERBS)} {_verb(rng, INTRANSITIVE, plural)} {rng.choice(ENDINGS)}"


def agreement(rng: Random) -> Example:
    """`the N (PREP the N)^k often V here`, k of 0, 0, 1, 2; acceptable iff the verb has the first noun's number.

    An attractor is a noun in between whose number differs from the subject's.
    """
    numbers = [rng.getrandbits(1) for _ in range(1 + rng.choice((0, 0, 1, 2)))]
    verb = rng.getrandbits(1)
    subject = _noun(rng, numbers[0])
    for number in numbers[1:]:
        subject += f" {rng.choice(PREPOSITIONS)} {_noun(rng, number)}"
    attractors = sum(number != numbers[0] for number in numbers)
    difficulty = f"{attractors} attractor{'s' * (attractors != 1)}"
    return Example((f"{subject} {_main_verb(rng, verb)}",), int(verb == numbers[0]), difficulty)


def agreement_nested(rng: Random) -> Example:
    """`the N (that the N)^k V^k often V here`, k of 0 to 2: nouns open, their verbs close in reverse order.

    Acceptable iff every verb has the number of its own noun; else the numbers of the verbs are any others.
    """
    nouns, acceptable = [rng.getrandbits(1) for _ in range(1 + rng.randrange(3))], rng.getrandbits(1)
    verbs = nouns[::-1]
    while not acceptable and verbs == nouns[::-1]:
        verbs = [rng.getrandbits(1) for _ in verbs]
    words = [" that ".join(_noun(rng, number) for number in nouns)]
    words += [_verb(rng, TRANSITIVE, number) for number in verbs[:-1]]
    words += [_main_verb(rng, verbs[-1])]
    relatives = len(nouns) - 1
    return Example((" ".join(words),), acceptable, f"{relatives} relative{'s' * (relatives != 1)}")


# --- entailment ---------------------------------------------------------------------------------------

KINDS = {
    "animal": ["dog", "cat", "horse", "rabbit", "goat"],
    "musician": ["drummer", "pianist", "cellist", "violinist", "guitarist"],
    "athlete": ["boxer", "swimmer", "gymnast", "skier", "wrestler"],
    "scientist": ["chemist", "physicist", "biologist", "geologist", "astronomer"],
}
ACTIONS = {
    "moves": ["runs", "walks", "jumps", "crawls"],
    "speaks": ["whispers", "shouts", "mumbles", "lectures"],
    "works": ["cooks", "paints", "digs", "sews"],
}
AGES = ["old", "young", "tall", "small", "quiet", "hungry"]
PLACES = ["in the park", "by the river", "near the station", "on the farm", "at home", "in town"]
# +1: a broader word keeps the sentence true; -1: a narrower one does. First the noun, then the verb.
MONOTONE = {"every": (-1, +1), "some": (+1, +1), "no": (-1, -1)}


def entailment(rng: Random) -> Example:
    """`[it is false that] every/some/no old dog runs at home`, then the same with the noun or the verb made
    broader or narrower. Entailed iff the direction fits the quantifier; "it is false that" turns it round.
    """
    negated, quantifier = rng.random() < NEGATED, rng.choice(list(MONOTONE))
    swapped, direction = rng.randrange(2), rng.choice((-1, +1))
    broad = [rng.choice(list(KINDS)), rng.choice(list(ACTIONS))]
    narrow = [rng.choice(KINDS[broad[0]]), rng.choice(ACTIONS[broad[1]])]
    broader = [*narrow]
    broader[swapped] = broad[swapped]
    frame = "it is false that " * negated + f"{quantifier} {rng.choice(AGES)} {{}} {{}} {rng.choice(PLACES)}"
    pair = (narrow, broader) if direction > 0 else (broader, narrow)
    entailed = direction == MONOTONE[quantifier][swapped] * (-1 if negated else 1)
    texts = tuple(frame.format(*words) for words in pair)
    return Example(texts, int(not entailed), "negated" if negated else "plain")


# --- data sets ----------------------------------------------------------------------------------------

GRAMMARS: dict[str, Callable[[Random], Example]] = {
    "sentiment": sentiment,
    "agreement": agreement,
    "agreement_nested": agreement_nested,
    "entailment": entailment,
}
TRIES = 100_000  # rejected in a row before the grammar counts as exhausted


def generate(name: str, *, train: int = 8000, validation: int = 1000, seed: int = 0) -> "DatasetDict":
    """The built-in task `name`, the same for the same arguments.

    Labels are balanced. Half of validation is hard (`Task.hard`; train has the grammar's own share), with
    balanced labels in either half. Validation holds no text (pair) twice and shares none with train, which may
    repeat short ones. It does not depend on the size of train.

    Raises ValueError for a name that is not built in, sizes below 4 and more than the grammar can write.
    """
    from datasets import Dataset, DatasetDict

    if name not in GRAMMARS:
        raise unknown("built-in task", name, GRAMMARS)
    for split, size in {"train": train, "validation": validation}.items():
        if size < 4:
            raise ValueError(f"{split}={size!r}: a split needs at least 4 examples, hard and easy of each label")
    rng, task, grammar = Random(f"{name} {seed}"), TASKS[name], GRAMMARS[name]

    quotas = [(label, hard) for label in (0, 1) for hard in (False, True)]
    evaluated = draw(grammar, validation, rng, quotas, lambda e: (e.label, e.difficulty in task.hard), distinct=True)
    held_out = {example.texts for example in evaluated}
    trained = draw(grammar, train, rng, [0, 1], lambda e: e.label, exclude=held_out)

    def dataset(examples: list[Example]) -> Dataset:
        rows = ((*example.texts, example.label, example.difficulty) for example in examples)
        columns = dict(zip(task.columns, map(list, zip(*rows, strict=True)), strict=True))
        return Dataset.from_dict(columns, features=task.features())

    return DatasetDict({"train": dataset(trained), "validation": dataset(evaluated)})


def draw(
    grammar: Callable[[Random], Example],
    size: int,
    rng: Random,
    groups: Sequence[Hashable],
    group: Callable[[Example], Hashable],
    *,
    distinct: bool = False,
    exclude: Collection[tuple[str, ...]] = (),
) -> list[Example]:
    """`size` examples in random order, spread evenly over `groups`, none whose texts are in `exclude`."""
    wanted = {key: (size + i) // len(groups) for i, key in enumerate(groups)}
    seen, rejected = set(exclude), 0
    examples: list[Example] = []
    while len(examples) < size:
        example = grammar(rng)
        if not wanted[group(example)] or example.texts in seen:
            rejected += 1
            if rejected > TRIES:
                raise ValueError(
                    f"the grammar {grammar.__name__!r} cannot write {size} examples, "
                    f"only about {len(examples)}: ask for a smaller split"
                )
            continue
        rejected = 0
        wanted[group(example)] -= 1
        examples.append(example)
        if distinct:
            seen.add(example.texts)
    rng.shuffle(examples)  # else the tail is of one group only
    return examples
