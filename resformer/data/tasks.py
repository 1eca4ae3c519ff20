"""The tasks by name: columns, labels and metrics, as data. Importing this is cheap: the CLI lists it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Features

GLUE = "Wang et al. 2019, GLUE, arXiv:1804.07461"


@dataclass(frozen=True)
class Task:
    """A classification or regression task on single texts or pairs of texts."""

    name: str
    summary: str
    texts: tuple[str, ...]  # the text columns: one, or two for a pair
    labels: tuple[str, ...] | None  # class names in the order of the label ids; None: regression
    metrics: tuple[str, ...]  # the score of the task is their mean, as in official GLUE
    splits: tuple[str, ...] = ("validation",)  # evaluation splits
    builtin: bool = False  # generated here, needs no data
    reference: str = GLUE
    hard: tuple[str, ...] = ()  # the values of "difficulty" on which word counts fail (built-in tasks)
    also: tuple[str, ...] = ()  # metrics that are reported as well, outside the score

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column of the task's data, in order."""
        return (*self.texts, "label", *(("difficulty",) if self.builtin else ()))

    @property
    def tests(self) -> tuple[str, ...]:
        """The test splits, one for each evaluation split; GLUE gives their texts alone."""
        return () if self.builtin else tuple(split.replace("validation", "test") for split in self.splits)

    def features(self) -> "Features":
        """The types of `columns` for `datasets`: class labels carry their names, scores are float32."""
        from datasets import ClassLabel, Features, Value

        label = Value("float32") if self.labels is None else ClassLabel(names=list(self.labels))
        return Features({name: label if name == "label" else Value("string") for name in self.columns})


_ENTAILED = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_OWN = "grammar of this project"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "cola",
            "is the sentence acceptable English",
            ("sentence",),
            ("unacceptable", "acceptable"),
            ("matthews",),
            also=("accuracy",),
        ),
        Task("sst2", "sentiment of a film review", ("sentence",), ("negative", "positive"), ("accuracy",)),
        Task("mrpc", "paraphrase or not", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        Task("stsb", "similarity of two sentences, 0 to 5", _PAIR, None, ("pearson", "spearman")),
        Task(
            "qqp",
            "do two questions ask the same",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
        ),
        Task(
            "mnli",
            "inference over many genres",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", "does the sentence answer the question", ("question", "sentence"), _ENTAILED, ("accuracy",)),
        Task("rte", "textual entailment", _PAIR, _ENTAILED, ("accuracy",)),
        Task("wnli", "Winograd schemas as inference", _PAIR, _ENTAILED[::-1], ("accuracy",)),
        Task(
            "snli",
            "inference between captions of pictures",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            reference="Bowman et al. 2015, SNLI, arXiv:1508.05326",
        ),
        Task(
            "sentiment",
            "polarity of the main clause, under negation and concession (like SST-2)",
            ("sentence",),
            ("negative", "positive"),
            ("accuracy",),
            builtin=True,
            reference=_OWN,
            hard=("negated",),
        ),
        Task(
            "agreement",
            "does the verb agree with its subject across attractors (like CoLA)",
            ("sentence",),
            ("unacceptable", "acceptable"),
            ("accuracy",),
            builtin=True,
            reference=f"{_OWN}, after Linzen et al. 2016, arXiv:1611.01368",
            hard=("1 attractor", "2 attractors"),
        ),
        Task(
            "agreement_nested",
            "do all verbs agree in centre-embedded relative clauses (like CoLA, hard)",
            ("sentence",),
            ("unacceptable", "acceptable"),
            ("accuracy",),
            builtin=True,
            reference=f"{_OWN}, after Marvin and Linzen 2018, arXiv:1808.09031",
            hard=("1 relative", "2 relatives"),
        ),
        Task(
            "entailment",
            "every, some, no: does swapping a word for a broader or narrower one follow (like RTE)",
            _PAIR,
            _ENTAILED,
            ("accuracy",),
            builtin=True,
            reference=f"{_OWN}, after natural logic (MacCartney and Manning 2009)",
            hard=("negated",),
        ),
    )
}
