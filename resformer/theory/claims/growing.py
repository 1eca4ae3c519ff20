"""He's argument by construction: a deep net need not be worse than the shallow one that it grew from."""

from functools import partial

from resformer.diagnostics.growing import ended, grown_against_fresh, majority_batch, majority_model
from resformer.theory.claim import Law, Lines, Values, each, register

SHALLOW, DEEP, STEPS = 2, 4, (40, 40)


@register(
    "growing",
    "He 2015",
    "the construction of He et al. 2015, arXiv:1512.03385, section 1; growing by zeroed outputs: `resformer.grow`",
    (
        Law("loss right after growing less before", 0.0, 0.0, spread=0),
        Law("grown and trained on, less before", -0.05, 0.0, spread=0.037, relation="≤"),
    ),
    seconds=17,
    axes=("step", "training loss"),
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """With new layers that add nothing a deep net starts where the shallow one ended, and goes on from there.

    BERT in pre-LN of width 32, 2 layers trained for 40 steps of Adam at 1e-3, grown to 4 and trained for 40 more,
    against fresh 4 layers for 80 steps. Which half of 20 words makes up most of a sentence of 12; loss over the last
    15 steps. The plot has the fresh net: in pre-LN it trains as well, so that growing saves steps of the deep net but
    does not end lower.
    """
    found = grown_against_fresh(
        partial(majority_model, "pre_ln", seed),
        partial(majority_batch, seed),
        shallow=SHALLOW,
        deep=DEEP,
        steps=STEPS,
    )
    return {
        "loss right after growing less before": found.jump,
        "grown and trained on, less before": ended(found.grown) - ended(found.shallow),
    }, {"grown": (range(sum(STEPS)), [*found.shallow, *found.grown]), "fresh": (range(sum(STEPS)), found.fresh)}
