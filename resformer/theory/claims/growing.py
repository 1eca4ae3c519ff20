"""He's argument by construction: a deep net need not be worse than the shallow one that it grew from."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

import resformer
from resformer.diagnostics.identity_fit import grown_against_fresh
from resformer.theory.claim import Law, Lines, Values, each, register

WIDTH, WORDS, TOKENS, BATCH, SHALLOW, DEEP, STEPS, LAST = 32, 20, 12, 32, 2, 4, (40, 40), 15
LEVEL = "in pre-LN a fresh deep net trains as well: growing saves steps of the deep net, it does not end lower here"


@register(
    "growing",
    "He 2015",
    "the construction of He et al. 2015, arXiv:1512.03385, section 1; growing by zeroed outputs: `resformer.grow`",
    (
        Law("loss right after growing less before", 0.0, 0.0, spread=0),
        Law("grown and trained on, less before", -0.05, 0.0, spread=0.037, relation="≤"),
        Law("grown less fresh, equal steps", -0.1, 0.05, spread=0.036, relation="≤", popular=LEVEL),
    ),
    seconds=17,
    axes=("step", "training loss"),
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """With new layers that add nothing a deep net starts where the shallow one ended, and goes on from there.

    BERT in pre-LN of width 32, 2 layers trained for 40 steps of Adam at 1e-3, grown to 4 and trained for 40 more,
    against fresh 4 layers for 80 steps. Which half of 20 words makes up most of a sentence of 12; loss over the last
    15 steps.
    """

    from transformers import AutoModelForSequenceClassification  # takes seconds, in each process

    def build(layers: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        return resformer.build_encoder(
            layers,
            WIDTH,
            "pre_ln",
            vocab_size=WORDS,
            weight_init="xavier",
            heads=2,
            dropout=0.0,
            auto=AutoModelForSequenceClassification,
        )

    def batches(step: int) -> dict[str, Tensor]:
        words = torch.randint(WORDS, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1000 * seed + step))
        return {"input_ids": words, "labels": ((words < WORDS // 2).sum(1) > TOKENS // 2).long()}

    found = grown_against_fresh(build, batches, shallow=SHALLOW, deep=DEEP, steps=STEPS)
    end = lambda losses: sum(losses[-LAST:]) / LAST
    return {
        "loss right after growing less before": found.jump,
        "grown and trained on, less before": end(found.grown) - end(found.shallow),
        "grown less fresh, equal steps": end(found.grown) - end(found.fresh),
    }, {"grown": (range(sum(STEPS)), [*found.shallow, *found.grown]), "fresh": (range(sum(STEPS)), found.fresh)}
