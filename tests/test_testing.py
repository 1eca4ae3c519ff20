"""The public contract: it passes a sound scheme of one's own and names what is wrong with others."""

import pytest
import torch
from torch import nn

from resformer.schemes import Scheme, base, register
from resformer.schemes.base import number, scalar
from resformer.testing import Net, check_scheme, checks, contract


class Halfway(Scheme):
    """A learned factor on the branch, for everyone's own file.

    x ← x + c a F(x)

    Parameters  a: (1) one scalar a site
    Init        paper: a = 0.5; preserve: a = 1
    Options     c=1.0, a constant
    Reference   none yet, arXiv:0000.00000
    """

    preserves = ("post", "pre")

    def __init__(self, place, *, init="preserve", c=1.0):
        super().__init__(place, init=init)
        self.c = number("c", c, low=0.1)
        self.a = scalar(0.5 if init == "paper" else 1 / c)

    def write(self, s, y, norm):
        return norm(s + self.c * self.a * y)


def loop(net: Net, x: torch.Tensor) -> torch.Tensor:
    x = net.embed(x)
    for site in net.sites:
        x = site.post(x + net.options.get("c", 1.0) * site.number("a") * site.branch(x))
    return net.final(x)


@pytest.fixture
def registered(monkeypatch):
    """Register the scheme, changed so, under the name "mine", for one test."""

    def add(**changes):
        cls = type("Mine", (Halfway,), {"__doc__": Halfway.__doc__, "__module__": __name__} | changes)
        monkeypatch.setitem(globals(), "Mine", cls)  # where pickle looks for it
        monkeypatch.setattr(base, "_SCHEMES", dict(base._SCHEMES))
        register("mine")(cls)

    return add


def test_a_sound_scheme_passes(registered, monkeypatch):
    registered()
    for graph in ("check_compile", "check_export"):  # seconds each; the registered ones have them
        monkeypatch.setattr(contract, graph, lambda *given: None)
    check_scheme("mine", loop, c=2.0)
    names = [str(check) for check in checks("mine", loop)]
    assert len(names) == len(set(names))
    assert {"update-bert-paper", "update-stack", "preserves-gpt2", "compile-modernbert", "generate"} <= set(names)


def misses_its_start(self, place, *, init="preserve", c=1.0):
    Halfway.__init__(self, place, init=init, c=c)
    with torch.no_grad():
        self.a.add_(1e-6)


def forgets_its_option(self, place, *, init="preserve", c=1.0):
    Halfway.__init__(self, place, init=init, c=c)
    self.c = 1.0


def has_a_parameter_too_many(self, place, *, init="preserve", c=1.0):
    Halfway.__init__(self, place, init=init, c=c)
    self.unused = nn.Parameter(torch.zeros(()))


def draws_a_part_without_gradient(self, s, y, norm):
    return norm(s + self.c * self.a.detach() * y)


def keeps_state(self, s, y, norm):
    self.seen = y  # of the graph: cannot be copied
    return norm(s + self.c * self.a * y)


def leaks_padding(self, s, y, norm):
    return norm(s + self.c * self.a * (y + 0.01 * y.mean(1, keepdim=True)))


FAULTS = [
    ({"__doc__": "No equation.\n\nx = y\n\nOptions none"}, "card"),
    ({"__init__": misses_its_start}, "preserves-bert"),
    ({"__init__": forgets_its_option}, "parameters"),
    ({"__init__": has_a_parameter_too_many}, "learns-bert-preserve"),
    ({"write": draws_a_part_without_gradient}, "learns-bert-preserve"),
    ({"write": keeps_state}, "copies-bert"),
    ({"write": leaks_padding}, "padding"),
    ({"write": lambda self, s, y, norm: norm(s + self.a * y) + 1e-9}, "update-bert-preserve"),
]


@pytest.mark.parametrize(("changes", "point"), FAULTS, ids=[point for _, point in FAULTS])
def test_a_fault_is_named(registered, changes, point):
    registered(**changes)
    check = next(check for check in checks("mine", loop, c=2.0) if check.name == point)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check()


def test_the_first_fault_is_reported(registered):
    registered(write=leaks_padding)
    with pytest.raises(AssertionError, match="scheme 'mine' fails 'update-bert-paper'"):
        check_scheme("mine", loop)


def test_unknown_schemes_and_options_are_refused():
    with pytest.raises(ValueError, match="unknown scheme"):
        check_scheme("mine")
    with pytest.raises(ValueError, match="takes none"):
        checks("pre_ln", bias=1)
