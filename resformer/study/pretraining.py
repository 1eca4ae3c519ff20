"""Encoders that a study pre-trains itself, one for each scheme and depth, before it fine-tunes them. Stdlib only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from resformer.study.condition import Condition
from resformer.study.identity import identity
from resformer.study.problems import Problems
from resformer.study.settings import Settings, number, whole

PRETRAINING = "pre-training"  # what stands for the task of an encoder's condition
OF_THE_MODEL = ("family", "width", "heads", "ffn_ratio", "dropout", "init", "precision")


@dataclass(frozen=True)
class Pretraining:
    """Masked language modelling, the same for all encoders of a study. Raises `Problems` for what cannot be."""

    corpus: tuple[str, ...]  # files, folders, patterns or hub:OWNER/NAME:CONFIG:SPLIT
    steps: int = 2000  # optimizer steps
    batch_size: int = 32  # samples a step
    length: int = 128  # tokens of a sample
    vocabulary: int = 8192  # entries at most of the WordPiece tokenizer, which is made of the corpus
    learning_rate: float = 1e-3  # at its peak
    warmup: float = 0.06  # share of the steps
    schedule: str = "linear"
    weight_decay: float = 0.01
    seeds: int = 1  # encoders of each scheme and depth; fine-tuning seed s starts from encoder s % seeds

    def __post_init__(self) -> None:
        problems = Problems()
        fine = not isinstance(self.corpus, str) and self.corpus and all(isinstance(one, str) for one in self.corpus)
        problems.unless(bool(fine), "corpus", self.corpus, "a list of at least one file, folder or pattern")
        for name in ("steps", "batch_size", "length", "vocabulary", "seeds"):
            problems.unless(whole(value := getattr(self, name)), name, value, "a whole number of at least 1")
        rate, decay, warmup = self.learning_rate, self.weight_decay, self.warmup
        problems.unless(number(rate) and rate > 0, "learning_rate", rate, "a finite number above 0")
        problems.unless(number(decay) and decay >= 0, "weight_decay", decay, "a finite number of at least 0")
        problems.unless(number(warmup) and 0 <= warmup < 1, "warmup", warmup, "a number of at least 0 and below 1")
        problems.stop()
        object.__setattr__(self, "corpus", tuple(self.corpus))


@dataclass(frozen=True)
class Encoder:
    """One pre-training run: everything that decides its outcome."""

    condition: Condition  # its task is `PRETRAINING`
    seed: int
    corpus_sha256: str | None
    pretraining: Pretraining
    settings: Settings = field(default_factory=Settings)  # of the study, for the model

    @property
    def config(self) -> dict[str, Any]:
        """All of it in one flat dict, as in config.json and result.json."""
        shape = {name: value for name, value in vars(self.condition).items() if name != "task"}
        own = {"seed": self.seed, "corpus_sha256": self.corpus_sha256}
        model = {name: getattr(self.settings, name) for name in OF_THE_MODEL}
        training = {name: value for name, value in asdict(self.pretraining).items() if name != "seeds"}
        training["corpus"] = list(self.pretraining.corpus)  # as JSON has it
        return {"objective": "mlm", **shape, **own, **model, **training}

    @property
    def id(self) -> str:
        """The name of the run's directory: see `identity`."""
        return identity(self.config)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Encoder:
        """From its `config`, whatever else is in it; `KeyError` where an entry is missing."""
        shape = {one.name: config[one.name] for one in fields(Condition) if one.name != "task"}
        given = {one.name: config[one.name] for one in fields(Pretraining) if one.name != "seeds"}
        settings = Settings(**{name: config[name] for name in OF_THE_MODEL})
        condition = Condition(**shape, task=PRETRAINING)
        return cls(condition, config["seed"], config["corpus_sha256"], Pretraining(**given), settings)

    @property
    def batch_size(self) -> int:
        """Samples a step."""
        return self.pretraining.batch_size

    def __str__(self) -> str:
        control = " + wider ffn" if self.condition.extra_ffn else ""
        return f"{self.condition.scheme}{control}, depth {self.condition.depth}, {PRETRAINING}, seed {self.seed}"
