"""Specs that are nearly right, and what refusing one looks like, for the tests of hosts."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
from test_own_models import own_family, sites
from test_patching import assert_same, snapshot
from transformers import JambaConfig

import resformer
from resformer import families
from resformer.hosts import Family, register_family


@contextmanager
def refused(model, message):
    """One `ValueError`, after which the model is what it was."""
    before = seen(model)
    with pytest.raises(ValueError, match=message):
        yield
    assert_same(seen(model), before)


def seen(model) -> dict:
    if hasattr(model, "config"):
        return snapshot(model)
    model.config = JambaConfig()  # a plain module has none, and `snapshot` looks at it
    try:
        return snapshot(model)
    finally:
        del model.config


def with_stack(**changes) -> Family:
    family = own_family()
    return replace(family, stacks=(replace(family.stacks[0], **changes),))


def with_site(**changes) -> Family:
    first, second = sites()
    return with_stack(sites=(replace(first, **changes), second))


ATTN, FFN = sites()


def told(model, family, message, scheme="highway"):
    register_family(family, replace=family.name in families())
    with refused(model, message):
        resformer.patch(model, scheme)
