"""The width that a depth affords, and the tokens that a model takes."""

import pytest
import torch
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel

from resformer import build_encoder, describe, grow
from resformer.sizes import Match, layer_parameters, longest_input, matched_width


def bert_layer(width: int) -> int:
    """q, k, v, o; up and down; two norms."""
    return 4 * (width**2 + width) + (4 * width**2 + 4 * width) + (4 * width**2 + width) + 4 * width


def counted(depth: int, width: int) -> int:
    with torch.device("meta"):
        model = BertModel(
            BertConfig(num_hidden_layers=depth, hidden_size=width, num_attention_heads=1, intermediate_size=4 * width)
        )
    return sum(p.numel() for p in model.encoder.parameters())


@pytest.mark.parametrize(
    ("depth", "width", "heads"), [(12, 128, None), (24, 90, 2), (48, 64, None), (3, 256, 4), (6, 181, 1)]
)
def test_nearest_width(depth, width, heads):
    match = matched_width(depth, "12x128", heads=heads)
    assert match == Match(width, counted(depth, width), counted(12, 128))
    assert counted(12, 128) == 12 * bert_layer(128)
    step = heads or 64
    for other in (width - step, width + step):
        if other:
            assert abs(match.relative) < abs(counted(depth, other) / match.wanted - 1)
    assert match.relative == match.parameters / match.wanted - 1


def test_a_number_of_parameters():
    wanted = 5 * bert_layer(40) + 7
    match = matched_width(5, wanted, heads=2)
    assert (match.width, match.parameters) == (40, wanted - 7)
    assert str(match) == f"width 40: {wanted - 7:,} in the layers, -0.01% of {wanted:,}"
    assert matched_width(5, 1, heads=4).width == 4, "the smallest there is"
    assert matched_width(5, 10**10).width == 12928
    assert matched_width(5, wanted, heads=2, ffn_ratio=2).width == 48


@pytest.mark.parametrize("family", ["modernbert", "gpt2", "albert", "llama"])
def test_other_families(family):
    match = matched_width(6, "3x128", family=family, heads=2)
    assert match.width % 4 == 0 or family in ("gpt2", "albert"), "halves of heads are turned"
    built = {
        width: build_encoder(6, width, family=family, heads=2, vocab_size=30, max_length=8)
        for width in (match.width - 4, match.width, match.width + 4)
    }
    counts = {width: layer_parameters(model) for width, model in built.items()}
    assert counts[match.width] == match.parameters
    assert min(counts, key=lambda width: abs(counts[width] - match.wanted)) == match.width


def test_modernbert_by_hand():
    """No norm before the first attention, gated feed-forward, no biases."""
    width, depth = 64, 3
    with torch.device("meta"):
        model = ModernBertModel(
            ModernBertConfig(num_hidden_layers=depth, hidden_size=width, num_attention_heads=1, intermediate_size=256)
        )
    expected = depth * (4 * width**2 + 3 * 256 * width + 2 * width) - width
    assert layer_parameters(model) == expected == matched_width(depth, expected, family="modernbert").parameters


def test_build_encoder_takes_the_width():
    model = build_encoder(6, scheme="rezero", match_parameters="3x32", heads=2, vocab_size=30)
    assert model.config.hidden_size == matched_width(6, "3x32", heads=2).width == 22
    text = f"width 22: {6 * bert_layer(22):,} in the layers, {6 * bert_layer(22) / (3 * bert_layer(32)) - 1:+.2%} of"
    assert text in " ".join(str(describe(model)).split()), "the scheme's own are not counted"
    grow(model, 12)
    assert f"{12 * bert_layer(22):,} in the layers" in " ".join(str(describe(model)).split())
    assert "matched" not in str(describe(build_encoder(1, 16, vocab_size=30)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be a whole number of at least 1"),
        ({"heads": -1}, "heads must be"),
        ({"parameters": 0}, "match_parameters must be a whole number of at least 1, got 0"),
        ({"parameters": 8.0}, "match_parameters must be a whole number"),
        ({"parameters": "24"}, "match_parameters must be a number or DEPTHxWIDTH, such as '24x128', got '24'"),
        ({"parameters": "0x8"}, "depth must be a whole number of at least 1, got 0"),
        ({"parameters": "2x8x3"}, "DEPTHxWIDTH"),
        ({"family": "bart"}, "'bart' is an encoder-decoder"),
        ({"ffn_ratio": -1.0}, "ffn_ratio"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        matched_width(**({"depth": 2, "parameters": 1000} | arguments))


def test_longest_input():
    assert longest_input(BertModel(BertConfig(num_hidden_layers=1, max_position_embeddings=20))) == 20
    roberta = build_encoder(1, 16, family="roberta", vocab_size=30, max_length=20)
    assert (roberta.config.max_position_embeddings, longest_input(roberta)) == (22, 20)
