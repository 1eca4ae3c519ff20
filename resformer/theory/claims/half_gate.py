"""He's half/half shortcut: nothing changes in post-LN, everything in pre-LN."""

from typing import Any

import torch
from torch import Tensor

import resformer
from resformer.theory.claim import Law, Lines, Values, each, register

DEPTHS = (4, 12)
PLACES = ("post", "pre")
WIDTH, BATCH, TOKENS, WORDS = 32, 4, 16, 100


@register(
    "half_gate",
    "He 2016, here",
    "He et al. 2016, arXiv:1603.05027, table 1; equality in post-LN: N(c x) = N(x) for c > 0 and a norm whose eps "
    "tends to 0 (BERT's is 1e-12)",
    (
        Law("post-LN, ½ and ½: largest |Δ| of the states", 0.0, 1e-5, spread=0),
        Law("post-LN, exclusive gate ½: the same", 0.0, 1e-5, spread=0),
        Law("post-LN, 0.7 and 0.7: the same", 0.0, 1e-5, spread=4.4e-7),
        Law("pre-LN, ½ and ½: the same", 1.0, 0.0, spread=0.58, relation="≥"),
    ),
    seconds=7,
    axes=("depth L (layers)", "largest |Δ| of the last states"),
    log="x",
)
@each
def measure(seed: int) -> tuple[Values, Lines]:
    """A shortcut and a branch of ½ each, with which He's deep nets failed, are just the identity shortcut in post-LN:
    the norm after the add takes a common factor out again.

    BERT of 12 layers, width 32, Xavier, float32, random tokens, equal weights: the largest difference of a last state
    between x ← ½ x + ½ F(x) (or He's exclusive gate with g = ½) and x ← x + F(x), with norms before or after.
    """
    words = torch.randint(WORDS, (BATCH, TOKENS))
    halves, gate = {"shortcut": 0.5, "branch": 0.5}, {"bias": 0.0}
    cases = {
        "post-LN, ½ and ½": ("scaled", "post", halves),
        "post-LN, exclusive gate ½": ("exclusive_gate", "post", gate),
        "post-LN, 0.7 and 0.7": ("scaled", "post", {"shortcut": 0.7, "branch": 0.7}),
        "pre-LN, ½ and ½": ("scaled", "pre", halves),
    }
    same = {(depth, place): states(seed, words, depth, "identity", place) for depth in DEPTHS for place in PLACES}
    values: Values = {}
    curves: Lines = {}
    for name, (scheme, placement, options) in cases.items():
        found = [
            float((states(seed, words, depth, scheme, placement, **options) - same[depth, placement]).abs().max())
            for depth in DEPTHS
        ]
        curves[name] = (DEPTHS, found)
        values[name] = found[-1]
    rest = list(values.items())[1:]
    return {
        "post-LN, ½ and ½: largest |Δ| of the states": values["post-LN, ½ and ½"],
        **{f"{name}: the same": value for name, value in rest},
    }, curves


@torch.no_grad()
def states(seed: int, words: Tensor, depth: int, scheme: str, placement: str, **options: Any) -> Tensor:
    torch.manual_seed(seed)
    options |= {"vocab_size": WORDS, "weight_init": "xavier", "heads": 2, "dropout": 0.0}
    model = resformer.build_encoder(depth, WIDTH, scheme, placement=placement, **options)
    return model.eval()(words).last_hidden_state
