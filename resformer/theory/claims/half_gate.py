"""He's half/half shortcut: nothing changes in post-LN, everything in pre-LN."""

import torch

import resformer
from resformer.theory.claim import Law, each, register

DEPTHS = (4, 12, 48)
WIDTH, BATCH, TOKENS, WORDS = 32, 4, 16, 100
SCALE = "a norm after the add takes a common factor out again, so that it fails in pre-LN nets and not in post-LN ones"


@register(
    "half_gate",
    "He 2016, here",
    "He et al. 2016, arXiv:1603.05027, table 1; equality in post-LN: N(c x) = N(x) for c > 0",
    (
        Law("post-LN, L=12: largest |Δ| of the states", 0.0, 3e-4, spread=5e-5),
        Law("post-LN, L=48: largest |Δ| of the states", 0.0, 3e-3, spread=5e-4),
        Law("exclusive gate ½, post-LN, L=12: the same", 0.0, 3e-4, spread=5e-5),
        Law("pre-LN, L=12: largest |Δ| of the states", 1.0, 0.0, spread=0.5, relation="≥"),
        Law("post-LN: half/half changes the net, |Δ|", 1.0, 0.5, spread=5e-5, popular=SCALE),
    ),
    fast=True,
    axes=("depth L (layers)", "largest |Δ| of the last states"),
    log="xy",
)
@each
def measure(seed):
    """A shortcut and a branch of ½ each, with which He's deep nets failed, is exactly the identity shortcut in post-LN.

    BERT of width 32, Xavier, float32, random tokens, equal weights: the largest difference of a last hidden state
    between x ← ½ x + ½ F(x) (or He's exclusive gate with g = ½) and x ← x + F(x), with norms before or after.
    """
    words = torch.randint(WORDS, (BATCH, TOKENS))
    values, curves = {}, {}
    for name, placement in {"post-LN": "post", "pre-LN": "pre"}.items():
        found = [difference(seed, words, depth, "scaled", placement, shortcut=0.5, branch=0.5) for depth in DEPTHS]
        curves[name] = (DEPTHS, found)
        values |= {f"{name}, L={d}: largest |Δ| of the states": one for d, one in zip(DEPTHS, found, strict=True)}
    values["exclusive gate ½, post-LN, L=12: the same"] = difference(seed, words, 12, "exclusive_gate", "post", bias=0)
    values["post-LN: half/half changes the net, |Δ|"] = values["post-LN, L=12: largest |Δ| of the states"]
    return values, curves


@torch.no_grad()
def difference(seed, words, depth, scheme, placement, **options):
    def states(name, **given):
        torch.manual_seed(seed)
        model = resformer.build_encoder(
            depth, WIDTH, name, placement=placement, vocab_size=WORDS, weight_init="xavier", heads=2, dropout=0.0, **given
        )
        return model.eval()(words).last_hidden_state

    return float((states(scheme, **options) - states("identity")).abs().max())
