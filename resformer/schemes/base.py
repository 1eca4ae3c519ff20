"""What a residual scheme is: pure maths about a stream, with its state explicit.

Letters, in docstrings and einsum strings alike:
B batch, T tokens, D width, S streams, N sites (N = 2 L in an encoder), L layers;
x the stream, F the branch (attention or feed-forward with its norm on the input), N(.) a norm after the add.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from resformer.errors import unknown

Stream = Tensor | tuple[Tensor, ...]
Norm = Callable[[Tensor], Tensor]

INITS = ("preserve", "paper")
SLOTS: dict[str, set[str]] = {  # where norms act, for each placement that moves them
    "pre": {"pre", "final"},
    "post": {"post"},
    "sandwich": {"pre", "out", "final"},
    "none": set(),
}
PLACEMENTS = ("native", *SLOTS)


@dataclass(frozen=True)
class Place:
    """All that a scheme knows of its host: where its site stands, and the widths there."""

    name: str  # "attn" | "cross" | "ffn" | "both" (parallel hosts) | "block"
    index: int  # number of the site in this stack, from 0
    sites: int  # how many sites the stack has
    layer: int  # number of the layer in this stack, from 0
    layers: int
    width: int  # D
    stack: str = "encoder"  # or "decoder"
    other_layers: int = 0  # the depth of the other stack where both are patched as one model, else 0
    first: bool = True  # among the sites of this layer
    last: bool = True
    opens: bool = True  # first site of the stack
    closes: bool = True  # last site of the stack
    widths: dict[str, int] = field(default_factory=dict)  # width at each inside point of this site
    heads: int | None = 1  # None where the family cannot tell
    sublayers: int = 1  # whose sum this site adds; two where attention and the feed-forward stand side by side
    width_out: int | None = None  # D after this site, where the site changes it (`ResidualStack` only)


@dataclass
class Branch:
    """A sublayer with the norms that act on it, as a function from (B T D) to (B T D)."""

    function: Callable[..., Tensor]
    # as the layer was given it: (B T), or (B 1 T T) or (B 1 1 T), boolean or added to the scores
    mask: Tensor | None = None
    depends: Callable[[], Iterable[Tensor]] = tuple  # what it computes with besides x, for solvers that differentiate

    def __call__(self, x: Tensor, values: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """values: for schemes with the point "values", what attention uses in place of its values (B H T D/H)."""
        return self.function(x) if values is None else self.function(x, values)

    def real(self) -> Tensor | None:
        """(B T), True where a token is text and not padding; None if all are. For encoders without a cache."""
        if self.mask is None:
            return None
        if not isinstance(self.mask, Tensor):  # the blocks of flex attention
            raise ValueError(
                f"this scheme needs to know which tokens are padding, and a {type(self.mask).__name__} does not tell; "
                "load the model with attn_implementation='sdpa'"
            )
        if self.mask.ndim == 2:
            return self.mask > 0
        keys = self.mask.shape[-1]
        own = self.mask[:, 0].expand(-1, keys, -1).diagonal(dim1=-2, dim2=-1)  # text sees itself, in any window
        return own if own.dtype == torch.bool else own >= 0


class Scheme(nn.Module):
    """One residual connection. A subclass says how the stream is read, written, opened and closed.

    The four verbs take and return the stream and keep nothing between calls, so that checkpointing,
    compilation and generation need no special case. The default is the plain residual of the host:

    x ← N(x + F(x))

    `branch` is out-norm · sublayer · inside("in") · pre-norm; which norms there are is the host's matter
    or the scheme's (`norms`): then patching reuses, moves or makes norms of the host's class.
    """

    name: ClassVar[str] = ""  # given by `register`
    scope: ClassVar[str] = "site"  # or "block": step sees f(x) = layer(x) - x
    points: ClassVar[tuple[str, ...]] = ()  # inside points used: in q k v o up down; "values": see `Branch`
    preserves: ClassVar[tuple[str, ...]] = ()  # kinds of host kept exactly by init="preserve": "post", "pre"
    placement: ClassVar[str] = "native"  # where the paper has the host's norm; taken with init="paper"
    repeats: bool = False  # calls the branch more than once: no KV cache, no attentions to show
    compiles: bool = True  # to one graph, by torch.compile(fullgraph=True) and torch.export
    exact_gradient: ClassVar[bool] = True  # else the backward pass is not that of the forward (straight-through ...)
    stacks: ClassVar[tuple[str, ...]] = ("encoder", "decoder")  # where it can stand; elsewhere it is refused
    widens: ClassVar[bool] = False  # joins a branch of another width than the stream's: `ResidualStack` only
    opens_as_given: ClassVar[bool] = True  # the first site reads what enters the stack; a host may leave its norm out
    carries: ClassVar[bool] = False  # hands a stream of its own to the next layer, without a `start` of its own
    readout: ClassVar[bool] = False  # adds after the final norm: `finish` is given it, also where the host has its own
    norms: ClassVar[Any] = None  # None: the host's own; or a method -> subset of {"embed" "pre" "out" "post" "final"}
    calibrates: bool = False  # takes values from a batch (`calibrate`), with these options and this init
    scheduled: bool = False  # follows the steps of training (`set_progress`), with this init

    def __init__(self, place: Place, *, init: str = "preserve"):
        super().__init__()
        if place.stack not in self.stacks:
            raise ValueError(
                f"scheme {self.name!r} serves {' and '.join(self.stacks)} stacks, and this is a {place.stack}; "
                f"`resformer schemes {self.name}` says why"
                + (
                    f". Patch the {self.stacks[0]} alone: layers={{{self.stacks[0]!r}: range({place.other_layers})}}"
                    if place.other_layers
                    else ""
                )
            )
        self.place, self.init = place, init

    @classmethod
    def streams(cls) -> bool:
        """Whether more goes from layer to layer than the host's states: then none may be left out."""
        return cls.carries or cls.start is not Scheme.start

    def start(self, h: Tensor) -> Stream:
        """(B T D) -> stream, at the first site of the stack."""
        return h

    def read(self, s: Any) -> Tensor:
        """What the branch sees, (B T D)."""
        return s

    def write(self, s: Any, y: Tensor, norm: Norm) -> Stream:
        """The stream after a branch gave y; `norm` is the norm after the add, else the identity."""
        return norm(s + y)

    def finish(self, s: Any, norm: Norm) -> Tensor:
        """Stream -> (B T D) after the last site; `norm` is the final norm where it was made for the scheme, or where
        the scheme says `readout`, else the identity. Also called after each layer, with the identity, for what
        `output_hidden_states` shows."""
        return norm(s)

    def step(self, s: Any, branch: Branch, norm: Norm) -> Stream:
        """One site. Overridden by solvers, which call the branch more than once, and where reading and writing
        share work. (Not called `apply`: `nn.Module.apply` is taken.)"""
        return self.write(s, branch(self.read(s)), norm)

    def inside(self, point: str, x: Tensor) -> Tensor:
        """What passes a point of `points`: the inputs of "o" and "down", the outputs of "q k v up"."""
        return x

    def show(self, **coefficients: Tensor | Callable[[], Tensor]) -> None:
        """Called with the coefficients in force that depend on data or are made of parameters, by their letters, or
        with what computes those that the step does without; of several streams also `mix`, (... S S) with H ← mix H.
        Nobody listens unless they are measured (`resformer.diagnostics.gates`), which takes this method's place."""

    def calibrate(self, s: Any, y: Tensor, real: Tensor | None, carried: Any) -> Any:
        """Set parameters from what this site is about to write; `real` as of `Branch.real`. `carried` is what the site
        before returned, None at the first of a stack."""
        raise NotImplementedError

    def uncalibrated(self) -> bool:
        """Whether the values that `calibrate` sets are still to come."""
        return False

    def set_progress(self, step: int) -> None:
        """Move the schedule to where it is after so many steps. It is a buffer that is moved here alone: a counter in
        the forward would tick twice with checkpointing."""
        raise NotImplementedError

    def progress(self) -> int:
        """The least step at which the schedule is where it is."""
        raise NotImplementedError

    def edits(self) -> dict[str, float]:
        """Gains on the host's weights, by role: q k v o up down (weights only); "branch" (weight and bias of what the
        branch ends with); "sum" (the eps of the norm after the add follows this factor); "embed" (the embeddings'
        weights; only the scheme that opens the stack is asked)."""
        return {}

    def formula(self) -> str:
        """The equation in force with these options and this init, F(x) for the branch."""
        return self.card()["equation"]

    def can_preserve(self, kind: str) -> bool:
        """Whether `init="preserve"` with these options keeps a host of this kind ("post" or "pre")."""
        return kind in self.preserves

    def extra_repr(self) -> str:
        values = {"init": self.init} | {name: getattr(self, name) for name in self.options()}
        return ", ".join(f"{name}={value!r}" for name, value in values.items())

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The keyword options with their defaults; each is stored under its own name."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "init"}

    @classmethod
    def extra_parameters(cls, places: list[Place], **options: Any) -> int:
        """How many parameters the scheme adds over these places (norms not counted)."""
        return sum(p.numel() for place in places for p in cls(place, **options).parameters())

    @classmethod
    def card(cls) -> dict[str, str]:
        """The docstring's parts: summary, equation, parameters, init, options, reference, differs."""
        summary, equation, *rest = (block.strip() for block in inspect.cleandoc(cls.__doc__ or "").split("\n\n"))
        card = {"summary": summary, "equation": equation}
        key = ""
        for line in "\n".join(rest).splitlines():
            head, _, tail = line.partition(" ")
            if line[:1].isupper() and head in {"Parameters", "Init", "Options", "Reference", "Differs"}:
                key, line = head.lower(), tail
                card[key] = ""
            if key:
                card[key] = f"{card[key]} {line.strip()}".strip()
        return card


_SCHEMES: dict[str, type[Scheme]] = {}


S = TypeVar("S", bound=type[Scheme])


def register(name: str) -> Callable[[S], S]:
    """Make a scheme known under a name; a name is given once."""

    def add(cls: S) -> S:
        if name in _SCHEMES:
            raise ValueError(
                f"scheme {name!r} is registered already, by {_SCHEMES[name].__module__}; choose another name"
            )
        cls.name = name
        _SCHEMES[name] = cls
        return cls

    return add


def schemes() -> dict[str, type[Scheme]]:
    """All registered schemes, by name, in the order of registration."""
    return dict(_SCHEMES)


def find_scheme(name: str, options: dict[str, Any]) -> type[Scheme]:
    """The scheme of that name, which knows these options; else a `ValueError` with the nearest names."""
    if not isinstance(name, str) or name not in _SCHEMES:
        raise unknown("scheme", name, _SCHEMES)
    known = _SCHEMES[name].options()
    for option in options:
        if option not in known:
            if not known:
                raise ValueError(f"unknown option {option!r}: scheme {name!r} takes none")
            raise unknown("option", option, known, of=f"scheme {name!r}")
    return _SCHEMES[name]


def lacking(model: nn.Module, verb: str, what: str) -> ValueError:
    """The error for a model none of whose schemes has, as it stands, what the verb `verb` is for."""
    here = sorted({f"scheme {m.name!r} ({m.extra_repr()})" for m in model.modules() if isinstance(m, Scheme)})
    able = ", ".join(name for name, cls in _SCHEMES.items() if getattr(cls, verb) is not getattr(Scheme, verb))
    who = " and ".join(here) or f"this {type(model).__name__} without a scheme"
    return ValueError(f"{who} has {what}; these schemes have, with init='paper': {able}")


def scalar(value: float) -> nn.Parameter:
    """A learned number, as a vector of one: FSDP2 shards parameters along their first dimension, and needs one."""
    return nn.Parameter(torch.tensor([value]))


def number(name: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high] as a float, or a `ValueError` that names the option."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"option {name!r} must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"option {name!r} must lie in [{low:g}, {high:g}], got {value!r}")
    return float(value)


def count(name: str, value: Any, *, low: int = 1) -> int:
    """A whole number of at least `low`, or a `ValueError` that names the option."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"option {name!r} must be a whole number of at least {low}, got {value!r}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False, or a `ValueError` that names the option."""
    if not isinstance(value, bool):
        raise ValueError(f"option {name!r} must be True or False, got {value!r}")
    return value
