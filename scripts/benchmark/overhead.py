"""What patching costs by itself: schemes that compute next to nothing, on the host's own norms."""

from __future__ import annotations

from benchmark.nets import Subject, patched
from benchmark.steps import MORE, SHOWN, compare, stock_subject
from benchmark.suite import Bench, Goal, Row, Suite, Values


def measure(row: Row, bench: Bench) -> Values:
    """A patched host, or None for a second copy of the stock one."""

    def make(bench: Bench) -> Subject:
        return stock_subject(bench) if row.given is None else Subject(patched(bench.size, **row.given), bench)

    return compare(make, {"": stock_subject}, bench)


CONSTANT = (Goal("time", most=1.01, top=1.03), Goal("saved", most=1.0))
LEARNED = (Goal("time", most=1.01, top=1.03), Goal("saved", most=1.08))
AGAIN = Row("stock again", note="a second copy of the stock model: the noise")
SUITE = Suite(
    "overhead",
    "a training step (forward, backward, AdamW) of a patched BERT against the same BERT of transformers, post-LN both",
    SHOWN,
    (
        AGAIN,
        Row("identity", (Goal("time", most=1.0), Goal("saved", most=1.0)), {"scheme": "identity"}),
        Row(
            "scaled",
            CONSTANT,
            {"scheme": "scaled", "init": "paper", "branch": 0.5},
            'shortcut 1, branch 0.5, init="paper": with 1 and 1 there would be nothing to multiply',
        ),
        Row("deepnorm", CONSTANT, {"scheme": "deepnorm", "init": "paper"}, 'init="paper", which is post-LN'),
        Row(
            "rezero",
            LEARNED,
            {"scheme": "rezero"},
            'init="preserve", which leaves the host\'s norms where the paper has none',
        ),
        Row(
            "layer_scale",
            LEARNED,
            {"scheme": "layer_scale"},
            'init="preserve", on the host\'s post-LN; the paper has pre-LN',
        ),
    ),
    measure,
    more=MORE,
)
