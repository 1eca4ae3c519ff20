"""What a study consists of: the settings its runs share, its cells, and the order they are run in. Stdlib only."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from resformer.spelling import parse_scheme

FORMAT = 1  # raised when a field changes its meaning, so that old runs are not taken for new ones


@dataclass(frozen=True)
class Settings:
    """What all runs of a study share. The encoder is built from these numbers and trained from scratch.

    Raises `ValueError` for a number that makes no sense; names (of schedules, initialisations ...) are
    checked where they are known.
    """

    width: int = 32  # of the stream, D
    heads: int = 2  # of attention; divides the width
    ffn: int | None = None  # width inside the feed-forward branch; None: four times `width`, filled in at once
    dropout: float = 0.0  # share of activations, in [0, 1)
    init: str = "paper"  # of the scheme
    weight_init: str = "xavier"  # of the host's weights
    steps: int = 400  # optimizer steps
    batch_size: int = 32  # examples a step
    warmup: float = 0.0  # share of the steps, in [0, 1)
    schedule: str = "hold"  # of the learning rate after warm-up
    weight_decay: float = 0.01  # of weight matrices; never of the scheme's parameters
    scheme_lr_multiplier: float = 1.0  # learning rate of the scheme's parameters over that of the others
    clip: float = 1.0  # largest norm of the gradient; 0: not clipped
    precision: str = "fp32"
    max_length: int = 128  # tokens; longer examples are cut
    train_size: int | None = None  # training examples used; None: all that the task has
    data: str | None = None  # folder with the data; None: built in, or from the hub

    def __post_init__(self) -> None:
        for name in ("width", "heads", "steps", "batch_size", "max_length"):
            _whole(name, getattr(self, name))
        if self.width % self.heads:
            fitting = [n for n in range(1, self.width + 1) if self.width % n == 0]
            nearest = sorted(sorted(fitting, key=lambda n: abs(n - self.heads))[:4])
            raise ValueError(
                f"heads must divide the width, got heads {self.heads} with width {self.width}; "
                f"choose heads among {', '.join(map(str, nearest))}, or another width"
            )
        for name in ("ffn", "train_size"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))
        # Resolved here so that the id of a run does not depend on how the same thing was said.
        object.__setattr__(self, "ffn", self.ffn or 4 * self.width)
        for name, below in (("dropout", 1), ("warmup", 1), ("weight_decay", math.inf), ("clip", math.inf)):
            object.__setattr__(self, name, _number(name, getattr(self, name), below=below))
        object.__setattr__(self, "scheme_lr_multiplier", _positive("scheme_lr_multiplier", self.scheme_lr_multiplier))


@dataclass(frozen=True)
class Run:
    """One cell of a study: everything that decides its outcome."""

    scheme: str  # as the user wrote it; `parse_scheme` reads it
    depth: int  # layers
    task: str
    seed: int  # of weights, data order and dropout
    learning_rate: float  # at its peak
    settings: Settings = field(default_factory=Settings)

    @property
    def config(self) -> dict[str, Any]:
        """All fields in one flat dict, as in config.json and result.json."""
        own = {name: value for name, value in vars(self).items() if name != "settings"}
        return own | asdict(self.settings)

    @property
    def id(self) -> str:
        """12 hexadecimal digits that depend on `config` alone: the name of the run's directory."""
        text = json.dumps({"format": FORMAT, **self.config}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"{self.scheme}, depth {self.depth}, {self.task}, seed {self.seed}, lr {self.learning_rate:g}"


@dataclass(frozen=True)
class Study:
    """Schemes x depths x tasks x seeds x learning rates. Raises `ValueError` for axes that make no sense."""

    schemes: tuple[str, ...]  # each a name, or a name with options: see `parse_scheme`
    depths: tuple[int, ...]  # layers
    tasks: tuple[str, ...]
    seeds: int = 1  # how many: 0, 1, ... seeds - 1
    learning_rates: tuple[float, ...] = (1e-3,)
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        for name in ("schemes", "depths", "tasks", "learning_rates"):
            values = getattr(self, name)
            if isinstance(values, str) or not values:
                raise ValueError(f"{name} must be a list of at least one, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        for depth in self.depths:
            _whole("depths", depth)
        _whole("seeds", self.seeds)
        rates = tuple(_positive("learning_rates", rate) for rate in self.learning_rates)
        object.__setattr__(self, "learning_rates", rates)
        object.__setattr__(self, "schemes", tuple(text.strip() for text in self.schemes))
        _distinct("depths", self.depths)
        _distinct("tasks", self.tasks)
        _distinct("learning_rates", self.learning_rates)
        parsed = [parse_scheme(text) for text in self.schemes]
        _distinct("schemes", (f"{name} {sorted(options.items())}" for name, options in parsed), self.schemes)

    def runs(self) -> list[Run]:
        """Every cell, all of seed 0 first, so that a study stopped half-way is balanced already.

        Within a seed the deepest come first, so that no long run is left over at the end.
        """
        return [
            Run(scheme, depth, task, seed, rate, self.settings)
            for seed, depth, task, scheme, rate in product(
                range(self.seeds), sorted(self.depths, reverse=True), self.tasks, self.schemes, self.learning_rates
            )
        ]


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _number(name: str, value: Any, *, below: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        allowed = "a finite number of at least 0" if below == math.inf else f"at least 0 and below {below:g}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return float(value)


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def _distinct(name: str, keys: Iterable[Any], shown: tuple[Any, ...] = ()) -> None:
    counts = Counter(keys)
    for position, (key, count) in enumerate(counts.items()):
        if count > 1:
            value = shown[position] if shown else key
            raise ValueError(f"{name} has {value!r} {count} times; give each once")
