"""Every registered scheme keeps the contract, with each set of options that changes what it computes."""

from functools import partial

import pytest
from reference import INSIDE, REFERENCES, VARIANTS, change_inside, slots_of

from resformer import schemes
from resformer.testing import Reference, checks
from resformer.testing.contract import HOSTS
from resformer.testing.hosts import stands
from resformer.testing.mechanics import check_compile

# One of each kind: a scalar of the layer, moved norms, a moved final norm, history, streams, inside, values, block.
KINDS = {"rezero", "post_ln", "resi_dual", "denseformer", "mhc", "sub_ln", "hybrid_norm", "value_residual", "ode"}
GRAPHS = {"post_ln", "denseformer", "mhc", "sub_ln", "value_residual"}
MECHANICS = ("checkpointing-", "copies-", "half_precision-", "hidden_states-", "round_trip")


def inside_of(name):
    if name in INSIDE:
        return lambda family, twin, patched: change_inside(family, twin, patched, *INSIDE[name])


def cases():
    for name in schemes():
        reference = Reference(REFERENCES[name], partial(slots_of, name), inside_of(name))
        for options in ({}, *VARIANTS.get(name, [])):
            for check in checks(name, reference, **options):
                # Graphs take a second or two each, and what PyTorch and transformers do with a model depends on the
                # kind of its scheme, or on its host: of the pairs of the two most are slow tests, and so is what
                # options change on the other hosts.
                graph = check.name.startswith(("compile-", "export-"))
                other = any(family in check.name.split("-") for family in HOSTS if family != "bert")
                late = (graph and (options or other or name not in GRAPHS)) or (options and other)
                late = late or (check.name.startswith(MECHANICS) and (options or other) and name not in KINDS)
                marks = [pytest.mark.slow] if late else []
                yield pytest.param(check, id=f"{name}{options or ''}-{check}", marks=marks)


@pytest.mark.parametrize("check", list(cases()))
def test_contract(check):
    check()


@pytest.mark.slow
@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("name", ["rezero", "concat", "hyper_connections", "denseformer", "sub_ln", "value_residual"])
def test_compiles_with_inductor(family, name):
    assert stands(name, family)
    check_compile(family, name, {}, "inductor")
