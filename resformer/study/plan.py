"""What a study consists of: its conditions, the runs of each, and the order they are run in. Stdlib only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import lcm
from typing import Any

from resformer.spelling import parse_scheme, write_scheme
from resformer.study.condition import Condition
from resformer.study.identity import identity
from resformer.study.pretraining import PRETRAINING, Encoder, Pretraining
from resformer.study.problems import Problems
from resformer.study.settings import Settings, number, whole

WEIGHT_INITS = ("bert", "xavier", "width_scaled")
ENDPOINTS = ("score", "train_loss")
BASELINES = ("pre_ln", "post_ln", "identity")  # the first of these in a study is what others are compared with
STATIC = "static_mix"  # the control that mixes all layers by weights that mean nothing
TUNING_SEED = 1_000_000  # of the runs that choose a learning rate: none that is reported on
RATES, PRETRAINED_RATES = (3e-4, 1e-3, 3e-3), (3e-5, 1e-4, 3e-4)  # from fresh weights; of a checkpoint


@dataclass(frozen=True)
class Run:
    """One training run: everything that decides its outcome."""

    condition: Condition
    seed: int  # of weights, data order and dropout
    learning_rate: float | None  # at its peak; None: not chosen yet
    tuning: bool = False  # it trains without a slice of the training data and is scored on that
    rows_sha256: str | None = None  # of the task's rows
    model_sha256: str | None = None  # of the checkpoint's files
    encoder: str | None = None  # id of the `Encoder` that it starts from
    settings: Settings = field(default_factory=Settings)

    @property
    def config(self) -> dict[str, Any]:
        """All of it in one flat dict, as in config.json and result.json; what does not apply is left out."""
        own = {name: value for name, value in vars(self).items() if name not in ("condition", "settings")}
        config = asdict(self.condition) | own | self.settings.of(self.condition.task)
        if self.settings.model is not None:  # whose weights are not drawn
            del config["weight_init"]
        else:
            del config["model_sha256"]
        if self.encoder is None:
            del config["encoder"]
        return config

    @property
    def id(self) -> str:
        """The name of the run's directory: see `identity`."""
        return identity(self.config)

    @property
    def batch_size(self) -> int:
        """Examples a step."""
        return self.settings.batch_size

    def __str__(self) -> str:
        c, rate = self.condition, "not chosen" if self.learning_rate is None else f"{self.learning_rate:g}"
        seed = "tuning" if self.tuning else f"seed {self.seed}"
        return f"{arm(self.config)}, depth {c.depth}, {c.task}, {seed}, lr {rate}"


@dataclass(frozen=True)
class Facts:
    """What is looked up before a study is planned, since its runs depend on it."""

    data: dict[str, str] = field(default_factory=dict)  # task -> sha256 of its rows
    model: str | None = None  # sha256 of the checkpoint's files
    corpus: str | None = None  # sha256 of the text that encoders are pre-trained on
    widths: dict[str, int] = field(default_factory=dict)  # depth -> width with the parameters to be matched
    wider: dict[str, int] = field(default_factory=dict)  # depth -> `Condition.extra_ffn` of the control; none where 0


@dataclass(frozen=True)
class Study:
    """Schemes x depths x tasks x weight initialisations x seeds. Raises `Problems` for axes that make no sense.

    With more than one learning rate each condition gets its own: it is tried with all of them on a slice of the
    training data, and run with the best (see `resformer.study.selection`).
    """

    schemes: tuple[str, ...]  # each a name, or a name with options, as `write_scheme` writes it
    depths: tuple[int, ...]  # layers; that of the checkpoint where there is one
    tasks: tuple[str, ...]
    seeds: int = 5  # how many: 0, 1, ... seeds - 1
    learning_rates: tuple[float, ...] = ()  # at their peak; by default `RATES` or `PRETRAINED_RATES`
    weight_inits: tuple[str, ...] = ("xavier",)
    baseline: str | None = None  # one of the schemes, with which the others are compared; by default by `BASELINES`
    controls: bool = True  # the baseline with a wider feed-forward, and `STATIC`
    endpoint: str = "score"  # what the study is declared to be about: "score" or "train_loss"
    settings: Settings = field(default_factory=Settings)
    pretraining: Pretraining | None = None  # of an encoder for each scheme and depth, which the runs start from
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        problems = Problems()
        if not self.learning_rates and not isinstance(self.learning_rates, str):
            fresh = self.settings.model is None and self.pretraining is None
            object.__setattr__(self, "learning_rates", RATES if fresh else PRETRAINED_RATES)
        for name in ("schemes", "depths", "tasks", "learning_rates", "weight_inits"):
            values = getattr(self, name)
            optional = name == "depths" and self.settings.model is not None
            if isinstance(values, str) or not (values or optional):
                problems.add(name, values, "a list of at least one")
                values = ()
            object.__setattr__(self, name, tuple(values))
        for depth in self.depths:
            problems.unless(whole(depth), "depths", depth, "a whole number of at least 1")
        problems.unless(whole(self.seeds), "seeds", self.seeds, "a whole number of at least 1")
        for rate in self.learning_rates:
            problems.unless(number(rate) and rate > 0, "learning_rates", rate, "a finite number above 0")
        for name in self.weight_inits:
            problems.unless(name in WEIGHT_INITS, "weight_inits", name, f"among {', '.join(WEIGHT_INITS)}")
        problems.unless(self.endpoint in ENDPOINTS, "endpoint", self.endpoint, f"among {', '.join(ENDPOINTS)}")
        if self.settings.model is not None and len(self.weight_inits) > 1:
            problems.add("weight_inits", list(self.weight_inits), "left out where a checkpoint brings the weights")
        if self.settings.model is not None and self.pretraining is not None:
            problems.add("model", self.settings.model, "left out where the study pre-trains encoders")
        schemes = [_spelt(problems, text) for text in self.schemes]
        _distinct(problems, "schemes", schemes, self.schemes)
        for name in ("depths", "tasks", "learning_rates", "weight_inits"):
            _distinct(problems, name, getattr(self, name), getattr(self, name))
        baseline = self.baseline or next((name for name in BASELINES if name in schemes), schemes[0] if schemes else "")
        baseline = _spelt(Problems(), baseline)
        if schemes and baseline not in schemes:
            problems.add("baseline", self.baseline, f"one of the schemes: {', '.join(schemes)}")
        problems.stop()
        object.__setattr__(self, "schemes", tuple(schemes))
        object.__setattr__(self, "learning_rates", tuple(float(rate) for rate in self.learning_rates))
        object.__setattr__(self, "baseline", baseline)

    def conditions(self) -> list[Condition]:
        """Every cell, the deepest first, so that no long run is left over at the end; within a depth by task."""
        assert self.baseline is not None
        found = []
        for depth, init, task in product(sorted(self.depths, reverse=True), self.weight_inits, self.tasks):
            found += [Condition(scheme, depth, task, init) for scheme in self.schemes]
            if self.controls and (units := self.facts.wider.get(str(depth))):
                found.append(Condition(self.baseline, depth, task, init, units))
        return found

    def piece(self, i: int, n: int) -> list[Condition]:
        """Every n-th condition, from condition i, for one of n pieces of the study: as even as can be, none twice.

        Where the number of arms and n have a common factor, an arm would fall to the same pieces at every depth: the
        dealing moves on by one whenever it would begin to repeat itself.
        """
        dealt = list(enumerate(self.conditions()))
        period = lcm(len({arm(vars(condition)) for _, condition in dealt}), n)
        return [condition for place, condition in dealt if (place + place // period) % n == i]

    def encoders(self, conditions: Sequence[Condition] | None = None) -> list[Encoder]:
        """The pre-training runs that some conditions start from (None: all), each once; all of the first seed first."""
        if self.pretraining is None:
            return []
        of = self.conditions() if conditions is None else conditions
        seeds = range(min(self.pretraining.seeds, self.seeds))
        return list(dict.fromkeys(self._encoder(one, seed) for seed in seeds for one in of))

    def tuning(self, condition: Condition) -> list[Run]:
        """The runs that choose the learning rate of a condition: none where there is one rate."""
        if len(self.learning_rates) == 1:
            return []
        return [self._run(condition, TUNING_SEED, rate, tuning=True) for rate in self.learning_rates]

    def rates(self, chosen: Mapping[Condition, float | None]) -> dict[Condition, float | None]:
        """The learning rate of each condition: the only one, or that which was `chosen`; None where none is yet."""
        only = self.learning_rates[0] if len(self.learning_rates) == 1 else None
        return {condition: only or chosen.get(condition) for condition in self.conditions()}

    def runs(self, chosen: Mapping[Condition, float | None]) -> list[Run]:
        """The runs that are reported on, at the rates that were `chosen`.

        All of seed 0 come first, so that a study that is stopped half-way is balanced already.
        """
        rates = self.rates(chosen)
        return [self._run(condition, seed, rate) for seed in range(self.seeds) for condition, rate in rates.items()]

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Study:
        """From what `asdict` made of it, read back from JSON. Raises `ValueError` for what another version wrote."""
        try:
            settings, facts = Settings(**entry["settings"]), Facts(**entry["facts"])
            pretraining = None if entry["pretraining"] is None else Pretraining(**entry["pretraining"])
            return cls(**{**entry, "settings": settings, "facts": facts, "pretraining": pretraining})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"a study in study.json is damaged or of another version of resformer ({error}); remove study.json, "
                "and start `resformer compare` into the same folder again: finished runs of the same study are found"
            ) from None

    def _run(self, condition: Condition, seed: int, rate: float | None, *, tuning: bool = False) -> Run:
        return Run(
            condition,
            seed,
            rate,
            tuning,
            self.facts.data.get(condition.task),
            self.facts.model,
            None if self.pretraining is None else self._encoder(condition, 0 if tuning else seed).id,
            self._settings(condition.depth),
        )

    def _encoder(self, condition: Condition, seed: int) -> Encoder:
        assert self.pretraining is not None
        shape = replace(condition, task=PRETRAINING)
        number = seed % self.pretraining.seeds
        return Encoder(shape, number, self.facts.corpus, self.pretraining, self._settings(condition.depth))

    def _settings(self, depth: int) -> Settings:
        return replace(self.settings, width=self.facts.widths.get(str(depth), self.settings.width))


def arm(config: Mapping[str, Any]) -> str:
    """What is compared in a run's config: its scheme, or the control that the scheme stands for with more units."""
    return f"{config['scheme']} + wider ffn" if config.get("extra_ffn") else str(config["scheme"])


def _spelt(problems: Problems, text: Any) -> str:
    """A scheme in the one spelling that is a part of ids; as it is where it cannot be read."""
    if not isinstance(text, str):
        problems.add("schemes", text, "names of schemes")
        return repr(text)
    try:
        return write_scheme(*parse_scheme(text))
    except ValueError as error:
        problems.say("schemes", text, str(error))
        return text


def _distinct(problems: Problems, name: str, values: Iterable[Any], shown: Iterable[Any]) -> None:
    """That no value is there twice; 1 and 1.0 are one."""
    first: dict[Any, Any] = {}
    for value, given in zip(values, shown, strict=True):
        key = value if isinstance(value, str | int | float) else repr(value)
        if key in first:
            also = "" if repr(first[key]) == repr(given) else f", also written as {first[key]!r}"
            problems.say(name, given, f"{name} has {given!r} more than once{also}; give each once")
        first.setdefault(key, given)
