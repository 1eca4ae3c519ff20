"""Schemes inside the branch: what stands there at the start, on which slices, and what is refused."""

import math

import pytest
import torch

import resformer
from resformer import schemes
from resformer.host import find_host
from resformer.schemes import Place
from resformer.testing.hosts import HEADS, WIDTH, batch, tiny_host

THREE = ["bert", "gpt2", "modernbert"]
FUSED = {"gpt2": "attn.c_attn", "modernbert": "attn.Wqkv"}


def place(**changes) -> Place:
    known = {"index": 1, "sites": 8, "layer": 3, "layers": 4, "width": WIDTH, "heads": HEADS}
    return Place(**({"name": "ffn", "widths": {"up": 20, "down": 20}} | known | changes))


ATTENTION = {"name": "attn", "widths": dict.fromkeys("qkvo", WIDTH)}


def test_initial_values_of_the_papers():
    attention = schemes()["normformer"](place(**ATTENTION), init="paper")
    assert attention.gain.tolist() == [1] * HEADS
    assert attention.norms() == {"pre", "out", "final"}
    ffn = schemes()["normformer"](place(), init="paper")
    assert ffn.shortcut.tolist() == [1] * WIDTH
    assert ffn.norms() == {"pre", "final"}
    assert schemes()["hybrid_norm"](place(**ATTENTION), init="paper").gain.tolist() == [[1] * (WIDTH // HEADS)] * 3
    assert not list(schemes()["hybrid_norm"](place(), init="paper").parameters())


def test_sub_ln_gains_of_two_stacks():
    """An encoder of 6 layers under a decoder of 4, that decoder, and its cross-attention."""

    def gains(**where):
        return schemes()["sub_ln"](place(**where), init="paper").edits()

    roles = ("v", "o", "up", "down")
    encoder, decoder = math.sqrt(math.log(3 * 4) * math.log(2 * 6) / 3), math.sqrt(math.log(3 * 4))
    assert gains(layers=6, sites=12, other_layers=4) == pytest.approx(dict.fromkeys(roles, encoder))
    of_decoder = {"layers": 4, "sites": 12, "other_layers": 6, "stack": "decoder"}
    assert gains(**of_decoder) == pytest.approx(dict.fromkeys(roles, decoder))
    assert gains(**of_decoder, name="cross") == {}


@pytest.mark.parametrize("name", ["sub_ln", "normformer"])
def test_cross_attention_stays_pre_ln(name):
    changes = {"is_decoder": True, "add_cross_attention": True}
    host = tiny_host("gpt2", **changes)
    model = resformer.patch(tiny_host("gpt2", **changes), name, init="paper")
    for before, after in zip(host.h, model.h, strict=True):
        assert not list(after.resformer.cross.parameters())
        assert set(after.resformer.acts["cross"]) == {"pre"}
        for p, q in zip(before.crossattention.parameters(), after.crossattention.parameters(), strict=True):
            assert torch.equal(p, q)


def test_ln_scaling_is_by_the_number_of_the_layer():
    for name in ("attn", "ffn"):
        for layer, scale in ((0, 1), (3, 1 / 2), (24, 1 / 5)):
            x = torch.ones(2, 3, WIDTH)
            for learned in (False, True):
                scheme = schemes()["ln_scaling"](place(name=name, layer=layer), init="paper", learned=learned)
                torch.testing.assert_close(scheme.inside("in", x), scale * x)


@pytest.mark.parametrize("family", THREE)
def test_queries_keys_and_values_are_normalised_in_each_head(family):
    model = resformer.patch(tiny_host(family), "hybrid_norm", init="paper")
    layer = find_host(model).layers[0]
    seen = []
    paths = [FUSED[family]] if family in FUSED else [f"attention.self.{n}" for n in ("query", "key", "value")]
    for path in paths:
        layer.get_submodule(path).register_forward_hook(lambda m, args, y: seen.append(y))
    model(**batch())
    heads = torch.cat(seen, dim=-1).unflatten(-1, (3 * HEADS, -1))
    torch.testing.assert_close(heads.square().mean(-1), torch.ones(*heads.shape[:-1]).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "where", "options", "message"),
    [
        ("normformer", {"widths": {}}, {}, "inside point.*a site 'ffn' with none named"),
        ("normformer", {"name": "both", "widths": {"o": 16, "down": 20}}, {}, "side by side.*sub_ln"),
        ("hybrid_norm", {"name": "both", "widths": dict.fromkeys("qkvo", 16)}, {}, "side by side.*sub_ln"),
        ("sub_ln", {"name": "both", "widths": {"o": 16}}, {}, "a site 'both' with o$"),
        ("hybrid_norm", {"name": "attn", "widths": {"q": WIDTH, "o": WIDTH}}, {}, "'q', 'k' and 'v'.*'attn'"),
        ("ln_scaling", {}, {"learned": 1}, "option 'learned' must be True or False, got 1"),
    ],
)
def test_bad_input_is_refused(name, where, options, message):
    with pytest.raises(ValueError, match=message):
        schemes()[name](place(**where), **options)
